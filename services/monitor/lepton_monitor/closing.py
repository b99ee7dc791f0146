"""Closing what can be closed of a model: history, event and progress in one transaction."""

from collections.abc import Mapping, Sequence
from uuid import UUID, uuid5

from lepton_common.db import Tx
from lepton_common.events import WindowClosed
from lepton_common.types import ModelRef

from lepton_monitor import store
from lepton_monitor.domain import CALLERS, Content, Progress, after_closing, attributed, bounded, closable, merge
from lepton_monitor.partitions import SPANS, ensure_partition, partition_of

# What gateways told, in all their lives, by second and gateway.
Told = Mapping[int, Mapping[str, Sequence[Content]]]
# A closed second's event has always the same id, whoever closes it.
_IDS = UUID("5a0c1d7e-6f0b-4a53-9f0e-3b1c8a5d2e47")


class Closing:
    """Closes seconds. `known` are the partitions of recent seconds that are there for certain."""

    def __init__(self) -> None:
        self.known: frozenset[int] = frozenset()

    async def close(self, tx: Tx, model: ModelRef, progress: Progress, told: Told | None = None) -> list[int]:
        """What is over of the locked model is closed, told and saved; returns the seconds with something in them.

        `told` is all that is open, if the caller knows.
        """
        events: list[WindowClosed] = []
        # Mostly the oldest second must wait for another gateway, and there is nothing to read.
        if progress.oldest is not None and closable(progress, [progress.oldest]):
            told = told or await store.list_open(tx, model, progress.closed)
            seconds = closable(progress, list(told))
            events = _events(model, {second: told[second] for second in seconds}, progress.sequence)
            left = len(told) > len(seconds) or len(told) == store.MOST_SECONDS
            oldest = await store.find_oldest_open(tx, model, seconds[-1]) if left else None
            progress = after_closing(progress, seconds[-1], len(events), oldest)
        for start in sorted({partition_of("seconds", event.second) for event in events} - self.known):
            await ensure_partition(tx, "seconds", start)
        contents = (Content(each.versions, each.shadow, each.in_flight) for each in events)
        rows = [(each.second, each.sequence, content) for each, content in zip(events, contents, strict=True)]
        await store.save_progress(tx, model, progress, rows)
        for event in events:
            await tx.emit(event)
        return [event.second for event in events]


def _events(model: ModelRef, told: Told, sequence: int) -> list[WindowClosed]:
    """The closed seconds with something in them."""
    events: list[WindowClosed] = []
    for second, gateways in told.items():
        content = merge(each for lives in gateways.values() for each in lives)
        if content.is_empty:
            continue
        content = bounded(attributed(content))
        events.append(
            WindowClosed(
                id=uuid5(_IDS, f"{model}/{second}"),
                tenant=model.tenant,
                model=model.model,
                second=second,
                sequence=sequence + len(events) + 1,
                gateways=len(gateways.keys() - {CALLERS}),
                versions=content.versions,
                shadow=content.shadow,
                in_flight=content.in_flight,
            )
        )
    return events


def recent_partitions(now_s: float, ahead: int = 2) -> list[int]:
    """The starts of the partitions of the seconds by now, and of those that come next."""
    current = partition_of("seconds", int(now_s))
    return [current + step * SPANS["seconds"] for step in range(-1, ahead + 1)]
