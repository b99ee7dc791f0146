"""What monitor remembers: what gateways told, how far each model's seconds are closed, and its history."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from lepton_common.db import Tx
from lepton_common.types import ModelRef
from pydantic import TypeAdapter
from sqlalchemy import text

from lepton_monitor.domain import Content, Progress

_CONTENT = TypeAdapter(Content)
_DONE = TypeAdapter(dict[str, int])

_KEEP = """
    INSERT INTO inputs (tenant, model, second, gateway, epoch, requests, arrived_at, content)
    SELECT :tenant, :model, CAST(:second AS bigint), :gateway, CAST(:epoch AS bigint), CAST(:requests AS bigint),
        CAST(:now AS timestamptz), :content
"""
_UNLESS_LESS = """
    ON CONFLICT (tenant, model, second, gateway, epoch)
    DO UPDATE SET requests = excluded.requests, content = excluded.content
    WHERE inputs.requests <= excluded.requests
"""
_UPDATE = """
    UPDATE models SET closed = :closed, sequence = :sequence, oldest = :oldest, marked = :marked,
        done = CAST(:done AS jsonb)
    WHERE tenant = :tenant AND model = :model
"""
# What every window comes to: made once, and one round trip each.
_LOCK_AND_KEEP = text(
    f"""
    WITH locked AS (
        SELECT closed, sequence, oldest, marked, done FROM models
        WHERE tenant = :tenant AND model = :model FOR UPDATE
    ), kept AS ({_KEEP} FROM locked WHERE closed < :second {_UNLESS_LESS})
    SELECT * FROM locked
    """  # noqa: S608 - constants
)
_SAVE = text(_UPDATE)
_SAVE_WITH_HISTORY = text(
    f"""
    WITH added AS (
        INSERT INTO seconds (tenant, model, second, sequence, content)
        SELECT :tenant, :model, * FROM unnest(
            CAST(:seconds AS bigint[]), CAST(:sequences AS bigint[]), CAST(:contents AS text[]))
    )
    {_UPDATE}
    """  # noqa: S608 - constants
)
# How much one transaction closes or reads: the rest is the next one's.
MOST_SECONDS = 200

# --- progress ---------------------------------------------------------------------------------------------------------


async def find_progress(tx: Tx, model: ModelRef) -> Progress | None:
    """How far the model is, its row held to the end of the transaction; None for a model never heard of."""
    result = await tx.execute(
        """
        SELECT closed, sequence, oldest, marked, done FROM models
        WHERE tenant = :tenant AND model = :model FOR UPDATE
        """,
        _of(model),
    )
    row = result.mappings().one_or_none()
    return Progress(**row) if row else None


async def lock_progress(tx: Tx, model: ModelRef) -> Progress:
    """How far the model is, its row made if it had none and held to the end of the transaction."""
    if (found := await find_progress(tx, model)) is not None:
        return found
    await tx.execute("INSERT INTO models (tenant, model) VALUES (:tenant, :model) ON CONFLICT DO NOTHING", _of(model))
    return await find_progress(tx, model) or Progress()


async def keep_input(
    tx: Tx, model: ModelRef, second: int, gateway: str, epoch: int, content: Content, now: datetime
) -> Progress:
    """As `lock_progress`, and the gateway's window is kept if its second is not closed. In one round trip, mostly."""
    values = _input(model, second, gateway, epoch, content, now)
    while True:
        result = await tx.execute(_LOCK_AND_KEEP, values)
        if row := result.mappings().one_or_none():
            return Progress(**row)
        await lock_progress(tx, model)


async def save_progress(
    tx: Tx, model: ModelRef, progress: Progress, closed: Sequence[tuple[int, int, Content]] = ()
) -> None:
    """The model is so far; `closed` are seconds that became history with it, each with its sequence number."""
    history = {
        "seconds": [second for second, _, _ in closed],
        "sequences": [sequence for _, sequence, _ in closed],
        "contents": [_dumped(content) for _, _, content in closed],
    }
    await tx.execute(
        _SAVE_WITH_HISTORY if closed else _SAVE,
        {
            **_of(model),
            "closed": progress.closed,
            "sequence": progress.sequence,
            "oldest": progress.oldest,
            "marked": progress.marked,
            "done": _DONE.dump_json(dict(progress.done)).decode(),
            **(history if closed else {}),
        },
    )


# --- inputs -----------------------------------------------------------------------------------------------------------


async def save_input(
    tx: Tx, model: ModelRef, second: int, gateway: str, epoch: int, content: Content, now: datetime
) -> None:
    """The gateway's window of the second is kept, unless there is one that counts more requests."""
    await tx.execute(f"{_KEEP} {_UNLESS_LESS}", _input(model, second, gateway, epoch, content, now))


async def find_input(tx: Tx, model: ModelRef, second: int, gateway: str, epoch: int) -> Content | None:
    result = await tx.execute(
        """
        SELECT content FROM inputs WHERE tenant = :tenant AND model = :model AND second = :second
            AND gateway = :gateway AND epoch = :epoch
        """,
        {**_of(model), "second": second, "gateway": gateway, "epoch": epoch},
    )
    found = result.scalar_one_or_none()
    return None if found is None else _loaded(found)


async def list_open(tx: Tx, model: ModelRef, closed: int) -> dict[int, dict[str, list[Content]]]:
    """What each gateway told, in all its lives, of the first seconds after `closed`, in order."""
    result = await tx.execute(
        """
        SELECT second, gateway, content FROM inputs
        WHERE tenant = :tenant AND model = :model AND second IN (
            SELECT DISTINCT second FROM inputs WHERE tenant = :tenant AND model = :model AND second > :closed
            ORDER BY second LIMIT :limit
        ) ORDER BY second, gateway, epoch
        """,
        {**_of(model), "closed": closed, "limit": MOST_SECONDS},
    )
    told: dict[int, dict[str, list[Content]]] = {}
    for second, gateway, content in result:
        told.setdefault(second, {}).setdefault(gateway, []).append(_loaded(content))
    return told


async def find_oldest_open(tx: Tx, model: ModelRef, closed: int) -> int | None:
    """The first second after `closed` that anybody told of."""
    result = await tx.execute(
        "SELECT min(second) FROM inputs WHERE tenant = :tenant AND model = :model AND second > :closed",
        {**_of(model), "closed": closed},
    )
    second: int | None = result.scalar_one()
    return second


async def list_arrivals(tx: Tx) -> dict[ModelRef, list[tuple[int, float]]]:
    """The open seconds of every model and when (Unix time) the first window of each came, in order."""
    result = await tx.execute(
        """
        SELECT tenant, model, second, extract(epoch FROM min(arrived_at))::float8
        FROM models JOIN inputs USING (tenant, model)
        WHERE oldest IS NOT NULL AND second > closed GROUP BY tenant, model, second ORDER BY tenant, model, second
        """
    )
    arrivals: dict[ModelRef, list[tuple[int, float]]] = {}
    for tenant, model, second, arrived_s in result:
        arrivals.setdefault(ModelRef(tenant, model), []).append((second, arrived_s))
    return arrivals


async def remove_inputs(tx: Tx, before: datetime) -> None:
    """Closed inputs that came before then are gone: nobody repeats them any more."""
    await tx.execute(
        """
        DELETE FROM inputs USING models
        WHERE inputs.tenant = models.tenant AND inputs.model = models.model
            AND second <= closed AND arrived_at < :before
        """,
        {"before": before},
    )
    # Longer than an event that was handled may be delivered again. After that, a window of a closed second is late.
    await tx.execute("DELETE FROM handled WHERE consumer = 'monitor' AND at < :before", {"before": before})


# --- history ----------------------------------------------------------------------------------------------------------


async def add_late(tx: Tx, model: ModelRef, second: int) -> None:
    """The closed second, if it had anything in it, knows of one more window that came too late."""
    await tx.execute(
        "UPDATE seconds SET late = late + 1 WHERE tenant = :tenant AND model = :model AND second = :second",
        {**_of(model), "second": second},
    )


async def list_seconds(tx: Tx, model: ModelRef, since: int, until: int, limit: int) -> list[tuple[int, Content]]:
    """The newest closed seconds from `since` on and before `until`, in order."""
    return await _list_history(tx, "seconds", model, since, until, limit)


async def list_first_seconds(tx: Tx, model: ModelRef, after: int, limit: int) -> list[tuple[int, Content]]:
    """The first closed seconds after that one, in order."""
    result = await tx.execute(
        """
        SELECT second, content FROM seconds WHERE tenant = :tenant AND model = :model AND second > :after
        ORDER BY second LIMIT :limit
        """,
        {**_of(model), "after": after, "limit": limit},
    )
    return [(second, _loaded(content)) for second, content in result]


async def list_minutes(tx: Tx, model: ModelRef, since: int, until: int, limit: int) -> list[tuple[int, Content]]:
    """The newest minutes that were rolled up, by their first seconds from `since` on and before `until`, in order."""
    return await _list_history(tx, "minutes", model, since, until, limit)


async def list_not_rolled_up(tx: Tx) -> list[ModelRef]:
    """The models of which closed seconds are not in minutes yet."""
    result = await tx.execute("SELECT tenant, model FROM models WHERE rolled_up < closed ORDER BY tenant, model")
    return [ModelRef(tenant, model) for tenant, model in result]


async def get_rolled_up(tx: Tx, model: ModelRef) -> int:
    """Up to which second the model's seconds are in minutes, too."""
    result = await tx.execute("SELECT rolled_up FROM models WHERE tenant = :tenant AND model = :model", _of(model))
    return int(result.scalar_one_or_none() or 0)


async def save_minutes(tx: Tx, model: ModelRef, minutes: Mapping[int, Content], rolled_up: int) -> None:
    """The minutes are as given, and hold the model's seconds up to `rolled_up`."""
    if minutes:
        await tx.execute(
            """
            INSERT INTO minutes (tenant, model, second, content) VALUES (:tenant, :model, :second, :content)
            ON CONFLICT (tenant, model, second) DO UPDATE SET content = excluded.content
            """,
            [{**_of(model), "second": minute, "content": _dumped(content)} for minute, content in minutes.items()],
        )
    await tx.execute(
        "UPDATE models SET rolled_up = :rolled_up WHERE tenant = :tenant AND model = :model",
        {**_of(model), "rolled_up": rolled_up},
    )


async def _list_history(
    tx: Tx, table: str, model: ModelRef, since: int, until: int, limit: int
) -> list[tuple[int, Content]]:
    result = await tx.execute(
        f"""
        SELECT second, content FROM {table}
        WHERE tenant = :tenant AND model = :model AND second >= :since AND second < :until
        ORDER BY second DESC LIMIT :limit
        """,  # noqa: S608 - one of two constants
        {**_of(model), "since": since, "until": until, "limit": limit},
    )
    return [(second, _loaded(content)) for second, content in reversed(result.all())]


def _of(model: ModelRef) -> dict[str, Any]:
    return {"tenant": model.tenant, "model": model.model}


def _input(model: ModelRef, second: int, gateway: str, epoch: int, content: Content, now: datetime) -> dict[str, Any]:
    return {
        **_of(model),
        "second": second,
        "gateway": gateway,
        "epoch": epoch,
        "requests": content.requests,
        "now": now,
        "content": _dumped(content),
    }


def _dumped(content: Content) -> str:
    return _CONTENT.dump_json(content, exclude_defaults=True).decode()


def _loaded(json: str) -> Content:
    return _CONTENT.validate_json(json)
