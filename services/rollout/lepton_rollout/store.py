"""What rollout remembers of rollouts: each as it is, and every decision about it. `store_facts.py` has the rest.

One rollout of a model is under way at most; any number may be queued behind it.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from lepton.policies import Policy
from lepton.rollouts import Decision, Verdict
from lepton_common.db import Tx, like
from lepton_common.errors import Conflict, NotFound
from lepton_common.records import Assigned
from lepton_common.types import ModelRef
from sqlalchemy.exc import IntegrityError

from lepton_rollout import judge
from lepton_rollout.domain import Rollout, State, Walk

# --- rollouts ---------------------------------------------------------------------------------------------------------


async def add_rollout(tx: Tx, rollout: Rollout) -> bool:
    """The rollout is there; False when it is not queued and the model has one under way already."""
    columns = _columns(rollout)
    names = ", ".join(columns)
    result = await tx.execute(
        f"INSERT INTO rollouts ({names}) VALUES ({', '.join(map(_placeholder, columns))})"  # noqa: S608 - own names
        " ON CONFLICT (tenant, model) WHERE finished_at IS NULL AND state <> 'queued' DO NOTHING",
        columns,
    )
    return result.rowcount == 1


async def find_open_rollout(tx: Tx, model: ModelRef) -> Rollout | None:
    """The one that is under way, with its row locked: what changes it now is not lost."""
    result = await tx.execute(
        "SELECT * FROM rollouts WHERE tenant = :tenant AND model = :model AND finished_at IS NULL AND state <> 'queued'"
        " FOR UPDATE",
        _of(model),
    )
    row = result.mappings().one_or_none()
    return _rollout(row) if row else None


async def list_queued_rollouts(tx: Tx, model: ModelRef) -> list[Rollout]:
    """Those that wait for the model, in their order, locked."""
    result = await tx.execute(
        "SELECT * FROM rollouts WHERE tenant = :tenant AND model = :model AND state = 'queued'"
        " ORDER BY started_at, id FOR UPDATE",
        _of(model),
    )
    return [_rollout(row) for row in result.mappings()]


async def find_rolled_back(tx: Tx, model: ModelRef, sha256: str) -> Rollout | None:
    """The last rollout that took these bytes back, unless a later one promoted them."""
    result = await tx.execute(
        """
        SELECT * FROM rollouts
        WHERE tenant = :tenant AND model = :model AND assigned ->> 'sha256' = :sha256
          AND state IN ('rolled_back', 'promoted')
        ORDER BY finished_at DESC LIMIT 1
        """,
        {**_of(model), "sha256": sha256},
    )
    row = result.mappings().one_or_none()
    return _rollout(row) if row and row["state"] == State.ROLLED_BACK else None


async def get_rollout(tx: Tx, tenant: str, rollout: UUID) -> Rollout:
    """The tenant's rollout. Raises NotFound."""
    return await _get(tx, "SELECT * FROM rollouts WHERE tenant = :tenant AND id = :id", tenant, rollout)


async def lock_rollout(tx: Tx, tenant: str, rollout: UUID) -> Rollout:
    """The tenant's rollout, its row locked. Raises NotFound."""
    return await _get(tx, "SELECT * FROM rollouts WHERE tenant = :tenant AND id = :id FOR UPDATE", tenant, rollout)


async def list_rollouts(
    tx: Tx, tenant: str, model: str | None, limit: int, patterns: Sequence[str] = ()
) -> list[Rollout]:
    """The tenant's rollouts, of one model or of all that a pattern matches, the newest first."""
    result = await tx.execute(
        """
        SELECT * FROM rollouts WHERE tenant = :tenant AND (CAST(:model AS text) IS NULL OR model = :model)
        AND model LIKE ANY (CAST(:patterns AS text[]))
        ORDER BY started_at DESC, id LIMIT :limit
        """,
        {"tenant": tenant, "model": model, "limit": limit, "patterns": like(patterns)},
    )
    return [_rollout(row) for row in result.mappings()]


async def list_group(tx: Tx, group: UUID) -> list[Rollout]:
    """The members of a group."""
    result = await tx.execute("SELECT * FROM rollouts WHERE group_id = :group ORDER BY id", {"group": group})
    return [_rollout(row) for row in result.mappings()]


async def list_open_rollouts(tx: Tx) -> list[UUID]:
    """Every open rollout's id, the oldest first."""
    result = await tx.execute("SELECT id FROM rollouts WHERE finished_at IS NULL ORDER BY started_at, id")
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


async def renew_claim(tx: Tx, rollout: Rollout, holder: UUID, lease_s: float) -> bool:
    """Whether the rollout is still the holder's, and as it was read; then it is for `lease_s` seconds from now."""
    result = await tx.execute(
        """
        UPDATE rollouts SET held_until = clock_timestamp() + make_interval(secs => :lease_s)
        WHERE id = :id AND holder = :holder AND revision = :revision AND finished_at IS NULL
        """,
        {"id": rollout.id, "holder": holder, "revision": rollout.revision, "lease_s": lease_s},
    )
    return result.rowcount == 1


async def release_rollout(tx: Tx, rollout: UUID, holder: UUID) -> None:
    """The rollout is nobody's, if it was the holder's."""
    await tx.execute(
        "UPDATE rollouts SET held_until = NULL WHERE id = :id AND holder = :holder", {"id": rollout, "holder": holder}
    )


async def save_rollout(tx: Tx, before: Rollout, after: Rollout, holder: UUID | None = None) -> None:
    """The rollout is as in `after`.

    Raises Conflict when it is not as in `before` any more, or not the holder's, if one is named.
    """
    columns = {**_columns(after), "revision": before.revision + 1}
    changes = ", ".join(f"{name} = {_placeholder(name)}" for name in columns)
    try:
        result = await tx.execute(
            f"UPDATE rollouts SET {changes} WHERE id = :id AND revision = :before"  # noqa: S608 - own names
            " AND finished_at IS NULL AND (CAST(:holder AS uuid) IS NULL OR holder = :holder)",
            {**columns, "before": before.revision, "holder": holder},
        )
    except IntegrityError as error:
        raise Conflict(f"another rollout of model {after.model.model!r} is under way") from error
    if result.rowcount != 1:
        raise Conflict(f"rollout {after.id} was changed or taken over meanwhile")


async def _get(tx: Tx, statement: str, tenant: str, rollout: UUID) -> Rollout:
    result = await tx.execute(statement, {"tenant": tenant, "id": rollout})
    if (row := result.mappings().one_or_none()) is None:
        raise NotFound(f"no rollout {rollout}")
    return _rollout(row)


# --- decisions --------------------------------------------------------------------------------------------------------


async def add_decision(
    tx: Tx, rollout: Rollout, at: datetime, action: str, reason: str, actor: str = "", verdict: Verdict | None = None
) -> None:
    """It is on record what was decided, on which numbers. The rollout's row is locked or claimed."""
    gates = [gate.model_dump(mode="json") for gate in verdict.gates] if verdict else []
    await tx.execute(
        """
        INSERT INTO decisions (rollout, number, at, action, stage, percent, reason, actor, gates)
        SELECT :rollout, coalesce(max(number), 0) + 1, :at, :action, :stage, :percent, :reason, :actor,
               CAST(:gates AS jsonb)
        FROM decisions WHERE rollout = :rollout
        """,
        {
            "rollout": rollout.id,
            "at": at,
            "action": action,
            "stage": rollout.walk.stage,
            "percent": rollout.walk.percent,
            "reason": reason,
            "actor": actor,
            "gates": json.dumps(gates),
        },
    )


async def list_decisions(tx: Tx, rollout: UUID) -> list[Decision]:
    """In their order."""
    result = await tx.execute(
        "SELECT number, at, action, stage, percent, reason, actor, gates FROM decisions WHERE rollout = :rollout"
        " ORDER BY number",
        {"rollout": rollout},
    )
    return [Decision.model_validate(dict(row)) for row in result.mappings()]


# --- rows -------------------------------------------------------------------------------------------------------------

_JSON = frozenset({"assigned", "policy", "walk"})


def _of(model: ModelRef) -> dict[str, Any]:
    return {"tenant": model.tenant, "model": model.model}


def _placeholder(column: str) -> str:
    return f"CAST(:{column} AS jsonb)" if column in _JSON else f":{column}"


def _columns(rollout: Rollout) -> dict[str, Any]:
    return {
        "id": rollout.id,
        **_of(rollout.model),
        "version": rollout.version,
        "assigned": rollout.assigned.model_dump_json(),
        "policy": rollout.policy.model_dump_json(),
        "actor": rollout.actor,
        "started_at": rollout.started_at,
        "load_by": rollout.load_by,
        "state": rollout.state,
        "reason": rollout.reason,
        "outcome": rollout.outcome,
        "stable": rollout.stable,
        "previous": rollout.previous,
        "group_id": rollout.group,
        "finished_at": rollout.finished_at,
        "walk": json.dumps(_walk_columns(rollout.walk)),
        "revision": rollout.revision,
    }


def _walk_columns(walk: Walk) -> dict[str, Any]:
    return {
        "begun": walk.begun,
        "stage": walk.stage,
        "applied": walk.applied,
        "percent": walk.percent,
        "second": walk.second,
        "entered_at": walk.entered_at and walk.entered_at.isoformat(),
        "ready": walk.ready,
        "approved": walk.approved,
        "paused": walk.paused,
        "held": walk.held,
        "waiting_for": walk.waiting_for,
        "judged": walk.judged,
        "sequence": walk.sequence,
        "evidence": judge.to_json(walk.evidence),
        "verdict": walk.verdict and walk.verdict.model_dump(mode="json"),
    }


def _walk(columns: Mapping[str, Any]) -> Walk:
    """Columns that an earlier release did not know keep their defaults."""
    known: dict[str, Any] = dict(columns)
    if entered_at := known.get("entered_at"):
        known["entered_at"] = datetime.fromisoformat(entered_at)
    if evidence := known.get("evidence"):
        known["evidence"] = judge.from_json(evidence)
    if verdict := known.get("verdict"):
        known["verdict"] = Verdict.model_validate(verdict)
    return Walk(**known)


def _rollout(row: Mapping[Any, Any]) -> Rollout:
    return Rollout(
        id=row["id"],
        model=ModelRef(row["tenant"], row["model"]),
        assigned=Assigned.model_validate(row["assigned"]),
        policy=Policy.model_validate(row["policy"]),
        actor=row["actor"],
        started_at=row["started_at"],
        load_by=row["load_by"],
        state=State(row["state"]),
        reason=row["reason"],
        outcome=State(row["outcome"]) if row["outcome"] else None,
        stable=row["stable"],
        previous=row["previous"],
        group=row["group_id"],
        finished_at=row["finished_at"],
        walk=_walk(row["walk"]),
        revision=row["revision"],
    )
