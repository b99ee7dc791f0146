"""What the registry does when something happened: it tells it on the model's timeline, moves `production`, and knows
when keys were used."""

from lepton_common.db import Tx
from lepton_common.events import KeysUsed, ModelEvent, RolloutFinished, VersionPromoted
from lepton_common.types import VersionRef

from lepton_registry import store
from lepton_registry.domain import PRODUCTION, VersionState, entry, state_after


async def on_fact(event: ModelEvent, tx: Tx) -> None:
    """Decide: the fact is on its model's timeline."""
    await store.add_entry(tx, entry(event))


async def on_rollout_finished(event: RolloutFinished, tx: Tx) -> None:
    """Decide: the version knows how its rollout ended; a promoted one is `production` now.

    For one in production that came to nothing nothing changes: the traffic was with it and still is.
    """
    told = entry(event)
    await store.add_entry(tx, told)
    model = await store.lock_model(tx, event.ref)
    version = VersionRef(event.ref, event.version)
    await store.get_version(tx, version)
    previous = model.aliases.get(PRODUCTION)
    state = state_after(event.outcome, in_production=previous == event.version)
    if state is not None:
        await store.save_state(tx, version, state, told.reason)
    if state is VersionState.PROMOTED and previous != event.version:
        await store.save_alias(tx, version, PRODUCTION)
        await tx.emit(VersionPromoted(tenant=event.tenant, model=event.model, version=event.version, previous=previous))


async def on_keys_used(event: KeysUsed, tx: Tx) -> None:
    """Decide: the keys' last uses are known."""
    await store.save_key_uses(tx, event.keys)
