"""What rollout remembers: the versions it heard of, and every rollout. One of a model is open at most."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from lepton_common.db import Tx
from lepton_common.errors import Conflict, NotFound
from lepton_common.records import Assigned
from lepton_common.types import ModelRef

from lepton_rollout.domain import Rollout, State

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


# --- rollouts ---------------------------------------------------------------------------------------------------------


async def add_rollout(tx: Tx, rollout: Rollout) -> bool:
    """The rollout is open; False when the model has an open one already."""
    result = await tx.execute(
        """
        INSERT INTO rollouts (id, tenant, model, version, assigned, strategy, actor, started_at, load_by, state, reason)
        VALUES (:id, :tenant, :model, :version, CAST(:assigned AS jsonb), :strategy, :actor, :started_at, :load_by,
                :state, :reason)
        ON CONFLICT (tenant, model) WHERE finished_at IS NULL DO NOTHING
        """,
        {
            **_of(rollout.model),
            "id": rollout.id,
            "version": rollout.version,
            "assigned": rollout.assigned.model_dump_json(),
            "strategy": rollout.strategy,
            "actor": rollout.actor,
            "started_at": rollout.started_at,
            "load_by": rollout.load_by,
            "state": rollout.state,
            "reason": rollout.reason,
        },
    )
    return result.rowcount == 1


async def find_open_rollout(tx: Tx, model: ModelRef) -> Rollout | None:
    result = await tx.execute(
        "SELECT * FROM rollouts WHERE tenant = :tenant AND model = :model AND finished_at IS NULL", _of(model)
    )
    row = result.mappings().one_or_none()
    return _rollout(row) if row else None


async def get_rollout(tx: Tx, tenant: str, rollout: UUID) -> Rollout:
    """The tenant's rollout. Raises NotFound."""
    result = await tx.execute(
        "SELECT * FROM rollouts WHERE tenant = :tenant AND id = :id", {"tenant": tenant, "id": rollout}
    )
    if (row := result.mappings().one_or_none()) is None:
        raise NotFound(f"no rollout {rollout}")
    return _rollout(row)


async def list_rollouts(tx: Tx, tenant: str, model: str | None, limit: int) -> list[Rollout]:
    """The tenant's rollouts, of one model or of all, the newest first."""
    result = await tx.execute(
        """
        SELECT * FROM rollouts WHERE tenant = :tenant AND (CAST(:model AS text) IS NULL OR model = :model)
        ORDER BY started_at DESC, id LIMIT :limit
        """,
        {"tenant": tenant, "model": model, "limit": limit},
    )
    return [_rollout(row) for row in result.mappings()]


async def list_open_rollouts(tx: Tx) -> list[UUID]:
    """Every open rollout's id, the oldest first."""
    result = await tx.execute("SELECT id FROM rollouts WHERE finished_at IS NULL ORDER BY started_at")
    return list(result.scalars())


async def claim_rollout(tx: Tx, rollout: UUID, holder: UUID, lease_s: float) -> Rollout | None:
    """The open rollout, the holder's alone for `lease_s` seconds from now; None when it is over or another's."""
    result = await tx.execute(
        """
        UPDATE rollouts SET holder = :holder, held_until = clock_timestamp() + make_interval(secs => :lease_s)
        WHERE id = :id AND finished_at IS NULL AND (holder = :holder OR coalesce(held_until < clock_timestamp(), true))
        RETURNING *
        """,
        {"id": rollout, "holder": holder, "lease_s": lease_s},
    )
    row = result.mappings().one_or_none()
    return _rollout(row) if row else None


async def release_rollout(tx: Tx, rollout: UUID, holder: UUID) -> None:
    """The rollout is nobody's, if it was the holder's."""
    await tx.execute(
        "UPDATE rollouts SET held_until = NULL WHERE id = :id AND holder = :holder", {"id": rollout, "holder": holder}
    )


async def save_rollout(tx: Tx, before: Rollout, after: Rollout, holder: UUID) -> None:
    """The rollout is as in `after`. Raises Conflict when it is not the holder's any more, or not as in `before`."""
    result = await tx.execute(
        """
        UPDATE rollouts SET state = :state, reason = :reason, load_by = :load_by, previous = :previous,
            finished_at = :finished_at
        WHERE id = :id AND holder = :holder AND state = :before AND finished_at IS NULL
        """,
        {
            "id": after.id,
            "state": after.state,
            "reason": after.reason,
            "load_by": after.load_by,
            "previous": after.previous,
            "finished_at": after.finished_at,
            "holder": holder,
            "before": before.state,
        },
    )
    if result.rowcount != 1:
        raise Conflict(f"rollout {after.id} was taken over meanwhile")


async def supersede_rollout(tx: Tx, rollout: UUID, reason: str) -> None:
    """The rollout gives up if it is still loading; one that shifts already goes on to its end."""
    await tx.execute(
        "UPDATE rollouts SET state = :failing, reason = :reason WHERE id = :id AND state = :loading",
        {"id": rollout, "reason": reason, "failing": State.FAILING, "loading": State.LOADING},
    )


def _of(model: ModelRef) -> dict[str, Any]:
    return {"tenant": model.tenant, "model": model.model}


def _rollout(row: Mapping[Any, Any]) -> Rollout:
    started_at: datetime = row["started_at"]
    return Rollout(
        id=row["id"],
        model=ModelRef(row["tenant"], row["model"]),
        assigned=Assigned.model_validate(row["assigned"]),
        strategy=row["strategy"],
        actor=row["actor"],
        started_at=started_at,
        load_by=row["load_by"],
        state=State(row["state"]),
        reason=row["reason"],
        previous=row["previous"],
        finished_at=row["finished_at"],
    )
