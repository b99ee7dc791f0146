"""The partitions of the history: made ahead or when first needed, and dropped as a whole when they are old."""

from collections.abc import Mapping
from types import MappingProxyType

from lepton_common.db import Tx

# Seconds that one partition spans, by table.
SPANS: Mapping[str, int] = MappingProxyType({"seconds": 600, "minutes": 86_400, "labels": 86_400})


def partition_of(table: str, second: int) -> int:
    """The first second of the partition that the second is in."""
    return second - second % SPANS[table]


async def ensure_partition(tx: Tx, table: str, second: int) -> None:
    """The second has a partition, which is not dropped before the end of the transaction.

    To be called before the transaction touches the table: who drops partitions waits for it.
    """
    await tx.execute("SELECT pg_advisory_xact_lock_shared(hashtext(:lock))", {"lock": _dropping(table)})
    start = partition_of(table, second)
    name = f"{table}_{start}"
    if await _exists(tx, name):
        return
    await tx.execute("SELECT pg_advisory_xact_lock(hashtext(:lock))", {"lock": f"lepton.monitor.make.{table}"})
    if await _exists(tx, name):
        return
    # Attached, not made in place: that would wait for every transaction that writes to the table, and hold them up.
    await tx.execute(f"CREATE TABLE {name} (LIKE {table} INCLUDING ALL)")
    await tx.execute(
        f"ALTER TABLE {table} ATTACH PARTITION {name} FOR VALUES FROM ({start}) TO ({start + SPANS[table]})"
    )


async def drop_partitions(tx: Tx, table: str, before: int) -> list[str]:
    """The partitions that end before that second are gone, but for seconds that no minute holds yet. Returns them."""
    await tx.execute("SELECT pg_advisory_xact_lock(hashtext(:lock))", {"lock": _dropping(table)})
    result = await tx.execute(
        "SELECT relname FROM pg_inherits JOIN pg_class ON oid = inhrelid WHERE inhparent = CAST(:table AS regclass)",
        {"table": table},
    )
    ends = {name: int(name.rpartition("_")[2]) + SPANS[table] for name in result.scalars()}
    oldest = await tx.execute("SELECT min(rolled_up) FROM models WHERE rolled_up < closed")
    needed_from = oldest.scalar_one() if table == "seconds" else None
    old = [name for name, end in ends.items() if end <= before and (needed_from is None or end <= needed_from)]
    for name in old:
        await tx.execute(f"DROP TABLE {name}")
    return old


async def _exists(tx: Tx, name: str) -> bool:
    return (await tx.execute("SELECT to_regclass(:name)", {"name": name})).scalar_one() is not None


def _dropping(table: str) -> str:
    return f"lepton.monitor.drop.{table}"
