"""One peer of the HTTP/1.1 server: reads requests, hands them over one at a time, writes their answers in order."""

import asyncio
from collections import deque
from collections.abc import Sequence
from http import HTTPStatus
from math import inf
from typing import TYPE_CHECKING, cast

import httptools

from lepton_common.http11_body import JOIN_BYTES, SMALL_BYTES, Body, Refused
from lepton_common.http11_request import JSON, Buffer, Head, Request, error_body

if TYPE_CHECKING:
    from lepton_common.http11 import Server

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_STATUS_LINES = {status: b"HTTP/1.1 %d \r\n" % status for status in range(200, 600)}
_STATUS_LINES.update({int(each): f"HTTP/1.1 {int(each)} {each.phrase}\r\n".encode() for each in HTTPStatus})
_LINGER_S = 2.0  # how long a peer that is still sending may take to read the last answer

# Where the bytes being read belong.
_BETWEEN, _HEAD, _BODY, _DEAF = range(4)

_REFUSED_HEAD = Head("", b"", {}, 0, keep_alive=False, old=False)


class Connection(asyncio.Protocol):
    """One peer. Requests are handed over one at a time, in order; the next ones wait in `queue`."""

    __slots__ = (
        "_body",
        "_continue_owed",
        "_count",
        "_half_closed",
        "_head",
        "_headers",
        "_parser",
        "_phase",
        "_progress",
        "_pumping",
        "_queue",
        "_reading",
        "_rejection",
        "_server",
        "_size",
        "_stalled",
        "_target",
        "_transport",
        "_unsent",
        "_writable",
        "current",
        "deadline",
        "peer",
    )

    _transport: asyncio.Transport

    def __init__(self, server: "Server") -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._phase = _BETWEEN
        self._head: Head | None = None
        self._headers: dict[bytes, bytes] = {}
        self._target = b""
        self._body = Body(server.room)
        self._size = 0  # bytes of target and headers
        self._count = 0  # of headers
        self._stalled = 0  # bytes read since the message last got anywhere
        self._progress = False
        self._queue: deque[Request] = deque()
        self._pumping = False
        self._reading = True
        self._writable = True
        self._unsent = 0
        self._half_closed = False
        self._continue_owed = False
        self._rejection: Refused | None = None
        self.current: Request | None = None
        self.deadline = inf
        self.peer = ""

    # --- the transport's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self.peer = str((transport.get_extra_info("peername") or ("",))[0])
        self._server.connections.add(self)
        self.deadline = self._server.now + self._server.limits.idle_timeout_s

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.lost(self)
        self._phase = _DEAF
        self._forget()
        left, self.current = self.current, None
        del self._parser  # it refers back to this object
        if left is not None:
            left._connection = None
            self._server.room.give_back(left)
            if left.on_disconnect is not None:
                left.on_disconnect()

    def eof_received(self) -> bool:
        """Keep the connection of a peer that only said it has nothing more to send."""
        if self.current is None and not self._queue:
            return False
        self._phase = _DEAF
        self._half_closed = True
        self._body.drop()
        self.probe()
        return True

    def pause_writing(self) -> None:
        self._writable = False
        self._unsent = self._transport.get_write_buffer_size()
        self.deadline = self._server.now + self._server.limits.write_timeout_s

    def resume_writing(self) -> None:
        self._writable = True
        if self._phase == _BETWEEN:
            self.deadline = self._server.now + self._server.limits.idle_timeout_s
        self._pump()

    def data_received(self, data: bytes) -> None:
        if self._phase == _BETWEEN:
            cut = data.find(b"\r\n\r\n") + 4
            head = self._server.heads.get(data[:cut])
            if head is not None and len(data) - cut == head.length:
                self._arrived(Request(self, head, data[cut:]))
                return
        elif self._phase == _DEAF:
            return
        self._parse(data)

    # --- reading ---

    def _parse(self, data: bytes) -> None:
        starts = self._phase == _BETWEEN
        if starts:
            self._head = None
        self._progress = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            if not isinstance(error.__context__, Refused):
                raise
            self._reject(error.__context__)
        except httptools.HttpParserError as error:
            self._reject(Refused(400, f"not HTTP/1.1: {error}"))
        else:
            self._stalled = 0 if self._progress else self._stalled + len(data)
            if self._stalled > self._server.limits.max_header_bytes:
                self._reject(Refused(431, f"headers: more than {self._server.limits.max_header_bytes} bytes"))
            elif starts and self._head is not None:
                self._server.remember(data, self._head)

    def on_message_begin(self) -> None:
        self._phase = _HEAD
        self._target = b""
        self._headers = {}
        self._size = 0
        self._count = 0
        self.deadline = self._server.now + self._server.limits.header_timeout_s

    def on_url(self, url: bytes) -> None:
        self._size += len(url)
        if self._size > self._server.limits.max_header_bytes:
            raise Refused(414, f"request target: more than {self._server.limits.max_header_bytes} bytes")
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._phase != _HEAD:
            return  # A trailer. It must not change what was decided on the head.
        self._size += len(name) + len(value)
        if self._size > self._server.limits.max_header_bytes:
            raise Refused(431, f"headers: more than {self._server.limits.max_header_bytes} bytes")
        self._count += 1
        if self._count > self._server.limits.max_headers:
            raise Refused(431, f"headers: more than {self._server.limits.max_headers}")
        name = name.lower()
        if name in self._headers:
            if name == b"host":
                raise Refused(400, "header host: more than one")
            value = self._headers[name] + b", " + value
        self._headers[name] = value.rstrip(b" \t")

    def on_headers_complete(self) -> None:
        limits, headers = self._server.limits, self._headers
        version = self._parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise Refused(505, f"HTTP/{version} is not spoken here, HTTP/1.1 is")
        if self._parser.should_upgrade():
            raise Refused(400, "upgrading the protocol is not supported")
        if version == "1.1" and b"host" not in headers:
            raise Refused(400, "header host: missing")
        length = int(headers.get(b"content-length", b"0"))
        if b"transfer-encoding" in headers:
            length = -1
            if version == "1.0" or headers[b"transfer-encoding"].lower() != b"chunked":
                raise Refused(400, "header transfer-encoding: only chunked is understood, and in HTTP/1.1 only")
        if length > limits.max_body_bytes:
            raise Refused(413, f"body: {length} bytes, at most {limits.max_body_bytes} are taken")
        self._head = Head(
            self._parser.get_method().decode("ascii"),
            self._target,
            headers,
            length,
            keep_alive=self._parser.should_keep_alive(),
            old=version == "1.0",
        )
        if length > SMALL_BYTES:
            self._screen(self._head)
            self._server.room.check(length)
        if version == "1.1" and b"expect" in headers:
            self._expected(headers[b"expect"])
        self._phase = _BODY
        self._progress = True
        self.deadline = self._server.now + limits.body_timeout_s

    def _screen(self, head: Head) -> None:
        if self._server.screen is not None:
            self._server.screen(head, self.peer)

    def _expected(self, expectation: bytes) -> None:
        if expectation.lower() != b"100-continue":
            raise Refused(417, "header expect: only 100-continue is understood")
        if self.current is None and not self._queue:
            self._transport.write(_CONTINUE)
        else:
            self._continue_owed = True  # It may not overtake the answers before it.

    def on_body(self, body: bytes) -> None:
        if self._body.size + len(body) > self._server.limits.max_body_bytes:
            raise Refused(413, f"body: more than the {self._server.limits.max_body_bytes} bytes that are taken")
        assert self._head is not None
        if self._head.length < 0 and self._body.size <= SMALL_BYTES < self._body.size + len(body):
            self._screen(self._head)
        self._body.add(body)
        self._progress = True

    def on_message_complete(self) -> None:
        assert self._head is not None
        self._phase = _BETWEEN
        self._continue_owed = False
        self._arrived(Request(self, self._head, self._body.whole()))

    def _arrived(self, request: Request) -> None:
        if not request._head.keep_alive:
            self._phase = _DEAF
        if self.current is None and self._writable:
            self._dispatch(request)
            return
        if self.current is not None:
            self.deadline = inf
        self._queue.append(request)
        if self._reading and len(self._queue) >= self._server.limits.max_pipelined:
            self._reading = False
            self._transport.pause_reading()

    def _reject(self, refused: Refused) -> None:
        """Read no further. The refusal is answered after the requests before it."""
        if self._phase != _DEAF:
            self._phase = _DEAF
            self._rejection = refused
            self._body.drop()
            self._pump()

    # --- answering ---

    def _dispatch(self, request: Request) -> None:
        self.current = request
        if self._phase in (_BETWEEN, _DEAF):
            self.deadline = inf  # From here the handler keeps the time.
        try:
            self._server.handler(request)
        except Exception as error:  # A handler's mistake costs its own request only.
            self._server.failed(request, error)

    def answer(self, head: Head, status: int, headers: bytes, body: Buffer | Sequence[Buffer]) -> None:
        """Write the answer to the current request and go on with the next, or close."""
        server = self._server
        parts: Sequence[Buffer] = (body,) if isinstance(body, Buffer) else body
        length = len(body) if isinstance(body, Buffer) else sum(map(len, parts))
        last = not head.keep_alive or ((server.draining or self._half_closed) and not self._queue)
        if last:
            headers += b"connection: close\r\n"
        elif head.old:
            headers += b"connection: keep-alive\r\n"
        first = b"%b%b%bcontent-length: %d\r\n\r\n" % (_STATUS_LINES[status], server.date, headers, length)
        if self.current is not None:
            server.room.give_back(self.current)
            self.current = None
        if self._phase == _BETWEEN:
            self.deadline = server.now + server.limits.idle_timeout_s
        if head.method == "HEAD":
            self._transport.write(first)
        elif length < JOIN_BYTES:
            self._transport.write(b"".join((first, *parts)))
        else:
            self._transport.writelines((first, *parts))
        if last:
            self._close()
        elif self._queue or self._rejection is not None or self._continue_owed:
            self._pump()

    def _pump(self) -> None:
        """Hand over what waits, as far as answers come at once; then say what had to wait for them."""
        if self._pumping:
            return
        self._pumping = True
        while self._queue and self.current is None and self._writable:
            request = self._queue.popleft()
            if not self._reading:
                self._reading = True
                self._transport.resume_reading()
            self._dispatch(request)
        self._pumping = False
        if self.current is not None or self._queue:
            return
        if self._rejection is not None:
            refused, self._rejection = self._rejection, None
            self._server.rejected += 1
            self.answer(_REFUSED_HEAD, refused.status, JSON + refused.headers, error_body(str(refused)))
        elif self._continue_owed:
            self._continue_owed = False
            self._transport.write(_CONTINUE)

    def _close(self) -> None:
        """Say that nothing more comes and wait for the peer to close: closing first could destroy the last answer."""
        self._phase = _DEAF
        self._forget()
        if not self._reading:
            self._transport.resume_reading()
        self._unsent = self._transport.get_write_buffer_size()
        self.deadline = self._server.now + (self._server.limits.write_timeout_s if self._unsent else _LINGER_S)
        if self._half_closed or not self._transport.can_write_eof():
            self._transport.close()
        else:
            self._transport.write_eof()

    def _forget(self) -> None:
        """What came and was not handed over never will be."""
        self._body.drop()
        for waiting in self._queue:
            waiting._connection = None
            self._server.room.give_back(waiting)
        self._queue.clear()

    # --- the server's side ---

    def probe(self) -> None:
        """Find out whether a peer that sends no more still listens: it skips an interim answer, or resets."""
        if self._half_closed and self.current is not None and not self.current._head.old:
            self._transport.write(_CONTINUE)

    def expire(self) -> None:
        """The deadline passed: of reading a request, of writing an answer, or of doing nothing."""
        unsent = self._transport.get_write_buffer_size()
        if 0 < unsent < self._unsent:
            self._unsent = unsent
            self.deadline = self._server.now + self._server.limits.write_timeout_s
        elif self._phase in (_HEAD, _BODY) and self._writable:
            self.deadline = inf
            self._reject(Refused(408, "the request did not arrive in time"))
        elif self._phase == _BETWEEN and self._writable:
            self._transport.close()
        else:
            self._transport.abort()

    def leave(self) -> None:
        """Close as soon as nothing is in flight: the server drains."""
        if self.current is None and not self._queue and self._phase == _BETWEEN:
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()
