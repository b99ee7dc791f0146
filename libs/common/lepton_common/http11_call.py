"""What the HTTP/1.1 client takes and hands back."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import StrEnum
from math import inf
from typing import TYPE_CHECKING

from lepton_common.errors import Unavailable
from lepton_common.http11_request import Buffer

if TYPE_CHECKING:
    from lepton_common.http11_client_connection import ClientConnection


class Failure(StrEnum):
    """Why there is no answer."""

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


class Call(ABC):
    """One request on its way. `head` is the request line and headers, each ended by CRLF, without Content-Length."""

    __slots__ = ("_connection", "_done", "_repeated", "body", "deadline", "head")

    def __init__(self, head: bytes, body: Buffer | Sequence[Buffer], deadline: float = inf) -> None:
        self.head = head
        self.body = body
        self.deadline = deadline  # loop time
        self._connection: ClientConnection | None = None
        self._repeated = False
        self._done = False

    @abstractmethod
    def answered(self, status: int, headers: dict[bytes, bytes], body: bytes) -> None:
        """The whole answer is there. Header names are lower-case; the dict is shared: never change it."""

    @abstractmethod
    def failed(self, error: UpstreamError) -> None:
        """There is no answer and none will come."""

    def cancel(self) -> None:
        """The answer is not wanted any more. The connection it would have come on is closed, so the server notices."""
        self._done = True
        if self._connection is not None:
            self._connection.give_up()
