"""One connection of the HTTP/1.1 client: sends a call, reads its answer, and says to the pool what became of it."""

import asyncio
from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING, cast

import httptools

from lepton_common.http11_call import Call, Failure, UpstreamError
from lepton_common.http11_request import Buffer

if TYPE_CHECKING:
    from lepton_common.http11_client import Upstream

_JOIN_BYTES = 16 << 10  # below, copying is cheaper than another buffer in writev


class AnswerHead:
    """An answer's first part, parsed; shared by all answers that start with the same bytes."""

    __slots__ = ("headers", "keep_alive", "length", "status", "until_close")

    def __init__(self, status: int, headers: dict[bytes, bytes], *, keep_alive: bool) -> None:
        self.status = status
        self.headers = headers
        self.keep_alive = keep_alive
        self.length = int(headers.get(b"content-length", b"-1"))
        self.until_close = self.length < 0 and b"transfer-encoding" not in headers


class ClientConnection(asyncio.Protocol):
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
        self._head: AnswerHead | None = None
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
            self._head = AnswerHead(status, self._headers, keep_alive=self._parser.should_keep_alive())
            self._size = 0

    def on_body(self, body: bytes) -> None:
        self._size += len(body)
        if self._size <= self._pool.limits.max_response_bytes and not self._surplus:
            self._chunks.append(body)

    def on_message_complete(self) -> None:
        self._complete = self._head is not None  # An interim answer has none.

    def _finish(self, head: AnswerHead, body: bytes) -> None:
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
