"""HTTP/2's header blocks as bytes, and what makes one a request's (RFC 7541, RFC 9113 §8)."""

import re
from collections.abc import Iterable

from hpack import Decoder, HPACKError
from hpack.table import HeaderTable

from lepton_common.errors import Invalid, TooLarge
from lepton_common.http2_frames import Code, ConnectionFailed

# Heads that are kept decoded: so many of so many bytes a connection at most.
_MAX_KNOWN_BLOCKS = 256
_MAX_KNOWN_BYTES = 4096
_FIELD_BYTES = 32  # that each field counts beside its name and value

_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_NO_VALUE = re.compile(rb"[\0\r\n]|^[ \t]|[ \t]$")
_PSEUDO = (b":method", b":scheme", b":path", b":authority")
_OF_CONNECTIONS = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"))


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

    `headers` has lower-case names, repeats joined by ", ", without the pseudo-headers; `host` is :authority's, `length`
    is content-length's, or -1.
    """

    __slots__ = ("headers", "host", "length", "method", "path")

    def __init__(self, pseudo: dict[bytes, bytes], headers: dict[bytes, bytes]) -> None:
        """Raises Invalid when something is missing."""
        for name in _PSEUDO[:3]:
            if not pseudo.get(name):
                raise Invalid(f"header {name.decode()} is missing")
        length = headers.get(b"content-length", b"-1")
        if length != b"-1" and not (length.isdigit() and len(length) < 20):
            raise Invalid("header content-length is not a number")
        self.method = pseudo[b":method"]
        self.path = pseudo[b":path"]
        self.host = pseudo.get(b":authority", headers.get(b"host", b""))
        self.length = int(length)
        self.headers = headers


class HeaderDecoder:
    """One connection's HPACK state. Blocks that change nothing in it, as all of a client's later requests are, are
    decoded once.

    Requests may have `max_bytes` of headers. Blocks of up to twice as much are decoded all the same: the state must be
    kept, or one caller behind a proxy would end the connection of all.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._decoder = Decoder(max_header_list_size=2 * max_bytes)
        self._decoder.header_table = self._table = _Table()
        self._known: dict[bytes, RequestHead] = {}

    def request(self, block: bytes) -> RequestHead:
        """The request's head. Raises ConnectionFailed when it cannot be decoded, Invalid when it is no request's,
        TooLarge."""
        head = self._known.get(block)
        if head is None:
            changes = self._table.changes
            fields = self.fields(block)
            size = sum(len(name) + len(value) + _FIELD_BYTES for name, value in fields)
            if size > self._max_bytes:
                raise TooLarge(f"headers: {size} bytes, at most {self._max_bytes} are taken")
            head = _request_head(fields)
            if self._table.changes == changes and size <= _MAX_KNOWN_BYTES:
                if len(self._known) >= _MAX_KNOWN_BLOCKS:
                    self._known.clear()
                self._known[block] = head
        return head

    def fields(self, block: bytes) -> list[tuple[bytes, bytes]]:
        """Every field in its order. Raises ConnectionFailed."""
        changes = self._table.changes
        if block and 0x20 <= block[0] < 0x40:
            self._table.changes += 1  # a new size of the table
        try:
            found = [(bytes(name), bytes(value)) for name, value in self._decoder.decode(block, raw=True)]
        except HPACKError as error:
            # Not the library's own words: they quote the block, keys and all.
            raise ConnectionFailed(Code.COMPRESSION_ERROR, f"headers: {type(error).__name__}") from None
        if self._table.changes != changes:
            self._known.clear()
        return found


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
        if not _NAME.fullmatch(name) or name in _OF_CONNECTIONS or _NO_VALUE.search(value):
            raise Invalid(f"header {name[:80]!r} is not allowed in HTTP/2")
        if name == b"te" and value != b"trailers":
            raise Invalid("header te: only trailers is allowed in HTTP/2")
        joined = b"; " if name == b"cookie" else b", "
        headers[name] = headers[name] + joined + value if name in headers else value
    return RequestHead(pseudo, headers)
