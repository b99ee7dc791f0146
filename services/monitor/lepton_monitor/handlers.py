"""What monitor does when a gateway told of a second, and when anybody tells what would have been right."""

from collections.abc import Callable
from datetime import datetime, timedelta

from lepton_common import asked
from lepton_common.auth import Caller, forbidden
from lepton_common.db import Tx
from lepton_common.errors import Invalid
from lepton_common.events import InferenceWindow
from lepton_common.foreign import Message
from prometheus_client import CollectorRegistry, Counter, Histogram

from lepton_monitor import store
from lepton_monitor.closing import Closing
from lepton_monitor.domain import MARKER, Content, heard
from lepton_monitor.partitions import ensure_partition
from lepton_monitor.store_labels import Label, add_label

# A gateway whose clock is further ahead would close its seconds for all others.
_MOST_AHEAD_S = 5
_MOST_AHEAD_OF_A_LABEL = timedelta(minutes=5)


class Measures:
    """What monitor tells of itself."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.closed = Counter("lepton_monitor_windows_closed", "Seconds of models that were closed.", registry=registry)
        self.late = Counter(
            "lepton_monitor_windows_late", "Windows of gateways that came after their second.", registry=registry
        )
        self.delay_s = Histogram(
            "lepton_monitor_close_delay_seconds",
            "Time from the end of a second to its closing.",
            buckets=(0.02, 0.05, 0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 60, 3600),
            registry=registry,
        )


async def on_inference_window(
    event: InferenceWindow, tx: Tx, *, closing: Closing, measures: Measures, now: Callable[[], datetime]
) -> None:
    """Decide: the window is kept, and what it completes is closed. One that is late changes nothing but a count."""
    at = now()
    if event.second > at.timestamp() + _MOST_AHEAD_S:
        raise Invalid(
            f"window of {event.ref} from gateway {event.gateway!r}: second {event.second} is "
            f"{event.second - at.timestamp():.0f} s ahead of this machine's clock"
        )
    content, told = Content(event.versions, event.shadow, event.in_flight), None
    if event.gateway == MARKER:
        progress = await store.lock_progress(tx, event.ref)
    else:
        progress = await store.keep_input(tx, event.ref, event.second, event.gateway, event.epoch, content, at)
        if event.second <= progress.closed:
            await _note_late(event, content, tx, measures)
            return
        if progress.oldest is None:
            told = {event.second: {event.gateway: [content]}}
    is_final = event.at.timestamp() >= event.second + 1
    progress = heard(progress, event.gateway, event.second, is_final=is_final)
    for second in await closing.close(tx, event.ref, progress, told):
        measures.closed.inc()
        measures.delay_s.observe(now().timestamp() - (second + 1))


async def _note_late(event: InferenceWindow, content: Content, tx: Tx, measures: Measures) -> None:
    known = await store.find_input(tx, event.ref, event.second, event.gateway, event.epoch)
    # A gateway may send the same window again.
    if known is None or known.requests < content.requests:
        await store.add_late(tx, event.ref, event.second)
        measures.late.inc()


async def on_label(message: Message, caller: Caller, tx: Tx, *, kept: timedelta, now: Callable[[], datetime]) -> None:
    """Decide: the label is kept, once.

    Raises Invalid for one of the future, or of a time that is not kept any more, and Forbidden for one of a model that
    the key is not for.
    """
    told = message.parse(asked.Label)
    if told.model is not None:
        caller.ref(told.model)
    elif caller.models:
        raise forbidden(caller, "model: this API key is for some models only, so the label has to name one of them")
    at = told.at or message.at or now()
    if at > now() + _MOST_AHEAD_OF_A_LABEL:
        raise Invalid("at: it is ahead of this machine's clock by more than five minutes")
    if at < now() - kept:
        raise Invalid(f"at: labels are kept for {kept.days} days, and this one is older")
    label = Label(message.uuid(caller.tenant), at, told.label, told.request, told.key, told.model)
    await ensure_partition(tx, "labels", int(at.timestamp()))
    await add_label(tx, caller.tenant, label)
