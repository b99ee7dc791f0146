import gzip
import zlib

import pytest
from lepton_common import compression
from lepton_common.errors import Invalid, TooLarge, UnsupportedEncoding


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
def test_compressed_bodies_round_trip(encoding: bytes) -> None:
    packed = compression.compress([b"a" * 1000, memoryview(b"b" * 1000)], encoding)
    assert len(packed) < 200
    assert compression.decompress(packed, encoding, 2000) == b"a" * 1000 + b"b" * 1000


def test_other_tools_read_what_is_compressed() -> None:
    assert gzip.decompress(compression.compress([b"abc"], b"gzip")) == b"abc"
    assert zlib.decompress(compression.compress([b"abc"], b"deflate")) == b"abc"


def test_a_decompression_bomb_is_refused() -> None:
    with pytest.raises(TooLarge, match="more than 1000 bytes"):
        compression.decompress(gzip.compress(b"\0" * 10_000_000), b"gzip", 1000)


@pytest.mark.parametrize(
    "body",
    [b"plain", gzip.compress(b"abc")[:-3], gzip.compress(b"abc") + b"more"],
    ids=["not compressed", "cut off", "followed by more"],
)
def test_damaged_compression_is_refused(body: bytes) -> None:
    with pytest.raises(Invalid):
        compression.decompress(body, b"gzip", 1000)


def test_an_unknown_content_encoding_is_refused() -> None:
    with pytest.raises(UnsupportedEncoding, match="'br'"):
        compression.decompress(b"", b"br", 1000)


@pytest.mark.parametrize(
    ("accept", "expected"),
    [(None, None), (b"gzip", b"gzip"), (b"Deflate ", b"deflate"), (b"gzip, deflate, br", None), (b"br", None)],
)
def test_an_answer_is_compressed_only_when_exactly_one_encoding_is_asked_for(
    accept: bytes | None, expected: bytes | None
) -> None:
    assert compression.reply_encoding(accept) == expected
