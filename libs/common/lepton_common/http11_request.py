"""What the HTTP/1.1 server hands over and takes back."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import orjson

Buffer = bytes | bytearray | memoryview

JSON = b"content-type: application/json\r\n"


def error_body(message: str) -> bytes:
    """`{"error": message}`, the one shape of every error on `/v2`."""
    return orjson.dumps({"error": message})


def header_block(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The headers as `respond` takes them: lines, each ended by CRLF."""
    return b"".join(b"%b: %b\r\n" % header for header in headers)


class Head:
    """A request's first part, parsed. Shared by all requests that start with the same bytes, so never changed."""

    __slots__ = ("headers", "keep_alive", "length", "method", "old", "target")

    def __init__(
        self, method: str, target: bytes, headers: dict[bytes, bytes], length: int, *, keep_alive: bool, old: bool
    ) -> None:
        self.method = method
        self.target = target
        self.headers = headers
        self.length = length  # of the body in bytes; -1 when it is chunked
        self.keep_alive = keep_alive
        self.old = old  # HTTP/1.0


class Answerer(Protocol):
    """The connection a request came on."""

    peer: str

    def answer(self, head: Head, status: int, headers: bytes, body: Buffer | Sequence[Buffer]) -> None: ...


class Request:
    """One request, complete. `headers` has lower-case names, repeats joined by ", "; it is shared: never change it."""

    __slots__ = (
        *("_connection", "_head", "answered", "background", "body", "headers", "method", "on_disconnect", "peer"),
        "target",
    )

    def __init__(self, connection: Answerer, head: Head, body: bytes) -> None:
        self._connection: Answerer | None = connection
        self._head = head
        self.method = head.method
        self.target = head.target  # as sent: percent-encoded, with the query
        self.headers = head.headers
        self.body = body
        self.peer = connection.peer
        self.answered = False
        # Work that yields to what callers wait for. Set by who makes the request, never by what a caller sends.
        self.background = False
        # Called when the peer leaves before the answer.
        self.on_disconnect: Callable[[], None] | None = None

    @property
    def path(self) -> str:
        """The target's path, still percent-encoded."""
        return self.target.partition(b"?")[0].decode("ascii")

    @property
    def query(self) -> str:
        return self.target.partition(b"?")[2].decode("ascii")

    def respond(self, status: int, headers: bytes, body: Buffer | Sequence[Buffer] = b"") -> None:
        """Answer, once. `headers` is a block of lines each ended by CRLF, without framing and Date: they are added."""
        if self.answered:
            raise RuntimeError(f"{self.method} {self.target!r} is answered twice")
        self.answered = True
        if self._connection is not None:
            self._connection.answer(self._head, status, headers, body)
