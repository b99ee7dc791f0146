"""One request on an HTTP/2 connection, and what is answered to it."""

from collections import deque
from math import inf
from typing import TYPE_CHECKING, Protocol

from lepton_common.http2_frames import Code
from lepton_common.http2_headers import RequestHead

if TYPE_CHECKING:
    from lepton_common.http2_connection import Connection


class Sink(Protocol):
    """Who takes a request's body."""

    def received(self, data: bytes) -> None:
        """A piece of the body. `Stream.credit` lets the peer send as much again."""

    def ended(self) -> None:
        """The body is whole."""

    def lost(self) -> None:
        """The peer gave the request up, or is gone: nothing more comes, and nothing can be answered."""


class Stream:
    """One request. Its `head` is whole; its body goes to `sink`. Answer with `start`, `send` and `end`, or `reply`."""

    __slots__ = (
        *("_connection", "_ended", "_out", "_owed", "_trailers", "body_deadline", "closed", "head", "id"),
        *("receive_window", "received_bytes", "send_window", "sink", "unsent_bytes", "write_deadline"),
    )

    def __init__(self, connection: "Connection", number: int, head: RequestHead, send_window: int) -> None:
        self._connection = connection
        self._out: deque[memoryview] | None = None  # what flow control holds back, `unsent_bytes` long
        self._trailers: bytes | None = None
        self._owed = 0  # bytes taken from the window of the peer and not given back
        self._ended = False  # by the peer
        self.id = number
        self.head = head
        self.send_window = send_window
        self.receive_window = connection.server.limits.stream_window
        self.received_bytes = 0
        self.unsent_bytes = 0
        self.body_deadline = self.write_deadline = inf  # in the server's time
        self.closed = False
        self.sink: Sink | None = None

    @property
    def peer(self) -> str:
        return self._connection.peer

    def reply(self, head: bytes, body: bytes, trailers: bytes) -> None:
        """The whole answer. `head` and `trailers` are header blocks."""
        if not self.closed:
            self._connection.sender.reply(self, head, body, trailers)

    def start(self, head: bytes) -> None:
        """The answer begins with this header block."""
        if not self.closed:
            self._connection.sender.headers(self.id, head, last=False)

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """The answer goes on. A peer that takes nothing of it for long loses the request."""
        if not self.closed:
            self._connection.sender.send(self, data, None)

    def end(self, trailers: bytes) -> None:
        """The answer ends with this header block."""
        if not self.closed:
            self._connection.sender.send(self, b"", trailers)

    def reset(self, code: Code) -> None:
        """The request is not answered."""
        if not self.closed:
            self._connection.reset(self, code)

    def await_body(self) -> None:
        """From now on the rest of the body has a time to come in, or the peer loses the request."""
        if not self._ended:
            server = self._connection.server
            self.body_deadline = server.now + server.limits.body_timeout_s

    def credit(self, size: int) -> None:
        """The peer may send so many bytes more."""
        if not self.closed and not self._ended:
            self._owed += size
            if self._owed >= self._connection.server.limits.stream_window // 2:
                self._connection.receiver.widen(self, self._owed)
                self._owed = 0
