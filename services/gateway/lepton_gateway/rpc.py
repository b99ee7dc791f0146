"""gRPC on the HTTP/2 server: messages in their five-byte frames, metadata, deadlines and statuses.

Source: grpc/grpc doc/PROTOCOL-HTTP2.md. Requests may be compressed, answers are not.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from enum import IntEnum
from functools import lru_cache
from urllib.parse import quote

import structlog
from lepton_common.compression import decompress
from lepton_common.errors import Invalid, LeptonError, TooLarge, status_of
from lepton_common.http2 import Sink, Stream, literal

PREFIX_BYTES = 5
START = b"\x88" + literal(b"content-type", b"application/grpc")  # :status 200
_MAX_TOLD = 1000  # characters of a status' message
# Those of the connection, those that describe the bytes that came, and what gRPC says in its own way.
_NOT_METADATA = frozenset(
    (
        *(b"te", b"content-type", b"content-length", b"content-encoding", b"accept-encoding", b"host", b"expect"),
        *(b"inference-header-content-length", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding"),
    )
)
_TIME_UNITS_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Status(IntEnum):
    """gRPC's status codes."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


_STATUS_OF_HTTP = {
    200: Status.OK,
    400: Status.INVALID_ARGUMENT,
    401: Status.UNAUTHENTICATED,
    403: Status.PERMISSION_DENIED,
    404: Status.NOT_FOUND,
    405: Status.UNIMPLEMENTED,
    409: Status.FAILED_PRECONDITION,
    413: Status.RESOURCE_EXHAUSTED,
    415: Status.UNIMPLEMENTED,
    429: Status.RESOURCE_EXHAUSTED,
    501: Status.UNIMPLEMENTED,
    502: Status.UNAVAILABLE,
    503: Status.UNAVAILABLE,
    504: Status.DEADLINE_EXCEEDED,
}


def status_of_http(status: int) -> Status:
    """The gRPC status that says the same as an HTTP status."""
    return _STATUS_OF_HTTP.get(status, Status.INTERNAL)


@lru_cache(maxsize=256)
def trailers(status: Status, message: str = "", metadata: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    """The header block that ends an answer."""
    block = literal(b"grpc-status", b"%d" % status)
    if message:
        block += literal(b"grpc-message", quote(message[:_MAX_TOLD], safe=" !#$&'()*+,/:;=?@[]{}\"<>|").encode())
    return block + b"".join(literal(*each) for each in metadata)


def framed(message: bytes) -> bytes:
    """The message behind its prefix."""
    return b"\x00" + len(message).to_bytes(4, "big") + message


class Call(Sink, ABC):
    """One call of a method. Subclasses get its messages, and answer it."""

    def __init__(self, stream: Stream, max_message_bytes: int) -> None:
        self.stream = stream
        self.max_message_bytes = max_message_bytes
        self.encoding = stream.head.headers.get(b"grpc-encoding", b"identity")
        self.deadline = _deadline(stream.head.headers.get(b"grpc-timeout"))

    def metadata(self) -> dict[bytes, bytes]:
        """What the caller sent beside the messages, as HTTP headers. Raises DeadlineExceeded when the time is up."""
        found = {
            name: value
            for name, value in self.stream.head.headers.items()
            if name not in _NOT_METADATA and not name.endswith(b"-bin")
        }
        found[b"host"] = self.stream.head.host
        if self.deadline is not None:
            left_ms = max(1, round((self.deadline - time.monotonic()) * 1e3))
            asked = found.get(b"x-request-timeout-ms", b"")
            if not asked or (asked.isdigit() and int(asked[:12]) > left_ms):
                found[b"x-request-timeout-ms"] = b"%d" % min(left_ms, 10**11)
        return found

    def message_of(self, prefix: bytes, data: bytes) -> bytes:
        """The message, decompressed where it says so. Raises Invalid."""
        if prefix[0] == 0:
            return data
        if prefix[0] != 1 or self.encoding == b"identity":
            raise Invalid("a message says that it is compressed, the metadata do not say how")
        return bytes(decompress(data, self.encoding, self.max_message_bytes))

    def check_size(self, prefix: bytes) -> int:
        """The length of the message behind the prefix. Raises TooLarge."""
        size = int.from_bytes(prefix[1:], "big")
        if size > self.max_message_bytes:
            raise TooLarge(f"message: {size} bytes, at most {self.max_message_bytes} are taken")
        return size

    def guarded(self, error: Exception) -> LeptonError:
        """The error as the caller may hear of it."""
        if isinstance(error, LeptonError):
            return error
        _log.error("a call failed", path=self.stream.head.path.decode("latin-1")[:200], exc_info=error)
        return LeptonError("internal error")

    def refuse(self, error: Exception) -> None:
        """The call ends with the error's status."""
        told = self.guarded(error)
        self.end(status_of_http(status_of(told)), told.message)

    def end(self, status: Status, message: str = "", metadata: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """The call ends without another message. Nothing was sent yet."""
        self.stream.reply(START, b"", trailers(status, message, tuple(metadata)))


class Unary(Call):
    """A call with one message, which `asked` is called with."""

    def __init__(self, stream: Stream, max_message_bytes: int) -> None:
        super().__init__(stream, max_message_bytes)
        self._chunks: list[bytes] = []
        self._size = 0

    @abstractmethod
    def asked(self, message: bytes) -> None:
        """The message is whole: answer it. What is raised is the answer."""

    def answer(self, message: bytes, metadata: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """The call ends well, with this message."""
        self.stream.reply(START, framed(message), trailers(Status.OK, "", tuple(metadata)))

    def received(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self.max_message_bytes + PREFIX_BYTES:
            self.refuse(TooLarge(f"message: more than the {self.max_message_bytes} bytes that are taken"))
            return
        self._chunks.append(data)
        self.stream.credit(len(data))

    def ended(self) -> None:
        body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        try:
            if len(body) < PREFIX_BYTES or int.from_bytes(body[1:PREFIX_BYTES], "big") != len(body) - PREFIX_BYTES:
                raise Invalid("the body is not one message")
            self.asked(self.message_of(body[:PREFIX_BYTES], body[PREFIX_BYTES:]))
        except Exception as error:  # A handler's mistake costs its own call only.
            self.refuse(error)

    def lost(self) -> None:
        """Nothing to undo."""


class Refusal(Call):
    """A call that cannot be made."""

    def __init__(self, stream: Stream, status: Status, message: str) -> None:
        super().__init__(stream, 0)
        self.end(status, message)

    def received(self, data: bytes) -> None:
        """Not wanted."""

    def ended(self) -> None:
        """Answered already."""

    def lost(self) -> None:
        """Nothing to undo."""


def _deadline(timeout: bytes | None) -> float | None:
    """The monotonic time that a grpc-timeout header means; None without one, or with one that is malformed."""
    if timeout is None or not timeout[:-1].isdigit() or len(timeout) > 9 or timeout[-1:] not in _TIME_UNITS_S:
        return None
    return time.monotonic() + int(timeout[:-1]) * _TIME_UNITS_S[timeout[-1:]]


def not_grpc(stream: Stream) -> None:
    """What came over HTTP/2 is no gRPC call: 415, as the protocol wants."""
    stream.reply(literal(b":status", b"415"), b"", literal(b"grpc-status", b"%d" % Status.UNKNOWN))
