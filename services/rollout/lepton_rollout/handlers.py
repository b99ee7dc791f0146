"""What rollout does when something happened."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from lepton.policies import Policy
from lepton_common.db import Tx
from lepton_common.errors import Conflict
from lepton_common.events import RolloutFinished, VersionRegistered, WindowClosed
from lepton_common.records import Assigned

from lepton_rollout import store_facts
from lepton_rollout.domain import Rollout
from lepton_rollout.starting import IMMEDIATE, new_rollout, start_rollout


async def on_version_registered(
    event: VersionRegistered, tx: Tx, *, load_timeout_s: float, now: Callable[[], datetime]
) -> None:
    """Decide: the version is known, and goes live as whoever registered it asked for: see VersionRegistered.

    Where another rollout must not be disturbed, it does not, and that is told as the rollout's end.
    """
    assigned = Assigned(
        version=event.version,
        sha256=event.sha256,
        size_bytes=event.size_bytes,
        format=event.format,
        batching=event.batching,
    )
    await store_facts.add_version(tx, event.ref, assigned)
    if not event.deploy or not (event.version == 1 or event.rollout):
        return
    policy = await _policy(tx, event)
    if policy.pool:
        assigned = assigned.model_copy(update={"pool": policy.pool})
    # From now, not from the event's time: it may have waited for a rollout service that was down.
    rollout = new_rollout(event.id, event.ref, assigned, event.actor, now(), load_timeout_s)
    try:
        await start_rollout(tx, replace(rollout, policy=policy))
    except Conflict as error:
        await tx.emit(_refused(rollout, error))


async def on_window_closed(event: WindowClosed, tx: Tx) -> None:
    """Decide: the window is kept, once. The runner judges it, and what it was decided by can be looked up later."""
    await store_facts.add_window(tx, event)


async def _policy(tx: Tx, event: VersionRegistered) -> Policy:
    if event.policy is not None:
        return Policy.model_validate(event.policy)
    stored = await store_facts.find_policy(tx, event.ref) if event.rollout else None
    return stored[0] if stored else IMMEDIATE


def _refused(rollout: Rollout, error: Conflict) -> RolloutFinished:
    return RolloutFinished(
        tenant=rollout.model.tenant,
        model=rollout.model.model,
        rollout=rollout.id,
        version=rollout.version,
        outcome="aborted",
        reason=f"not started: {error.message}",
    )
