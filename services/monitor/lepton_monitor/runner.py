"""What monitor does by itself: it marks the end of what is not waited for any longer, and keeps the history."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta

import structlog
from lepton_common import envelope
from lepton_common.bus import Bus
from lepton_common.db import Database
from lepton_common.events import InferenceWindow
from lepton_common.types import ModelRef

from lepton_monitor import store
from lepton_monitor.closing import Closing, recent_partitions
from lepton_monitor.domain import MARKER, by_minute, merge, to_mark
from lepton_monitor.partitions import drop_partitions, ensure_partition, partition_of

# Less than the shortest wait for a gateway, so that no window waits for the next look.
_LOOK_EVERY_S = 0.5
_LOOK_AGAIN_S = 0.05
# A marker that is not back after this time may be lost. While there is much to catch up with, it is just far behind.
_MARK_AGAIN_S = 2.0
# For how long a closed window can be told from its repeats.
_INPUTS_KEPT = timedelta(minutes=5)
_ROLL_UP_SECONDS = 600

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Marking:
    """Sends markers: windows with nothing in them, by which a model's own stream says that a second is over.

    As one comes back behind all that was there before it, nothing that was sent in time is ever late, however far the
    reading is behind.
    """

    def __init__(self, db: Database, bus: Bus, now: Callable[[], datetime]) -> None:
        self._db = db
        self._bus = bus
        self._now = now
        self._sent: dict[ModelRef, tuple[int, float]] = {}

    async def run(self) -> None:
        """Marks for ever. Raises Unavailable while PostgreSQL or Kafka is away; to be called again."""
        while True:
            look_s = await self.mark()
            await asyncio.sleep(look_s)

    async def mark(self) -> float:
        """What is due is marked. Returns the seconds until the next look."""
        async with self._db.transaction() as tx:
            open_seconds = await store.list_arrivals(tx)
        now = self._now()
        look_s, markers = _LOOK_EVERY_S, []
        for model, arrivals in open_seconds.items():
            second, next_due = to_mark(arrivals, now.timestamp())
            if next_due is not None:
                look_s = min(look_s, max(_LOOK_AGAIN_S, next_due - now.timestamp()))
            if second is not None and self._is_new(model, second):
                markers.append(
                    InferenceWindow(
                        tenant=model.tenant, model=model.model, gateway=MARKER, epoch=0, second=second, at=now
                    )
                )
        self._sent = {model: sent for model, sent in self._sent.items() if model in open_seconds}
        if markers:
            await self._bus.send([envelope.encode(each, "monitor") for each in markers])
        return look_s

    def _is_new(self, model: ModelRef, second: int) -> bool:
        before, at = self._sent.get(model, (-1, 0.0))
        if second <= before and time.monotonic() - at < _MARK_AGAIN_S:
            return False
        self._sent[model] = (second, time.monotonic())
        return True


class History:
    """Keeps the history: partitions ahead, minutes from seconds, and nothing older than it has to be."""

    def __init__(self, db: Database, closing: Closing, kept_s: Mapping[str, int], now: Callable[[], datetime]) -> None:
        """`kept_s` are the seconds that each partitioned table goes back."""
        self._db = db
        self._closing = closing
        self._kept_s = kept_s
        self._now = now

    async def keep(self) -> None:
        """All of it is done once. Any number of replicas may do it, at any time."""
        await self.make_partitions()
        await self.roll_up()
        now = self._now()
        async with self._db.transaction() as tx:
            await store.remove_inputs(tx, now - _INPUTS_KEPT)
        for table, kept_s in self._kept_s.items():
            async with self._db.transaction() as tx:
                if dropped := await drop_partitions(tx, table, int(now.timestamp()) - kept_s):
                    _log.info("history dropped", partitions=dropped)

    async def make_partitions(self) -> None:
        """There are partitions for the seconds and minutes that come next."""
        now_s = self._now().timestamp()
        recent = recent_partitions(now_s)
        async with self._db.transaction() as tx:
            for start in recent:
                await ensure_partition(tx, "seconds", start)
            for day in (0, 1):
                await ensure_partition(tx, "minutes", int(now_s) + day * 86_400)
        self._closing.known = frozenset(recent)

    async def roll_up(self) -> None:
        """Every closed second is in its minute, once."""
        async with self._db.transaction() as tx:
            models = await store.list_not_rolled_up(tx)
        for model in models:
            while await self._roll_up(model):
                pass

    async def _roll_up(self, model: ModelRef) -> bool:
        """Some of the model's closed seconds are in their minutes; whether there may be more."""
        async with self._db.transaction() as tx:
            progress = await store.lock_progress(tx, model)
            rolled_up = await store.get_rolled_up(tx, model)
            rows = await store.list_first_seconds(tx, model, rolled_up, _ROLL_UP_SECONDS)
            minutes = by_minute(rows)
            for start in sorted({partition_of("minutes", minute) for minute in minutes}):
                await ensure_partition(tx, "minutes", start)
            for minute, content in minutes.items():
                before = await store.list_minutes(tx, model, minute, minute + 1, 1)
                whole = merge([*(each for _, each in before), content])
                minutes[minute] = replace(whole, in_flight=0)  # It is of an instant, so it does not add up.
            is_all = len(rows) < _ROLL_UP_SECONDS
            await store.save_minutes(tx, model, minutes, progress.closed if is_all else rows[-1][0])
            return not is_all
