"""HPACK as its reference in Python, `hpack`, writes and reads it."""

import pytest
from hpack import Decoder as Reference
from hpack import Encoder, HPACKError
from hpack.hpack import encode_integer
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hypothesis import given
from hypothesis import strategies as st
from lepton_common.http2_hpack import Decoder, Undecodable

MOST = 64 << 10

names = st.one_of(st.sampled_from([b":path", b"te", b"cookie", b"x-request-id"]), st.binary(max_size=300))
values = st.one_of(st.sampled_from([b"", b"trailers", b"gzip, deflate"]), st.binary(max_size=300))
lists = st.lists(st.tuples(names, values), max_size=20)
sizes = st.sampled_from([0, 40, 200, 4096])


@given(st.lists(st.tuples(lists, sizes, st.booleans()), max_size=10))
def test_what_an_encoder_writes_is_read_block_after_block(
    blocks: list[tuple[list[tuple[bytes, bytes]], int, bool]],
) -> None:
    encoder, decoder = Encoder(), Decoder(MOST)
    for fields, table_size, huffman in blocks:
        encoder.header_table_size = table_size
        found, size = decoder.decode(encoder.encode(fields, huffman=huffman))
        assert found == fields
        assert size == sum(len(name) + len(value) + 32 for name, value in fields)


def read_as_the_reference_does(blocks: list[bytes]) -> None:
    reference, decoder = Reference(max_header_list_size=MOST), Decoder(MOST)
    for block in blocks:
        try:
            expected = [(bytes(name), bytes(value)) for name, value in reference.decode(block, raw=True)]
        except HPACKError:
            with pytest.raises(Undecodable):
                decoder.decode(block)
            return
        assert decoder.decode(block)[0] == expected


@given(st.lists(st.one_of(st.binary(max_size=40), lists.map(Encoder().encode)), max_size=6))
def test_whatever_comes_is_read_or_refused_as_the_reference_does(blocks: list[bytes]) -> None:
    read_as_the_reference_does(blocks)


@given(lists.filter(bool), st.data())
def test_a_block_that_is_changed_and_cut_off_is_read_or_refused_as_the_reference_does(
    fields: list[tuple[bytes, bytes]], data: st.DataObject
) -> None:
    block = bytearray(Encoder().encode(fields))
    block[data.draw(st.integers(0, len(block) - 1))] ^= data.draw(st.integers(0, 255))
    read_as_the_reference_does([bytes(block[: data.draw(st.integers(0, len(block)))])])


@given(st.binary(max_size=2000))
def test_every_symbol_has_its_code(text: bytes) -> None:
    packed = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH).encode(text)
    length = encode_integer(len(packed), 7)
    length[0] |= 0x80
    block = b"\x00\x80" + bytes(length) + packed
    assert Decoder(MOST).decode(block)[0] == [(b"", text)]


def test_fields_that_grow_from_a_few_bytes_are_refused() -> None:
    decoder = Decoder(1000)
    big = b"\x40\x01a" + b"\x7f\x71" + bytes(240)
    assert decoder.decode(big)[1] == 273
    with pytest.raises(Undecodable, match="more than 1000 bytes"):
        decoder.decode(b"\xbe" * 4)


def test_an_entry_larger_than_the_table_empties_it() -> None:
    decoder = Decoder(MOST)
    decoder.decode(b"\x40\x01a\x01b")
    assert decoder.decode(b"\xbe")[0] == [(b"a", b"b")]
    decoder.decode(b"\x40\x01a" + b"\x7f\x81\x20" + bytes(4224))
    with pytest.raises(Undecodable, match="index"):
        decoder.decode(b"\xbe")
