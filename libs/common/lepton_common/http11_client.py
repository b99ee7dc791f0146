"""The hot path's HTTP/1.1 client: kept-alive connections to one address, callbacks instead of futures.

    class Infer(Call):                             # one request; the subclass says what happens with its answer
        __slots__ = ()
        def answered(self, status, headers, body): ...
        def failed(self, error): ...

    upstream = Upstream("127.0.0.1", 9000)
    upstream.send(Infer(head, body, deadline))     # exactly one of the two is called, unless call.cancel() came first
    await upstream.close()

A request that meets a connection which the peer closed while it was idle is sent once more on a fresh one: send only
requests that may be repeated. HEAD is not sent; servers answer GET and leave the body out themselves.
"""

import asyncio
from collections import deque
from dataclasses import dataclass

from lepton_common.http11_call import Call, Failure, UpstreamError
from lepton_common.http11_client_connection import AnswerHead, ClientConnection

__all__ = ["Call", "Failure", "Upstream", "UpstreamError", "UpstreamLimits"]

_SWEEP_S = 0.02  # the grain of deadlines
_MAX_HEADS = 1024


@dataclass(frozen=True, slots=True)
class UpstreamLimits:
    """`idle_s` must be shorter than the server's, so that it is this side that closes."""

    max_connections: int = 512
    max_waiting: int = 4096
    max_response_bytes: int = 257 << 20
    max_header_bytes: int = 64 << 10
    connect_timeout_s: float = 2.0
    idle_s: float = 30.0


class Upstream:
    """The connections to one address. All methods are called on the loop's thread."""

    def __init__(self, host: str, port: int, limits: UpstreamLimits | None = None) -> None:
        self.limits = limits or UpstreamLimits()
        self.heads: dict[bytes, AnswerHead] = {}
        self._address = (host, port)
        self._idle: list[ClientConnection] = []
        self._open: set[ClientConnection] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._waiting: deque[Call] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._now = 0.0  # loop time of the last sweep

    def send(self, call: Call) -> None:
        """Send it on an idle connection, or a new one, or as soon as one is free. A call that failed may come again."""
        call._done = call._repeated = False
        if self._idle:
            self._idle.pop().start(call)
        elif len(self._waiting) < self.limits.max_waiting:
            self._waiting.append(call)
            self._connect()
        else:
            call._done = True
            call.failed(UpstreamError(Failure.FULL, "too many requests wait for a connection"))

    async def close(self) -> None:
        """Close every connection; calls still under way fail."""
        for task in self._connecting:
            task.cancel()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        while self._waiting:
            self.fail(self._waiting.popleft(), UpstreamError(Failure.CONNECT, "the client was closed"))
        for connection in tuple(self._open):
            connection.fail(Failure.LOST, "the client was closed")
        if self._timer is not None:
            self._timer.cancel()

    # --- the connections' side ---

    def freed(self, connection: ClientConnection) -> None:
        while self._waiting:
            call = self._waiting.popleft()
            if not call._done:
                connection.start(call)
                return
        connection.expires = self._now + self.limits.idle_s
        self._idle.append(connection)

    def opened(self, connection: ClientConnection) -> None:
        self._open.add(connection)
        self.freed(connection)

    def retire(self, connection: ClientConnection) -> None:
        """Use it no more."""
        if connection in self._idle:
            self._idle.remove(connection)
        connection.close()

    def lost(self, connection: ClientConnection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if connection.call is None:
            self._connect()
            return
        call, connection.call = connection.call, None
        call._connection = None
        if connection.used and not connection.began and not call._repeated:
            call._repeated = True
            self._waiting.appendleft(call)
            self._connect()
        else:
            self.fail(call, UpstreamError(Failure.LOST, "the connection was lost", began=connection.began))

    def fail(self, call: Call, error: UpstreamError) -> None:
        if not call._done:
            call._done = True
            call._connection = None
            call.failed(error)

    def remember(self, data: bytes, head: AnswerHead) -> None:
        """Keep the parsed head when `data` was exactly that head and the body it announced."""
        cut = data.find(b"\r\n\r\n") + 4
        if len(data) - cut == head.length:
            if len(self.heads) >= _MAX_HEADS:
                self.heads.clear()
            self.heads[data[:cut]] = head

    # --- connecting ---

    def _connect(self) -> None:
        """Open connections for the calls that wait, as far as the limit allows."""
        loop = asyncio.get_running_loop()
        while len(self._connecting) < min(len(self._waiting), self.limits.max_connections - len(self._open)):
            task = loop.create_task(self._open_one())
            self._connecting.add(task)
            task.add_done_callback(self._connected)
        if self._timer is None:
            self._sweep()

    async def _open_one(self) -> None:
        async with asyncio.timeout(self.limits.connect_timeout_s):
            await asyncio.get_running_loop().create_connection(lambda: ClientConnection(self), *self._address)

    def _connected(self, task: asyncio.Task[None]) -> None:
        self._connecting.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            reason = "timed out" if isinstance(error, TimeoutError) else "failed"
            waiting = next((call for call in self._waiting if not call._done), None)
            if waiting is not None:
                self._waiting.remove(waiting)
                self.fail(waiting, UpstreamError(Failure.CONNECT, f"connecting {reason}"))
        self._connect()

    def _sweep(self) -> None:
        """The one timer: deadlines of calls, and connections that were idle for long."""
        loop = asyncio.get_running_loop()
        self._now = loop.time()
        self._timer = loop.call_later(_SWEEP_S, self._sweep)
        for connection in tuple(self._open):
            if connection.call is None:
                if connection.expires <= self._now:
                    self.retire(connection)
            elif connection.call.deadline <= self._now:
                connection.fail(Failure.TIMEOUT, "no answer within the deadline")
        for call in tuple(self._waiting):
            if call._done or call.deadline <= self._now:
                self._waiting.remove(call)
                self.fail(call, UpstreamError(Failure.TIMEOUT, "no connection within the deadline"))
        if not (self._open or self._waiting or self._connecting):
            self._timer.cancel()
            self._timer = None
