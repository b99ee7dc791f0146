"""What the registry does when something happened: it tells it on the model's timeline, moves `production`, and knows
when keys were used."""

from datetime import datetime

from lepton_common.asked import Ingest
from lepton_common.auth import Caller
from lepton_common.db import Tx
from lepton_common.errors import Conflict
from lepton_common.events import KeysUsed, ModelEvent, RolloutFinished, VersionPromoted
from lepton_common.foreign import Message
from lepton_common.types import VersionRef

from lepton_registry import store, store_ingests
from lepton_registry.domain import PRODUCTION, VersionState, entry, state_after
from lepton_registry.sources import Sources
from lepton_registry.store_ingests import Waiting

MOST_WAITING = 1000


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


async def on_ingest(message: Message, caller: Caller, tx: Tx, *, sources: Sources, at: datetime) -> None:
    """Decide: the push is noted; the runner carries it out.

    Raises Invalid for what cannot be read, Forbidden for a model that the key is not for and for a URI that the
    operator does not allow, and Conflict for a tenant that has asked for very much already.
    """
    asked = message.parse(Ingest)
    caller.ref(asked.model)
    if asked.uri is not None:
        sources.check(asked.uri)
    await store.lock_tenant(tx, caller.tenant)
    if await store_ingests.count_ingests(tx, caller.tenant) >= MOST_WAITING:
        raise Conflict(f"tenant {caller.tenant!r} has {MOST_WAITING} pushes waiting: replay this one later")
    await store_ingests.add_ingest(
        tx,
        Waiting(
            id=message.uuid(caller.tenant),
            tenant=caller.tenant,
            request=str(message.id),
            source=message.source,
            asked=asked,
            actor=caller.name,
            traceparent=message.traceparent,
            at=at,
        ),
    )
