"""Binary data: what belongs to which input, and what does not fit."""

import numpy as np
import orjson
import pytest
from lepton_common import oip
from lepton_common.errors import Invalid
from lepton_common.signature import Signature

from .oip_bodies import ROWS, TWO, binary_request, one


@pytest.mark.parametrize(
    ("cut", "message"),
    [(-1, "unexpected size 16, 15 bytes are left"), (0, None), (1, "unexpected additional input data: 1 bytes")],
)
def test_missing_and_additional_binary_data_are_refused(cut: int, message: str | None) -> None:
    body, length = binary_request(np.ones((2, 2), np.float32), "FP32")
    body = body[:cut] if cut < 0 else body + b"\0" * cut
    if message is None:
        oip.decode_request(body, length, ROWS)
    else:
        with pytest.raises(Invalid, match=message):
            oip.decode_request(body, length, ROWS)


def test_binary_data_of_the_wrong_size_for_its_shape_is_refused() -> None:
    body, length = binary_request(np.ones((2, 2), np.float64), "FP32")
    with pytest.raises(Invalid, match=r"input 'x': unexpected size 32 bytes, expected 16 for FP32 of shape \[2, 2\]"):
        oip.decode_request(body, length, ROWS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x05\0\0\0abc", "unexpected end of data in BYTES element 0"),
        (b"\x01\0\0\0a!", "1 bytes after the last"),
        (b"\x01", "too few"),
    ],
)
def test_damaged_bytes_elements_are_refused(data: bytes, message: str) -> None:
    entry = {"name": "x", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
    header = orjson.dumps({"inputs": [entry]})
    with pytest.raises(Invalid, match=message):
        oip.decode_request(header + data, len(header), one("BYTES"))


def test_a_bool_byte_is_0_or_1() -> None:
    body, length = binary_request(np.array([2], np.uint8), "BOOL")
    with pytest.raises(Invalid, match="0 or 1"):
        oip.decode_request(body, length, one("BOOL"))


def test_unaligned_binary_data_becomes_aligned() -> None:
    aligned = []
    for padding in range(8):
        body, length = binary_request(np.ones(3), "FP64", id="i" * padding)
        aligned.append(oip.decode_request(body, length, one("FP64")).inputs["x"].flags.aligned)
    assert aligned == [True] * 8


@pytest.mark.parametrize(
    ("datatype", "spec_shape", "body", "expected"),
    [
        ("FP32", (-1, 2), np.ones(4, np.float32).tobytes(), (2, 2)),
        ("FP32", (-1, -1), np.ones(4, np.float32).tobytes(), (1, 4)),
        ("INT8", (4,), b"abcd", (4,)),
        ("BYTES", (-1, 1), b"text", (1, 1)),
    ],
)
def test_a_raw_binary_body_is_the_only_input(
    datatype: str, spec_shape: tuple[int, ...], body: bytes, expected: tuple[int, ...]
) -> None:
    decoded = oip.decode_request(body, 0, one(datatype, spec_shape))
    assert decoded.inputs["x"].shape == expected
    assert decoded.outputs[0].binary


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        (TWO, "needs a model with one input"),
        (one("FP32", (-1, -1, -1)), "cannot tell the unknown dimensions"),
        (one("FP32", (-1, 2)), "unexpected size 7"),
        (one("BYTES", (2,)), "BYTES element"),
    ],
)
def test_a_raw_binary_body_that_cannot_be_shaped_is_refused(signature: Signature, message: str) -> None:
    with pytest.raises(Invalid, match=message):
        oip.decode_request(b"1234567", 0, signature)


@pytest.mark.parametrize("value", [b"-1", b"x", b"", b"1.0", b"9" * 30])
def test_a_header_length_that_is_no_number_is_refused(value: bytes) -> None:
    with pytest.raises(Invalid, match="Inference-Header-Content-Length"):
        oip.header_length_of(value)
