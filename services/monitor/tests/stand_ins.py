"""Gateways that tell of seconds, a clock that is set, and a bus that brings back what it is given."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from lepton_common.bus import E
from lepton_common.envelope import Message
from lepton_common.events import Event, InferenceWindow, ShadowWindow, VersionWindow, WindowClosed, decode
from lepton_common.foreign import Message as ForeignMessage
from lepton_common.sketch import bucket_of

# Some minute's first second, far enough back that it is never ahead of the machine's clock.
START = 1_790_000_040


def window(
    second: int, gateway: str = "a", *versions: VersionWindow, epoch: int = 1, shadow: ShadowWindow | None = None
) -> InferenceWindow:
    """A gateway's window of model `digits`, told when the second is over: one good answer unless other is given."""
    return InferenceWindow(
        at=datetime.fromtimestamp(second + 1, UTC),
        tenant="default",
        model="digits",
        gateway=gateway,
        epoch=epoch,
        second=second,
        versions=versions or (version(1, ok=1),),
        shadow=shadow,
        in_flight=1,
    )


def version(number: int, ms: float = 10, **counts: Any) -> VersionWindow:
    """A version's second; every good answer took so long."""
    latency = {bucket_of(ms / 1e3): counts["ok"]} if counts.get("ok") else {}
    return VersionWindow(version=number, latency=latency, **counts)


def told(events: Iterable[WindowClosed]) -> list[dict[str, Any]]:
    """What the events say, without when they were made."""
    return [event.model_dump(exclude={"at"}) for event in events]


class Clock:
    """Says what it is set to."""

    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def __call__(self) -> datetime:
        return datetime.fromtimestamp(self.now_s, UTC)


class LoopBus:
    """Brings what it is sent to who subscribed, one at a time and in order, and keeps all of it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.came = asyncio.Condition()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._handlers: dict[type[Event], Callable[[Any], Awaitable[None]]] = {}

    def subscribe(self, kind: type[E], handler: Callable[[E], Awaitable[None]]) -> None:
        self._handlers[kind] = handler

    def hear(self, topic: str, handler: Callable[[ForeignMessage], Awaitable[None]]) -> None:
        self.hand_over = handler

    async def run(self) -> None:
        while True:
            event = await self._queue.get()
            if handler := self._handlers.get(type(event)):
                await handler(event)

    async def send(self, messages: Sequence[Message]) -> None:
        await self.tell(*(decode(each.headers["ce_type"], each.value) for each in messages))

    async def tell(self, *events: Event) -> None:
        async with self.came:
            self.events += events
            for event in events:
                self._queue.put_nowait(event)
            self.came.notify_all()

    async def close(self) -> None: ...

    @property
    def closed(self) -> list[WindowClosed]:
        return [event for event in self.events if isinstance(event, WindowClosed)]

    async def until_closed(self, count: int) -> list[WindowClosed]:
        """The first closed windows, as soon as there are so many."""
        async with asyncio.timeout(30), self.came:
            await self.came.wait_for(lambda: len(self.closed) >= count)
        return self.closed[:count]
