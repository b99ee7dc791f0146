"""gRPC on the HTTP/2 server: messages in their five-byte frames, metadata, deadlines and statuses.

Source: grpc/grpc doc/PROTOCOL-HTTP2.md. Requests may be compressed, answers are not.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from urllib.parse import quote

import structlog
from lepton_common.compression import decompress
from lepton_common.errors import Invalid, LeptonError, Overloaded, TooLarge, status_of
from lepton_common.http2 import RequestHead, Sink, Stream, literal
from lepton_common.http11_request import Buffer

PREFIX_BYTES = 5
START = b"\x88" + literal(b"content-type", b"application/grpc")  # :status 200
_LARGEST_AT_ONCE = 4  # messages of the largest size that may be under way together
_JOIN_BYTES = 64 << 10
_MAX_TOLD = 1000  # characters of a status' message
# Those of the connection, those that describe the bytes that came, and what gRPC says in its own way.
_NOT_METADATA = (
    *(b"te", b"content-type", b"content-length", b"content-encoding", b"accept-encoding", b"expect"),
    *(b"inference-header-content-length", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding"),
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


def trailers(status: Status, message: str = "", metadata: bytes = b"") -> bytes:
    """The header block that ends an answer. `metadata` is one, too."""
    return _status_block(status, message[:_MAX_TOLD]) + metadata


@lru_cache(maxsize=256)
def _status_block(status: Status, message: str) -> bytes:
    block = literal(b"grpc-status", b"%d" % status)
    if message:
        block += literal(b"grpc-message", quote(message, safe=" !#$&'()*+,/:;=?@[]{}\"<>|").encode())
    return block


def framed(pieces: Sequence[Buffer]) -> list[Buffer]:
    """The message behind its prefix: in one piece, unless copying it costs more than it saves."""
    size = sum(map(len, pieces))
    prefix = b"\x00" + size.to_bytes(4, "big")
    return [prefix, *pieces] if size > _JOIN_BYTES else [b"".join((prefix, *pieces))]


def size_of(prefix: bytes | bytearray, most: int) -> int:
    """What a message's prefix announces, in bytes. Raises TooLarge."""
    size = int.from_bytes(prefix[1:PREFIX_BYTES], "big")
    if size > most:
        raise TooLarge(f"message: {size} bytes, at most {most} are taken")
    return size


def last_of(error: LeptonError) -> bytes:
    """The trailers of a call that ends with the error."""
    again_s = error.retry_after_s
    metadata = b"" if again_s is None else literal(b"retry-after", b"%d" % math.ceil(again_s))
    return trailers(status_of_http(status_of(error)), error.message, metadata)


class Room:
    """The memory for messages of all calls, from when their bytes come until they are answered: a peer may have a
    thousand calls, and each may be large. `most` is the size of one message."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.free = _LARGEST_AT_ONCE * most
        self._shares: dict[str, Share] = {}

    def of(self, tenant: str) -> "Share":
        """The part of a tenant that there is; "" is nobody's."""
        share = self._shares.get(tenant)
        if share is None:
            share = self._shares[tenant] = Share(self)
        return share


class Share:
    """A tenant's part of the room: at most half. What is only announced takes none of it."""

    __slots__ = ("_left", "_room", "most")

    def __init__(self, room: Room) -> None:
        self._room = room
        self._left = _LARGEST_AT_ONCE * room.most // 2
        self.most = room.most  # the size of one message

    def fits(self, size: int) -> bool:
        return size <= self._left and size <= self._room.free

    def take(self, size: int) -> None:
        """So many bytes have come. Raises Overloaded while others, or the tenant itself, have the room."""
        if not self.fits(size):
            raise Overloaded("there is no room for the message now", retry_after_s=1)
        self._room.free -= size
        self._left -= size

    def give_back(self, size: int) -> None:
        self._room.free += size
        self._left += size


class _Notes:
    """What a request's head says to gRPC. Shared by all calls with the same head, so never changed."""

    __slots__ = ("encoding", "metadata", "timeout_s")

    def __init__(self, head: RequestHead) -> None:
        self.encoding = head.headers.get(b"grpc-encoding", b"identity")
        self.timeout_s = _timeout_s(head.headers.get(b"grpc-timeout"))
        self.metadata = {**head.headers, b"host": head.host}
        for name in _NOT_METADATA:
            self.metadata.pop(name, None)


class Call(Sink, ABC):
    """One call of a method. Subclasses get its messages, and answer it."""

    def __init__(self, stream: Stream, room: Share) -> None:
        self.stream = stream
        self.room = room
        notes = stream.head.notes
        if not isinstance(notes, _Notes):
            notes = stream.head.notes = _Notes(stream.head)
        self._notes = notes
        self.deadline = None if notes.timeout_s is None else time.monotonic() + notes.timeout_s

    def metadata(self) -> dict[bytes, bytes]:
        """What the caller sent beside the messages, as HTTP headers."""
        found = self._notes.metadata.copy()
        if self.deadline is not None:
            left_ms = max(1, round((self.deadline - time.monotonic()) * 1e3))
            asked = found.get(b"x-request-timeout-ms", b"")
            if not asked or (asked.isdigit() and int(asked[:12]) > left_ms):
                found[b"x-request-timeout-ms"] = b"%d" % min(left_ms, 10**11)
        return found

    def message_of(self, compressed: int, data: bytes | bytearray) -> bytes | bytearray:
        """The message, decompressed where the first byte of its prefix says so. Raises Invalid."""
        if not compressed:
            return data
        if compressed != 1 or self._notes.encoding == b"identity":
            raise Invalid("a message says that it is compressed, the metadata do not say how")
        return decompress(data, self._notes.encoding, self.room.most)

    def guarded(self, error: Exception) -> LeptonError:
        """The error as the caller may hear of it."""
        if isinstance(error, LeptonError):
            return error
        _log.error("a call failed", path=self.stream.head.path.decode("latin-1")[:200], exc_info=error)
        return LeptonError("internal error")

    def refuse(self, error: Exception) -> None:
        """The call ends with the error's status."""
        self.finish(last_of(self.guarded(error)))

    def end(self, status: Status, message: str = "", metadata: bytes = b"") -> None:
        """The call ends without another message. Nothing was sent yet."""
        self.finish(trailers(status, message, metadata))

    def finish(self, last: bytes) -> None:
        """As `end`, with these trailers."""
        self.stream.reply(START, b"", last)


class Unary(Call):
    """A call with one message, which `asked` is called with."""

    def __init__(self, stream: Stream, room: Share) -> None:
        super().__init__(stream, room)
        self._body: bytes | bytearray = b""
        self._taken = 0  # of the room
        self._size: int | None = None  # of the message, once it is known
        stream.await_body()

    @abstractmethod
    def asked(self, message: bytes | bytearray) -> None:
        """The message is whole: answer it. What is raised is the answer."""

    def answer(self, message: Sequence[Buffer], metadata: bytes = b"") -> None:
        """The call ends well, with this message."""
        last = trailers(Status.OK, "", metadata)
        pieces = framed(message)
        if len(pieces) == 1:
            self.stream.reply(START, bytes(pieces[0]), last)
        else:
            self.stream.start(START)
            for each in pieces:
                self.stream.send(each)
            self.stream.end(last)
        self.leave()

    def finish(self, last: bytes) -> None:
        super().finish(last)
        self.leave()

    def leave(self) -> None:
        """The room is free again."""
        self.room.give_back(self._taken)
        self._taken = 0
        self._body = b""

    def received(self, data: bytes) -> None:
        if not self._body:
            self._body = data
        elif isinstance(self._body, bytes):
            self._body = bytearray(self._body + data)
        else:
            self._body += data
        try:
            self._take(len(data))
            if self._size is None and len(self._body) >= PREFIX_BYTES:
                self._size = size_of(self._body, self.room.most)
                self.stream.credit(self._size)  # All of it: nobody need wait for leave again and again.
            if len(self._body) > PREFIX_BYTES + (self._size or 0):
                raise Invalid("the body has more than one message")
        except LeptonError as error:
            self.refuse(error)

    def ended(self) -> None:
        body, self._body = self._body, b""
        try:
            if self._size is None or len(body) != PREFIX_BYTES + self._size:
                raise Invalid("the body is not one message")
            compressed = body[0]
            if isinstance(body, bytes):
                body = body[PREFIX_BYTES:]
            else:
                del body[:PREFIX_BYTES]
            if compressed:
                body = self.message_of(compressed, body)
                self._take(max(0, len(body) - self._taken))
            self.asked(body)
        except Exception as error:  # A handler's mistake costs its own call only.
            self.refuse(error)

    def lost(self) -> None:
        self.leave()

    def _take(self, size: int) -> None:
        if size:
            self.room.take(size)
            self._taken += size


class Refusal(Call):
    """A call that cannot be made."""

    def __init__(self, stream: Stream, status: Status, message: str) -> None:
        super().__init__(stream, Share(Room(0)))
        self.end(status, message)

    def received(self, data: bytes) -> None:
        """Not wanted."""

    def ended(self) -> None:
        """Answered already."""

    def lost(self) -> None:
        """Nothing to undo."""


def _timeout_s(header: bytes | None) -> float | None:
    """What a grpc-timeout header means; None without one, or with one that is malformed."""
    if header is None or not header[:-1].isdigit() or len(header) > 9 or header[-1:] not in _TIME_UNITS_S:
        return None
    return int(header[:-1]) * _TIME_UNITS_S[header[-1:]]


def not_grpc(stream: Stream) -> None:
    """What came over HTTP/2 is no gRPC call: 415, as the protocol wants."""
    stream.reply(literal(b":status", b"415"), b"", literal(b"grpc-status", b"%d" % Status.UNKNOWN))
