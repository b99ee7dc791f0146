"""HTTP/2's frames and header blocks as bytes (RFC 9113, RFC 7541)."""

from collections.abc import Iterable
from enum import IntEnum
from struct import Struct

from hpack import Decoder, HPACKError
from hpack.table import HeaderTable

from lepton_common.errors import Invalid

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


# What every HTTP/2 peer starts with.
DEFAULT_WINDOW = 65_535
MAX_FRAME_BYTES = 16_384
MAX_WINDOW = 2**31 - 1

# length (high 16 and low 8 bits), type, flags, stream
FRAME_HEAD = Struct(">HBBBI")
_SETTING = Struct(">HI")
_MAX_KNOWN_BLOCKS = 256


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


def settings_of(payload: bytes) -> Iterable[tuple[int, int]]:
    """The pairs of a SETTINGS frame. Raises ConnectionFailed."""
    if len(payload) % _SETTING.size:
        raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "SETTINGS: not a whole number of settings")
    return _SETTING.iter_unpack(payload)


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


def literal(name: bytes, value: bytes) -> bytes:
    """A header as an HPACK literal that changes no table: good on any connection."""
    return b"\x00" + _length(len(name)) + name + _length(len(value)) + value


def _length(number: int) -> bytes:
    """HPACK's integer with a prefix of 7 bits, without Huffman coding."""
    if number < 127:
        return bytes((number,))
    found = bytearray((127,))
    number -= 127
    while number > 127:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


class _Table(HeaderTable):
    """Counts its changes."""

    changes = 0

    def add(self, name: bytes, value: bytes) -> None:
        self.changes += 1
        super().add(name, value)


class RequestHead:
    """A request's headers, checked. Shared by all requests with the same block of bytes, so never changed.

    `headers` has lower-case names, repeats joined by ", ", without the pseudo-headers; `host` is :authority's.
    """

    __slots__ = ("headers", "host", "method", "path")

    def __init__(self, method: bytes, path: bytes, host: bytes, headers: dict[bytes, bytes]) -> None:
        self.method = method
        self.path = path
        self.host = host
        self.headers = headers


class HeaderDecoder:
    """One connection's HPACK state. Blocks that change nothing in it, as all of a client's later requests are, are
    decoded once."""

    def __init__(self, max_bytes: int) -> None:
        self._decoder = Decoder(max_header_list_size=max_bytes)
        self._decoder.header_table = self._table = _Table()
        self._known: dict[bytes, RequestHead] = {}

    def request(self, block: bytes) -> RequestHead:
        """The request's head. Raises ConnectionFailed when it cannot be decoded, Invalid when it is no request's."""
        head = self._known.get(block)
        if head is None:
            changes = self._table.changes
            resizes = block[:1] and 0x20 <= block[0] < 0x40
            head = _request_head(self.fields(block))
            if self._table.changes != changes or resizes:
                self._known.clear()
            else:
                if len(self._known) >= _MAX_KNOWN_BLOCKS:
                    self._known.clear()
                self._known[block] = head
        return head

    def fields(self, block: bytes) -> list[tuple[bytes, bytes]]:
        """Every field in its order. Raises ConnectionFailed."""
        changes = self._table.changes
        try:
            found = [(bytes(name), bytes(value)) for name, value in self._decoder.decode(block, raw=True)]
        except HPACKError as error:
            raise ConnectionFailed(Code.COMPRESSION_ERROR, f"headers: {error}") from None
        if self._table.changes != changes:
            self._known.clear()
        return found


_PSEUDO = (b":method", b":scheme", b":path", b":authority")
_OF_CONNECTIONS = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"))


def _request_head(fields: Iterable[tuple[bytes, bytes]]) -> RequestHead:
    """RFC 9113 §8.2 and §8.3. Raises Invalid."""
    pseudo: dict[bytes, bytes] = {}
    headers: dict[bytes, bytes] = {}
    for name, value in fields:
        if name.startswith(b":"):
            if headers or name in pseudo or name not in _PSEUDO:
                raise Invalid(f"header {name[:80]!r} is out of place")
            pseudo[name] = value
            continue
        if not name or name.lower() != name or name in _OF_CONNECTIONS or any(each in value for each in b"\r\n\0"):
            raise Invalid(f"header {name[:80]!r} is not allowed in HTTP/2")
        if name == b"te" and value != b"trailers":
            raise Invalid("header te: only trailers is allowed in HTTP/2")
        joined = b"; " if name == b"cookie" else b", "
        headers[name] = headers[name] + joined + value if name in headers else value
    for name in _PSEUDO[:3]:
        if not pseudo.get(name):
            raise Invalid(f"header {name.decode()} is missing")
    host = pseudo.get(b":authority", headers.get(b"host", b""))
    return RequestHead(pseudo[b":method"], pseudo[b":path"], host, headers)
