"""One request on an HTTP/2 connection, and what is answered to it."""

from collections import deque
from math import inf
from typing import TYPE_CHECKING, Protocol

from lepton_common.http2_frames import Code, RequestHead

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
        *("_connection", "_ended", "_out", "_owed", "_trailers"),
        *("body_deadline", "closed", "head", "id", "receive_window", "send_window", "sink"),
    )

    def __init__(self, connection: "Connection", number: int, head: RequestHead, send_window: int) -> None:
        self._connection = connection
        self._out: deque[memoryview] | None = None  # what flow control holds back
        self._trailers: bytes | None = None
        self._owed = 0  # bytes taken from the window of the peer and not given back
        self._ended = False  # by the peer
        self.id = number
        self.head = head
        self.send_window = send_window
        self.receive_window = connection.limits.stream_window
        self.body_deadline = inf  # in the server's time: until then there must be a whole body
        self.closed = False
        self.sink: Sink | None = None

    @property
    def peer(self) -> str:
        return self._connection.peer

    def reply(self, head: bytes, body: bytes, trailers: bytes) -> None:
        """The whole answer. `head` and `trailers` are header blocks."""
        if not self.closed:
            self._connection.reply(self, head, body, trailers)

    def start(self, head: bytes) -> None:
        """The answer begins with this header block."""
        if not self.closed:
            self._connection.write_headers(self.id, head, last=False)

    def send(self, data: bytes) -> None:
        """The answer goes on."""
        if not self.closed:
            self._connection.send(self, data, None)

    def end(self, trailers: bytes) -> None:
        """The answer ends with this header block."""
        if not self.closed:
            self._connection.send(self, b"", trailers)

    def reset(self, code: Code) -> None:
        """The request is not answered."""
        if not self.closed:
            self._connection.reset(self, code)

    def credit(self, size: int) -> None:
        """The peer may send so many bytes more."""
        if not self.closed and not self._ended:
            self._owed += size
            if self._owed >= self._connection.limits.stream_window // 2:
                self._connection.widen(self, self._owed)
                self._owed = 0

    @property
    def unsent_bytes(self) -> int:
        """What flow control holds back of the answer."""
        return 0 if self._out is None else sum(map(len, self._out))
