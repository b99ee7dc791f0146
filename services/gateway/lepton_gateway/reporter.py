"""Tells on Kafka of closed windows, an event a model and second, and of callers. Lossy: what finds no room is dropped
and counted."""

import asyncio
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid5

import structlog
from lepton_common import envelope
from lepton_common.errors import TooLarge, Unavailable
from lepton_common.events import Event, InferenceWindow, ShadowWindow, Tally, VersionWindow
from lepton_common.kafka_client import Producer, Record

from lepton_gateway.windows import Cell, Closed, Outcome, Windows

_SOURCE = "gateway"
# Ids of windows are made from what they are about, so that one sent twice counts once.
_NAMESPACE = UUID("6f0a1f0e-6d0c-5a57-9d1b-1c5c0e0f7a44")
# Answers of the second's last moment find it still open, so that the hot path seldom has to close one.
_AFTER_THE_SECOND_S = 0.01
_MAX_QUEUED_BYTES = 8 << 20
_MAX_BATCH = 256
_FIRST_BACKOFF_S = 0.2
_LAST_BACKOFF_S = 5.0
_LAST_WORDS_S = 2.0

# Of answers that no version gave.
_NO_VERSION = 0
_MAX_DIGITS = 10
_FIELDS = {
    Outcome.OK: "ok",
    Outcome.CLIENT_ERROR: "client_errors",
    Outcome.SHED: "shed",
    Outcome.TIMEOUT: "timeouts",
    Outcome.SERVER_ERROR: "server_errors",
}

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Reporter:
    """`run` closes every second and sends it, for as long as the gateway lives. `gateway` tells it from others."""

    def __init__(
        self, windows: Windows, producer: Producer, gateway: str, *, max_queued_bytes: int = _MAX_QUEUED_BYTES
    ) -> None:
        self._windows = windows
        self._producer = producer
        self._gateway = gateway
        self._max_queued_bytes = max_queued_bytes
        self._queue: deque[Record] = deque()
        self._filled = asyncio.Event()
        self._dropped = 0
        self.queued_bytes = 0
        self.sent = 0

    @property
    def dropped(self) -> int:
        """Windows that nobody will hear of."""
        return self._dropped + self._windows.dropped

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._close_seconds())
            group.create_task(self._send_for_ever())

    async def close(self) -> None:
        """The last second is told too, if Kafka takes it at once."""
        self._windows.close(int(self._windows.clock()))
        await self.collect()
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                while self._queue:
                    await self._send_batch()
        except (TimeoutError, Unavailable):
            _log.warning("windows are lost: Kafka is away", windows=len(self._queue))
        self._dropped += len(self._queue)
        self._queue.clear()
        await self._producer.close()

    async def _close_seconds(self) -> None:
        while True:
            await asyncio.sleep(1 - self._windows.clock() % 1 + _AFTER_THE_SECOND_S)
            self._windows.roll()
            await self.collect()

    async def collect(self) -> None:
        """What has been closed waits to be sent."""
        closed = self._windows.closed
        while closed:
            self.put(event_of(closed.popleft(), self._gateway))
            await asyncio.sleep(0)  # Many models' windows do not keep requests waiting.

    async def tell(self, events: Sequence[Event]) -> None:
        """They are told too, as windows are."""
        for event in events:
            self.put(event)

    def put(self, event: Event) -> None:
        """The event waits to be sent."""
        try:
            message = envelope.encode(event, _SOURCE)
        except TooLarge:
            self._dropped += 1
            _log.exception("an event is too large to send", type=type(event).__name__)
            return
        headers = [(name, value.encode()) for name, value in message.headers.items()]
        self._queue.append(Record(message.topic, message.key.encode(), message.value, headers))
        self.queued_bytes += len(message.value)
        self._make_room()
        self._filled.set()

    def _make_room(self) -> None:
        """The oldest go first: the monitor waits for none of them any more."""
        while self.queued_bytes > self._max_queued_bytes:
            self.queued_bytes -= _size(self._queue.popleft())
            self._dropped += 1

    async def _send_for_ever(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while True:
            await self._filled.wait()
            try:
                await self._send_batch()
            except Unavailable:
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
            else:
                backoff_s = _FIRST_BACKOFF_S

    async def _send_batch(self) -> None:
        """Some of the queue is stored. What fails is put back, in its place."""
        batch = [self._queue.popleft() for _ in range(min(_MAX_BATCH, len(self._queue)))]
        size = sum(map(_size, batch))
        self.queued_bytes -= size
        try:
            await self._producer.send(batch)
        except BaseException:
            self._queue.extendleft(reversed(batch))
            self.queued_bytes += size
            self._make_room()
            raise
        self.sent += len(batch)
        if not self._queue:
            self._filled.clear()


def _size(record: Record) -> int:
    return len(record.value or b"")


def event_of(closed: Closed, gateway: str) -> InferenceWindow:
    """The window as an event; the same window always gives the same one."""
    ref = closed.ref
    return InferenceWindow(
        id=uuid5(_NAMESPACE, f"{gateway}/{closed.epoch}/{closed.second}/{ref}"),
        at=datetime.fromtimestamp(closed.second + 1, UTC),
        tenant=ref.tenant,
        model=ref.model,
        gateway=gateway,
        epoch=closed.epoch,
        second=closed.second,
        versions=tuple(_versions(closed)),
        shadow=ShadowWindow(**asdict(closed.shadow)) if closed.shadow else None,
        in_flight=closed.in_flight,
    )


def _versions(closed: Closed) -> Iterator[VersionWindow]:
    for forced, cells in ((False, closed.split), (True, closed.forced)):
        by_number = _by_number(cells)
        if not forced and (closed.refused or closed.left):
            by_number.setdefault(_NO_VERSION, Cell())
        for version, cell in sorted(by_number.items()):
            counts = _tally(cell.outcomes(), cell.latency())
            if version == _NO_VERSION and not forced:
                counts["shed"] += closed.refused
                counts["client_errors"] += closed.left
            # Who did not say who they are is judged like everybody: `users` holds all of the traffic or is not there.
            told = bool(cell.users) or (closed.sticky and not forced and version != _NO_VERSION)
            yield VersionWindow(
                version=version,
                pool=closed.pools.get(version, ""),
                forced=forced,
                users=Tally(**_tally(cell.user_outcomes(), cell.user_latency())) if told else None,
                **counts,
            )


def _by_number(cells: Mapping[bytes, Cell]) -> dict[int, Cell]:
    """The cells by version; what names none, or nothing that is one, is together under 0."""
    found: dict[int, Cell] = {}
    unknown = Cell()
    for version, cell in cells.items():
        if version.isdigit() and len(version) < _MAX_DIGITS:
            found[int(version)] = cell
        else:
            unknown.add(cell)
    if unknown.counts:
        unknown.add(found.get(_NO_VERSION, Cell()))
        found[_NO_VERSION] = unknown
    return found


def _tally(outcomes: Mapping[Outcome, int], latency: dict[int, int]) -> dict[str, Any]:
    return {"latency": latency, **{name: outcomes.get(outcome, 0) for outcome, name in _FIELDS.items()}}
