"""Requests that did not come over HTTP, asked of the gateway as the HTTP requests that mean the same."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import orjson
from lepton_common.http11_request import Buffer, Head, Request

Handle = Callable[[Request], None]

_ID = b"\r\nx-request-id: "


class Answer:
    """What the gateway says to one request, as HTTP says it; `then` is called with it once it is there."""

    __slots__ = ("_then", "body", "headers", "peer", "status")

    def __init__(self, peer: str, then: "Callable[[Answer], None]") -> None:
        self.peer = peer
        self._then: Callable[[Answer], None] | None = then
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""

    def answer(self, head: Head, status: int, headers: bytes, body: Buffer | Sequence[Buffer]) -> None:
        """See `http11_request.Answerer`."""
        self.status = status
        # What stands before the request's own id is the same for many.
        usual, _, own = headers.partition(_ID)
        self.headers = _headers_of(usual).copy()
        if own:
            identity, _, rest = own.partition(b"\r\n")
            self.headers[b"x-request-id"] = identity
            if rest:
                self.headers |= _headers_of.__wrapped__(rest)
        self.body = bytes(body) if isinstance(body, Buffer) else b"".join(body)
        then, self._then = self._then, None  # It leads back to here: both bodies would be garbage in a cycle.
        if then is not None:
            then(self)

    @property
    def error(self) -> str:
        """The message of an answer whose status is not 200."""
        try:
            return str(orjson.loads(self.body)["error"])
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return "no reason given"


@lru_cache(maxsize=1024)
def _headers_of(lines: bytes) -> dict[bytes, bytes]:
    """Never to be changed."""
    return {name: value for name, _, value in (line.partition(b": ") for line in lines.split(b"\r\n") if line)}


def request(
    method: str, target: bytes, headers: dict[bytes, bytes], body: bytes, then: Callable[[Answer], None], peer: str = ""
) -> Request:
    """The request, not yet handled. Header names are in lower case. Without a peer it came from no machine we know."""
    head = Head(method, target, headers, len(body), keep_alive=True, old=False)
    return Request(Answer(peer, then), head, body)
