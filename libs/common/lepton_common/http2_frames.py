"""HTTP/2's frames as bytes (RFC 9113)."""

from enum import IntEnum
from struct import Struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

# What every HTTP/2 peer starts with.
DEFAULT_WINDOW = 65_535
MAX_FRAME_BYTES = 16_384
MAX_WINDOW = 2**31 - 1

# length (high 16 and low 8 bits), type, flags, stream
FRAME_HEAD = Struct(">HBBBI")
_SETTING = Struct(">HI")


class Kind:
    """Frame types. Plain numbers: an enumeration's members take longer to look up, several times a request."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Flag:
    ACK = 0x1
    END_STREAM = 0x1
    END_HEADERS = 0x4
    PADDED = 0x8
    PRIORITY = 0x20


class Setting(IntEnum):
    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


class Code(IntEnum):
    """Why a stream or connection ends."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class ConnectionFailed(Exception):
    """The peer broke the protocol, so that nothing it sends can be understood any more."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame. `payload` has at most MAX_FRAME_BYTES."""
    length = len(payload)
    return FRAME_HEAD.pack(length >> 8, length & 0xFF, kind, flags, stream) + payload


def settings_frame(settings: dict[Setting, int]) -> bytes:
    return frame(Kind.SETTINGS, 0, 0, b"".join(_SETTING.pack(*each) for each in settings.items()))


def settings_of(payload: bytes) -> dict[int, int]:
    """What a SETTINGS frame says, of repeats the last. Raises ConnectionFailed."""
    if len(payload) % _SETTING.size:
        raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "SETTINGS: not a whole number of settings")
    found = dict(_SETTING.iter_unpack(payload))
    if found.get(Setting.INITIAL_WINDOW_SIZE, 0) > MAX_WINDOW:
        raise ConnectionFailed(Code.FLOW_CONTROL_ERROR, "SETTINGS: a window that is too large")
    if not MAX_FRAME_BYTES <= found.get(Setting.MAX_FRAME_SIZE, MAX_FRAME_BYTES) < 2**24:
        raise ConnectionFailed(Code.PROTOCOL_ERROR, "SETTINGS: a frame size that cannot be")
    if found.get(Setting.ENABLE_PUSH, 0) > 1:
        raise ConnectionFailed(Code.PROTOCOL_ERROR, "SETTINGS: push is on or off")
    return found


def word(payload: bytes, what: str) -> int:
    """The 31 bits that a frame of four bytes holds. Raises ConnectionFailed for another length."""
    if len(payload) != 4:
        raise ConnectionFailed(Code.FRAME_SIZE_ERROR, f"{what}: {len(payload)} bytes, expected 4")
    return int.from_bytes(payload, "big") & MAX_WINDOW


def unpadded(payload: bytes, flags: int) -> bytes:
    """A DATA or HEADERS payload without its padding and priority. Raises ConnectionFailed."""
    start = 0
    stop = len(payload)
    if flags & Flag.PADDED:
        if not payload:
            raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "padding: its length is missing")
        start, stop = 1, stop - payload[0]
    if flags & Flag.PRIORITY:
        start += 5
    if start > stop:
        raise ConnectionFailed(Code.PROTOCOL_ERROR, "padding: longer than its frame")
    return payload[start:stop]


def reset_frame(stream: int, code: Code) -> bytes:
    return frame(Kind.RST_STREAM, 0, stream, code.to_bytes(4, "big"))


def window_frame(stream: int, size: int) -> bytes:
    """The peer may send so many bytes more of the stream, or of all when it is 0."""
    return frame(Kind.WINDOW_UPDATE, 0, stream, size.to_bytes(4, "big"))


def goaway_frame(last: int, code: Code, message: str) -> bytes:
    """Streams above `last` are not looked at."""
    return frame(Kind.GOAWAY, 0, 0, last.to_bytes(4, "big") + code.to_bytes(4, "big") + message.encode()[:200])
