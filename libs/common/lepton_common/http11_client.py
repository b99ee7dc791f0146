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
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from typing import cast

import httptools

from lepton_common.errors import Unavailable
from lepton_common.http11 import Buffer

_SWEEP_S = 0.02  # the grain of deadlines
_JOIN_BYTES = 16 << 10
_MAX_HEADS = 1024


class Failure(StrEnum):
    CONNECT = "connect"  # no connection: refused, unreachable, or not in time
    LOST = "lost"  # the connection ended before the answer did
    TIMEOUT = "timeout"  # the deadline passed
    FULL = "full"  # all connections are busy and too many requests wait
    INVALID = "invalid"  # what came is not HTTP/1.1
    TOO_LARGE = "too large"


class UpstreamError(Unavailable):
    """No answer. `began`: bytes of one had come, so the upstream did work on the request."""

    def __init__(self, failure: Failure, message: str, *, began: bool = False) -> None:
        super().__init__(message)
        self.failure = failure
        self.began = began


@dataclass(frozen=True, slots=True)
class UpstreamLimits:
    """`idle_s` must be shorter than the server's, so that it is this side that closes."""

    max_connections: int = 512
    max_waiting: int = 4096
    max_response_bytes: int = 256 << 20
    max_header_bytes: int = 64 << 10
    connect_timeout_s: float = 2.0
    idle_s: float = 30.0


class Call:
    """One request on its way. `head` is the request line and headers, each ended by CRLF, without Content-Length."""

    __slots__ = ("_connection", "_done", "_repeated", "body", "deadline", "head")

    def __init__(self, head: bytes, body: Buffer | Sequence[Buffer], deadline: float = inf) -> None:
        self.head = head
        self.body = body
        self.deadline = deadline  # loop time
        self._connection: _Connection | None = None
        self._repeated = False
        self._done = False

    def answered(self, status: int, headers: dict[bytes, bytes], body: bytes) -> None:
        """The whole answer is there. Header names are lower-case; the dict is shared: never change it."""
        raise NotImplementedError

    def failed(self, error: UpstreamError) -> None:
        raise NotImplementedError

    def cancel(self) -> None:
        """The answer is not wanted any more. The connection it would have come on is closed, so the server notices."""
        self._done = True
        if self._connection is not None:
            self._connection.give_up()


class _Head:
    """An answer's first part, parsed; shared by all answers that start with the same bytes."""

    __slots__ = ("headers", "keep_alive", "length", "status", "until_close")

    def __init__(self, status: int, headers: dict[bytes, bytes], *, keep_alive: bool) -> None:
        self.status = status
        self.headers = headers
        self.keep_alive = keep_alive
        self.length = int(headers.get(b"content-length", b"-1"))
        self.until_close = self.length < 0 and b"transfer-encoding" not in headers


class _Connection(asyncio.Protocol):
    """One connection: idle, or busy with exactly one call."""

    __slots__ = (
        "_chunks",
        "_complete",
        "_head",
        "_headers",
        "_parser",
        "_pool",
        "_size",
        "_surplus",
        "_transport",
        "began",
        "call",
        "expires",
        "used",
    )

    _transport: asyncio.Transport

    def __init__(self, pool: "Upstream") -> None:
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[bytes, bytes] = {}
        self._head: _Head | None = None
        self._chunks: list[bytes] = []
        self._size = 0  # bytes of the head, then of the body
        self._complete = False
        self._surplus = False  # more came than was asked for
        self.call: Call | None = None
        self.began = False
        self.used = False  # it has brought an answer before
        self.expires = inf

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._pool.opened(self)

    def start(self, call: Call) -> None:
        self.call = call
        self.began = self._complete = self._surplus = False
        self._chunks = []
        self._size = 0
        call._connection = self
        body = call.body
        parts: Sequence[Buffer] = (body,) if isinstance(body, Buffer) else body
        length = len(body) if isinstance(body, Buffer) else sum(map(len, parts))
        head = b"%bcontent-length: %d\r\n\r\n" % (call.head, length)
        if length < _JOIN_BYTES:
            self._transport.write(b"".join((head, *parts)))
        else:
            self._transport.writelines((head, *parts))

    def data_received(self, data: bytes) -> None:
        if self.call is None:
            self._pool.retire(self)  # Nobody asked.
            return
        if self.began:
            self._parse(data)
            return
        self.began = True
        cut = data.find(b"\r\n\r\n") + 4
        head = self._pool.heads.get(data[:cut])
        if head is not None and len(data) - cut == head.length:
            self._finish(head, data[cut:])
            return
        self._head = None
        self._parse(data)

    def eof_received(self) -> None:
        if self.call is None:
            self._pool.retire(self)
        elif self._head is not None and self._head.until_close:
            self._finish(self._head, b"".join(self._chunks))

    def connection_lost(self, exc: Exception | None) -> None:
        del self._parser  # it refers back to this object
        self._pool.lost(self)

    def give_up(self) -> None:
        self.call = None
        self._transport.abort()

    def fail(self, failure: Failure, message: str) -> None:
        """End the call with an error and the connection with it."""
        call, self.call = self.call, None
        self._transport.abort()
        if call is not None:
            self._pool.fail(call, UpstreamError(failure, message, began=self.began))

    def close(self) -> None:
        self._transport.close()

    # --- reading ---

    def _parse(self, data: bytes) -> None:
        limits = self._pool.limits
        starts = self._head is None
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.fail(Failure.INVALID, "the answer upgrades the protocol")
            return
        except httptools.HttpParserError as error:
            self.fail(Failure.INVALID, f"the answer is not HTTP/1.1: {error}")
            return
        head = self._head
        if head is None:
            self._size += len(data)
            if self._size > limits.max_header_bytes:
                self.fail(Failure.TOO_LARGE, f"the answer's headers have more than {limits.max_header_bytes} bytes")
        elif self._size > limits.max_response_bytes:
            self.fail(Failure.TOO_LARGE, f"the answer has more than {limits.max_response_bytes} bytes")
        elif self._complete:
            if starts and not self._surplus:
                self._pool.remember(data, head)
            chunks = self._chunks
            self._finish(head, chunks[0] if len(chunks) == 1 else b"".join(chunks))

    def on_message_begin(self) -> None:
        self._surplus = self._complete
        self._headers = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head is None:
            name = name.lower()
            before = self._headers.get(name)
            self._headers[name] = value if before is None else before + b", " + value

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200 and self._head is None:
            self._head = _Head(status, self._headers, keep_alive=self._parser.should_keep_alive())
            self._size = 0

    def on_body(self, body: bytes) -> None:
        self._size += len(body)
        if self._size <= self._pool.limits.max_response_bytes and not self._surplus:
            self._chunks.append(body)

    def on_message_complete(self) -> None:
        self._complete = self._head is not None  # An interim answer has none.

    def _finish(self, head: _Head, body: bytes) -> None:
        call, self.call = self.call, None
        assert call is not None
        call._connection = None
        call._done = True
        self.used = True
        if head.keep_alive and not self._surplus:
            self._pool.freed(self)
        else:
            self._pool.retire(self)
        call.answered(head.status, head.headers, body)


class Upstream:
    """The connections to one address. All methods are called on the loop's thread."""

    def __init__(self, host: str, port: int, limits: UpstreamLimits | None = None) -> None:
        self.limits = limits or UpstreamLimits()
        self.heads: dict[bytes, _Head] = {}
        self._address = (host, port)
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()
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

    def freed(self, connection: _Connection) -> None:
        while self._waiting:
            call = self._waiting.popleft()
            if not call._done:
                connection.start(call)
                return
        connection.expires = self._now + self.limits.idle_s
        self._idle.append(connection)

    def opened(self, connection: _Connection) -> None:
        self._open.add(connection)
        self.freed(connection)

    def retire(self, connection: _Connection) -> None:
        """Use it no more."""
        if connection in self._idle:
            self._idle.remove(connection)
        connection.close()

    def lost(self, connection: _Connection) -> None:
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

    def remember(self, data: bytes, head: _Head) -> None:
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
            await asyncio.get_running_loop().create_connection(lambda: _Connection(self), *self._address)

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
