"""What rollout was told and keeps: versions, their models' policies, and the windows that rollouts are judged by."""

from datetime import datetime
from typing import Any

from lepton.policies import Policy
from lepton_common.db import Tx
from lepton_common.errors import NotFound
from lepton_common.events import WindowClosed
from lepton_common.records import Assigned
from lepton_common.types import ModelRef

# --- versions ---------------------------------------------------------------------------------------------------------


async def add_version(tx: Tx, model: ModelRef, assigned: Assigned) -> None:
    """The version is known. Versions never change, so hearing of one again changes nothing."""
    await tx.execute(
        """
        INSERT INTO versions (tenant, model, version, assigned)
        VALUES (:tenant, :model, :version, CAST(:assigned AS jsonb)) ON CONFLICT DO NOTHING
        """,
        {**_of(model), "version": assigned.version, "assigned": assigned.model_dump_json()},
    )


async def get_version(tx: Tx, model: ModelRef, version: int) -> Assigned:
    """What a worker needs to run the version. Raises NotFound."""
    result = await tx.execute(
        "SELECT assigned FROM versions WHERE tenant = :tenant AND model = :model AND version = :version",
        {**_of(model), "version": version},
    )
    if (row := result.mappings().one_or_none()) is None:
        raise NotFound(f"model {model.model!r} has no version {version}")
    return Assigned.model_validate(row["assigned"])


async def get_newest_version(tx: Tx, model: ModelRef) -> Assigned:
    """The model's version with the highest number. Raises NotFound when no version is known."""
    result = await tx.execute(
        "SELECT assigned FROM versions WHERE tenant = :tenant AND model = :model ORDER BY version DESC LIMIT 1",
        _of(model),
    )
    if (row := result.mappings().one_or_none()) is None:
        raise NotFound(f"no model {model.model!r}")
    return Assigned.model_validate(row["assigned"])


# --- windows ----------------------------------------------------------------------------------------------------------


async def add_window(tx: Tx, window: WindowClosed) -> None:
    """The window is known. A closed window never changes, so hearing of one again changes nothing."""
    await tx.execute(
        """
        INSERT INTO windows (tenant, model, second, body) VALUES (:tenant, :model, :second, CAST(:body AS jsonb))
        ON CONFLICT DO NOTHING
        """,
        {**_of(window.ref), "second": window.second, "body": window.model_dump_json()},
    )


async def list_windows(tx: Tx, model: ModelRef, first: int, last: int | None = None) -> list[WindowClosed]:
    """The model's windows of the seconds from `first` to `last`, in order."""
    result = await tx.execute(
        """
        SELECT body FROM windows WHERE tenant = :tenant AND model = :model AND second >= :first
          AND (CAST(:last AS bigint) IS NULL OR second <= :last)
        ORDER BY second LIMIT 100000
        """,
        {**_of(model), "first": first, "last": last},
    )
    return [WindowClosed.model_validate(body) for body in result.scalars()]


async def newest_window(tx: Tx, model: ModelRef) -> int:
    """The second of the model's last window; 0 without one."""
    result = await tx.execute(
        "SELECT coalesce(max(second), 0) FROM windows WHERE tenant = :tenant AND model = :model", _of(model)
    )
    return int(result.scalar_one())


async def remove_windows(tx: Tx, before: int, lead_s: int) -> None:
    """Windows older than the second `before` are gone, but for those of rollouts and of `lead_s` seconds ahead."""
    await tx.execute(
        """
        DELETE FROM windows w WHERE second < :before AND NOT EXISTS (
            SELECT FROM rollouts r WHERE r.tenant = w.tenant AND r.model = w.model
              AND w.second >= extract(epoch FROM r.started_at) - :lead_s
              AND w.second <= coalesce(extract(epoch FROM r.finished_at), 'infinity')
        )
        """,
        {"before": before, "lead_s": lead_s},
    )


# --- policies ---------------------------------------------------------------------------------------------------------


async def find_policy(tx: Tx, model: ModelRef) -> tuple[Policy, str, datetime] | None:
    """The model's own policy, who set it and when."""
    result = await tx.execute(
        "SELECT policy, actor, at FROM policies WHERE tenant = :tenant AND model = :model", _of(model)
    )
    row = result.mappings().one_or_none()
    return (Policy.model_validate(row["policy"]), row["actor"], row["at"]) if row else None


async def save_policy(tx: Tx, model: ModelRef, policy: Policy, actor: str, at: datetime) -> None:
    await tx.execute(
        """
        INSERT INTO policies (tenant, model, policy, actor, at)
        VALUES (:tenant, :model, CAST(:policy AS jsonb), :actor, :at)
        ON CONFLICT (tenant, model) DO UPDATE SET policy = excluded.policy, actor = excluded.actor, at = excluded.at
        """,
        {**_of(model), "policy": policy.model_dump_json(), "actor": actor, "at": at},
    )


async def remove_policy(tx: Tx, model: ModelRef) -> bool:
    """Whether there was one."""
    result = await tx.execute("DELETE FROM policies WHERE tenant = :tenant AND model = :model", _of(model))
    return result.rowcount == 1


def _of(model: ModelRef) -> dict[str, Any]:
    return {"tenant": model.tenant, "model": model.model}
