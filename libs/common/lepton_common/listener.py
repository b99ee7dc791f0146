"""What the servers for HTTP/1.1 and for HTTP/2 have in common: an address, its connections, and an end in order."""

import asyncio
from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

_SWEEP_S = 0.1


class Peer(Protocol):
    """One connection."""

    def leave(self) -> None:
        """Close as soon as nothing is in flight."""

    def abort(self) -> None:
        """Close now."""


P = TypeVar("P", bound=Peer)


class Listener(ABC, Generic[P]):
    """Accepts connections until it is drained."""

    def __init__(self) -> None:
        self.connections: set[P] = set()
        self.rejected = 0
        self.draining = False
        self.now = 0.0  # loop time of the last sweep
        self.loop: asyncio.AbstractEventLoop
        self._empty = asyncio.Event()
        self._listener: asyncio.Server | None = None
        self._timer: asyncio.TimerHandle | None = None

    @abstractmethod
    def accept(self) -> asyncio.Protocol:
        """What a new connection talks to."""

    @abstractmethod
    def sweep(self) -> None:
        """The one timer of all connections: looks at their deadlines by `now`, which was just read."""

    async def start(self, host: str, port: int = 0) -> None:
        """Accept connections on host:port; port 0 takes a free one, see `address`."""
        self.loop = asyncio.get_running_loop()
        self._sweep()
        self._listener = await self.loop.create_server(self.accept, host, port, backlog=1024)

    @property
    def address(self) -> tuple[str, int]:
        assert self._listener is not None, "the server is not started"
        host, port = self._listener.sockets[0].getsockname()[:2]
        return str(host), int(port)

    async def drain(self, grace_s: float) -> None:
        """Accept no more, let what is in flight finish within `grace_s`, then close everything."""
        self.draining = True
        if self._listener is not None:
            self._listener.close()
        for connection in tuple(self.connections):
            connection.leave()
        try:
            async with asyncio.timeout(grace_s):
                while self.connections:
                    self._empty.clear()
                    await self._empty.wait()
        except TimeoutError:
            for connection in tuple(self.connections):
                connection.abort()
        if self._timer is not None:
            self._timer.cancel()

    def lost(self, connection: P) -> None:
        self.connections.discard(connection)
        if not self.connections:
            self._empty.set()

    def _sweep(self) -> None:
        self.now = self.loop.time()
        self.sweep()
        self._timer = self.loop.call_later(_SWEEP_S, self._sweep)
