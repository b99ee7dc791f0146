"""gzip and deflate of infer bodies: bounded on the way in, only when asked for on the way out."""

import zlib
from collections.abc import Sequence

from lepton_common.errors import Invalid, TooLarge, UnsupportedEncoding

_WBITS = {b"gzip": 31, b"deflate": 15}  # HTTP's deflate is a zlib stream


def decompress(body: bytes | bytearray, encoding: bytes, max_bytes: int) -> bytes | bytearray:
    """The body without its Content-Encoding. Raises TooLarge beyond `max_bytes`, Invalid when damaged."""
    encoding = encoding.strip().lower()
    if encoding in (b"", b"identity"):
        return body
    if encoding not in _WBITS:
        raise UnsupportedEncoding(f"Content-Encoding {encoding[:40].decode('latin-1')!r} is not gzip or deflate")
    stream = zlib.decompressobj(_WBITS[encoding])
    try:
        plain = stream.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise Invalid(f"the body is not {encoding.decode()} data") from error
    if len(plain) > max_bytes:
        raise TooLarge(f"the body decompresses to more than {max_bytes} bytes")
    if not stream.eof or stream.unused_data:
        raise Invalid(f"the body is not one complete {encoding.decode()} stream")
    return plain


def reply_encoding(accept: bytes | None) -> bytes | None:
    """`gzip` or `deflate` when Accept-Encoding asks for exactly that one, else None.

    HTTP libraries send `gzip, deflate, br` with every call: that is no wish to have tensors compressed.
    """
    if not accept:
        return None
    wanted = [part.strip().lower() for part in accept.split(b",")]
    return wanted[0] if len(wanted) == 1 and wanted[0] in _WBITS else None


def compress(parts: Sequence[bytes | memoryview], encoding: bytes) -> bytes:
    """The parts as one compressed stream, at the fastest level."""
    stream = zlib.compressobj(level=1, wbits=_WBITS[encoding])
    return b"".join([*map(stream.compress, parts), stream.flush()])
