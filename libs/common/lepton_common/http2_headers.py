"""HTTP/2's header blocks as bytes, and what makes one a request's (RFC 7541, RFC 9113 §8)."""

import re
from collections.abc import Iterable
from functools import lru_cache

from lepton_common.errors import Invalid, TooLarge
from lepton_common.http2_frames import Code, ConnectionFailed
from lepton_common.http2_hpack import Decoder, Field, Undecodable

# Heads that are kept decoded: so many of so many bytes a connection at most.
_MAX_KNOWN_BLOCKS = 256
_MAX_KNOWN_BYTES = 4096
_MAX_USUAL_BYTES = 256  # Larger fields are checked anew each time.

_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_NO_VALUE = re.compile(rb"[\0\r\n]|^[ \t]|[ \t]$")
_PSEUDO = (b":method", b":scheme", b":path", b":authority")
_OF_CONNECTIONS = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"))


def literal(name: bytes, value: bytes) -> bytes:
    """A header as an HPACK literal that changes no table: good on any connection."""
    if len(name) < 127 and len(value) < 127:
        return b"\x00%c%b%c%b" % (len(name), name, len(value), value)
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


class RequestHead:
    """A request's headers, checked. Shared by all requests with the same block of bytes, so never changed, but for the
    `notes`, where a handler may keep what it made of them.

    `headers` has lower-case names, repeats joined by ", ", without the pseudo-headers; `host` is :authority's, `length`
    is content-length's, or -1.
    """

    __slots__ = ("headers", "host", "length", "method", "notes", "path")

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
        self.notes: object = None


class HeaderDecoder:
    """One connection's HPACK state. Blocks that change nothing in it, as all of a client's later requests are, are
    decoded once.

    Requests may have `max_bytes` of headers. Blocks of up to twice as much are decoded all the same: the state must be
    kept, or one caller behind a proxy would end the connection of all.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._decoder = Decoder(2 * max_bytes)
        self._known: dict[bytes, RequestHead] = {}

    def request(self, block: bytes) -> RequestHead:
        """The request's head. Raises ConnectionFailed when it cannot be decoded, Invalid when it is no request's,
        TooLarge."""
        head = self._known.get(block)
        if head is None:
            changes = self._decoder.changes
            fields, size = self._decoded(block)
            if size > self._max_bytes:
                raise TooLarge(f"headers: {size} bytes, at most {self._max_bytes} are taken")
            head = _request_head(fields)
            if self._decoder.changes == changes and size <= _MAX_KNOWN_BYTES:
                if len(self._known) >= _MAX_KNOWN_BLOCKS:
                    self._known.clear()
                self._known[block] = head
        return head

    def fields(self, block: bytes) -> list[Field]:
        """Every field in its order. Raises ConnectionFailed."""
        return self._decoded(block)[0]

    def _decoded(self, block: bytes) -> tuple[list[Field], int]:
        changes = self._decoder.changes
        try:
            found = self._decoder.decode(block)
        except Undecodable as error:
            raise ConnectionFailed(Code.COMPRESSION_ERROR, f"headers: {error}") from None
        if self._decoder.changes != changes:
            self._known.clear()
        return found


def _request_head(fields: Iterable[Field]) -> RequestHead:
    """RFC 9113 §8.2 and §8.3. Raises Invalid."""
    pseudo: dict[bytes, bytes] = {}
    headers: dict[bytes, bytes] = {}
    for name, value in fields:
        if name.startswith(b":"):
            if headers or name in pseudo or name not in _PSEUDO:
                raise Invalid(f"header {name[:80]!r} is out of place")
            pseudo[name] = value
            continue
        check = _check if len(name) + len(value) <= _MAX_USUAL_BYTES else _check.__wrapped__
        check(name, value)
        if name in headers:
            joined = b"; " if name == b"cookie" else b", "
            value = headers[name] + joined + value
        headers[name] = value
    return RequestHead(pseudo, headers)


@lru_cache(maxsize=4096)
def _check(name: bytes, value: bytes) -> None:
    """Most fields come again and again. Raises Invalid when a request must not have this one."""
    if not _NAME.fullmatch(name) or name in _OF_CONNECTIONS or _NO_VALUE.search(value):
        raise Invalid(f"header {name[:80]!r} is not allowed in HTTP/2")
    if name == b"te" and value != b"trailers":
        raise Invalid("header te: only trailers is allowed in HTTP/2")
