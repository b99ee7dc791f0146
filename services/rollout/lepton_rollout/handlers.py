"""What rollout does when something happened."""

from collections.abc import Callable
from datetime import datetime

from lepton_common.db import Tx
from lepton_common.events import VersionRegistered, WindowClosed
from lepton_common.records import Assigned

from lepton_rollout import store_facts
from lepton_rollout.starting import new_rollout, start_rollout


async def on_version_registered(
    event: VersionRegistered, tx: Tx, *, load_timeout_s: float, now: Callable[[], datetime]
) -> None:
    """Decide: the version is known, and the first one of a model is deployed unless its owner said not to."""
    assigned = Assigned(
        version=event.version,
        sha256=event.sha256,
        size_bytes=event.size_bytes,
        format=event.format,
        batching=event.batching,
    )
    await store_facts.add_version(tx, event.ref, assigned)
    if event.version == 1 and event.deploy:
        # From now, not from the event's time: it may have waited for a rollout service that was down.
        await start_rollout(tx, new_rollout(event.id, event.ref, assigned, event.actor, now(), load_timeout_s))


async def on_window_closed(event: WindowClosed, tx: Tx) -> None:
    """Decide: the window is kept, once. The runner judges it, and what it was decided by can be looked up later."""
    await store_facts.add_window(tx, event)
