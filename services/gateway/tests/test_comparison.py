"""Whether two answers agree, as the shadow's judge is told."""

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from lepton_common import compression
from lepton_common.errors import Invalid, TooLarge
from lepton_common.signature import DTYPES
from lepton_common.tensors import to_binary, to_json
from lepton_gateway.comparison import Comparison, Outputs, compare, decode

Tensor = tuple[str, Any]  # datatype and array


def as_json(tensors: Mapping[str, Tensor]) -> tuple[dict[bytes, bytes], bytes]:
    """An answer in JSON: headers and body."""
    outputs = [
        {"name": name, "datatype": datatype, "shape": np.shape(array), "data": orjson.Fragment(to_json(name, *tensor))}
        for name, tensor in tensors.items()
        for datatype, array in [tensor]
    ]
    return {}, orjson.dumps({"model_name": "m", "outputs": outputs})


def as_binary(tensors: Mapping[str, Tensor]) -> tuple[dict[bytes, bytes], bytes]:
    """The same by the binary extension."""
    parts = {name: bytes(to_binary(*tensor)) for name, tensor in tensors.items()}
    outputs = [
        {"name": name, "datatype": tensor[0], "shape": np.shape(tensor[1]), "parameters": {"binary_data_size": size}}
        for name, tensor in tensors.items()
        for size in [len(parts[name])]
    ]
    head = orjson.dumps({"model_name": "m", "outputs": outputs})
    return {b"inference-header-content-length": b"%d" % len(head)}, head + b"".join(parts.values())


def outputs(**tensors: Tensor) -> Outputs:
    return decode(*as_json(tensors))


def floats(*values: Any, datatype: str = "FP32") -> Tensor:
    return datatype, np.array(values, DTYPES[datatype])


def ints(*values: Any) -> Tensor:
    return "INT64", np.array(values, np.int64)


def text(*values: str) -> Tensor:
    array = np.empty(len(values), object)
    array[:] = [each.encode() for each in values]
    return "BYTES", array


def agree(one: Outputs, other: Outputs) -> bool:
    assert compare(one, other, None).agrees == compare(other, one, None).agrees
    return compare(one, other, None).agrees


# --- reading answers ---


ALL_KINDS: dict[str, Tensor] = {
    "f": floats([0.5, float("nan")], [1.5, -2.0]),
    "h": floats(0.5, 2.0, datatype="FP16"),
    "i": ints(1, -(2**53)),
    "u": ("UINT8", np.array([[0, 255]], np.uint8)),
    "b": ("BOOL", np.array([True, False])),
    "t": text("", "grüße", "x" * 1000),
    "e": floats(),
}


@pytest.mark.parametrize("encoding", [b"", b"identity", b"gzip", b"deflate"])
@pytest.mark.parametrize("write", [as_json, as_binary])
def test_every_form_of_an_answer_is_read(write: Any, encoding: bytes) -> None:
    headers, body = write(ALL_KINDS)
    if encoding in (b"gzip", b"deflate"):
        body = compression.compress([body], encoding)
    found = decode({**headers, b"content-encoding": encoding}, body)
    assert list(found) == list(ALL_KINDS)
    for name, (datatype, array) in ALL_KINDS.items():
        assert found[name].array.shape == array.shape
        np.testing.assert_array_equal(found[name].array, array)
        assert found[name].discrete == (datatype not in ("FP16", "FP32"))
    assert compare(found, decode(*as_json(ALL_KINDS)), None) == Comparison(True)


def test_bf16_is_read_in_binary() -> None:
    assert agree(decode(*as_binary({"y": floats(1.0, datatype="BF16")})), outputs(y=floats(1.0)))


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, b""),
        ({}, b"[]"),
        ({}, b"{}"),
        ({}, b'{"outputs":{}}x'),
        ({}, b'{"outputs":[1]}'),
        ({}, b'{"outputs":[{}]}'),
        ({}, b'{"outputs":[{"name":"y","datatype":"FP31","shape":[1],"data":[1]}]}'),
        ({}, b'{"outputs":[{"name":"y","datatype":"FP32","shape":[2],"data":[1]}]}'),
        ({}, b'{"outputs":[{"name":"y","datatype":"FP32","shape":2,"data":[1]}]}'),
        ({}, b'{"outputs":[{"name":"y","datatype":"FP32","shape":[-1],"data":[1]}]}'),
        ({}, b'{"outputs":[{"name":"y","datatype":"FP32","shape":[1]}]}'),
        ({}, b'{"outputs":[{"name":"y","datatype":"INT8","shape":[1],"data":[300]}]}'),
        ({}, b'{"outputs":[{"name":"y","datatype":"INT8","shape":[1],"parameters":{"binary_data_size":-1}}]}'),
        ({}, b'{"outputs":[{"name":"y","datatype":"INT8","shape":[1],"parameters":{"binary_data_size":"1"}}]}'),
        ({b"inference-header-content-length": b"x"}, b"{}"),
        ({b"inference-header-content-length": b"99"}, b"{}"),
        ({b"content-encoding": b"gzip"}, b"not gzip"),
        ({b"content-encoding": b"br"}, b"?"),
    ],
)
def test_what_is_no_answer_is_invalid(headers: dict[bytes, bytes], body: bytes) -> None:
    with pytest.raises(Invalid):
        decode(headers, body)


@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(0, 300)))
def test_no_bytes_raise_anything_else(junk: bytes, length: int | None) -> None:
    headers = {} if length is None else {b"inference-header-content-length": b"%d" % length}
    for body in (junk, as_json(ALL_KINDS)[1][: len(junk)] + junk):
        with contextlib.suppress(Invalid):
            assert isinstance(decode(headers, body), dict)


def test_an_answer_is_too_large_by_what_it_holds_not_by_how_it_is_sent() -> None:
    headers, body = as_json({"y": floats(*[0.0] * 100_000)})
    small = compression.compress([body], b"gzip")
    assert len(small) < 10_000
    with pytest.raises(TooLarge):
        decode({**headers, b"content-encoding": b"gzip"}, small)
    with pytest.raises(TooLarge):
        decode(headers, body)


# --- agreement ---


def test_exact_outputs_alone_decide_where_there_are_any() -> None:
    one = outputs(label=ints(3), scores=floats(0.1, 0.9))
    assert agree(one, outputs(label=ints(3), scores=floats(0.9, 0.1)))
    assert not agree(one, outputs(label=ints(4), scores=floats(0.1, 0.9)))
    assert not agree(outputs(t=text("cat")), outputs(t=text("dog")))
    assert agree(outputs(t=text("cat")), outputs(t=text("cat")))


def test_scores_agree_when_the_same_one_is_the_greatest() -> None:
    one = outputs(y=floats([0.1, 0.9], [0.6, 0.4]))
    assert agree(one, outputs(y=floats([0.4, 0.6], [0.9, 0.1])))
    assert not agree(one, outputs(y=floats([0.4, 0.6], [0.1, 0.9])))
    # Nearly a tie: the order may turn while the values stay.
    assert agree(outputs(y=floats(0.5001, 0.4999)), outputs(y=floats(0.4999, 0.5001)))


def test_single_values_agree_within_one_percent() -> None:
    assert agree(outputs(y=floats([100.0])), outputs(y=floats([100.9])))
    assert not agree(outputs(y=floats([100.0])), outputs(y=floats([102.0])))
    assert agree(outputs(y=floats([0.0])), outputs(y=floats([1e-7])))
    assert not agree(outputs(y=floats([1.0])), outputs(y=floats([-1.0])))
    assert agree(outputs(y=floats(3.0, datatype="FP64")), outputs(y=floats(3.0)))


@pytest.mark.parametrize(
    ("one", "other", "agrees"),
    [
        ([float("nan")], [float("nan")], True),
        ([float("nan")], [1.0], False),
        ([0.1, float("nan")], [0.1, 0.5], False),
        ([float("inf")], [float("inf")], True),
        ([float("inf")], [float("-inf")], False),
        ([float("inf")], [1e30], False),
    ],
)
def test_what_is_no_number_agrees_with_its_like_alone(one: list[float], other: list[float], agrees: bool) -> None:
    # Binary, because JSON has no infinity.
    answers = [decode(*as_binary({"y": floats(*each)})) for each in (one, other)]
    assert agree(*answers) == agrees


def test_answers_of_another_form_disagree() -> None:
    one = outputs(y=floats(1.0, 2.0))
    for other in (
        outputs(z=floats(1.0, 2.0)),
        outputs(y=floats(1.0, 2.0), z=floats(1.0)),
        outputs(y=floats([1.0, 2.0])),
        outputs(y=floats(1.0, 2.0, 3.0)),
        outputs(y=ints(1, 2)),
        outputs(),
    ):
        assert not agree(one, other)
    assert agree(outputs(), outputs())


def test_classes_agree_whatever_their_scores() -> None:
    one = outputs(y=text("0.912345:3:cat", "0.100000:1:dog"))
    assert agree(one, outputs(y=text("0.812345:3:cat", "0.200000:1:dog")))
    assert not agree(one, outputs(y=text("0.912345:1:dog", "0.100000:3:cat")))
    assert not agree(outputs(t=text("12:30")), outputs(t=text("13:30")))  # No class: a time of day.


@given(
    arrays.arrays(np.float32, arrays.array_shapes(max_dims=3, max_side=4), elements=st.floats(-1e6, 1e6, width=32)),
    st.floats(-0.0099, 0.0099),
)
def test_less_than_one_percent_never_disagrees(array: Any, by: float) -> None:
    nudged = (array.astype(np.float64) * (1 + by)).astype(np.float32)
    assert agree(outputs(y=("FP32", array)), outputs(y=("FP32", array)))
    assert agree(outputs(y=("FP32", array)), outputs(y=("FP32", nudged)))


# --- labels ---


@pytest.mark.parametrize(
    ("stable", "shadow", "label", "right"),
    [
        (ints(3), ints(4), b"3", (True, False)),
        (ints(3), ints(4), b"[4]", (False, True)),
        (ints(3, 4), ints(3, 4), b"[3, 4]", (True, True)),
        (ints([3], [4]), ints([3], [5]), b"[[3], [4]]", (True, False)),
        (ints(3), ints(3), b"5", (False, False)),
        (("BOOL", np.array([True])), ("BOOL", np.array([False])), b"true", (True, False)),
        (text("cat"), text("dog"), b'"cat"', (True, False)),
        (text("3"), text("4"), b"3", (True, False)),
        (text("0.900000:3:cat"), text("0.900000:1:dog"), b'"cat"', (True, False)),
        (text("0.900000:3:cat"), text("0.900000:1:dog"), b"1", (False, True)),
        (text("12:30"), text("13:00"), b'"30"', (False, False)),
        (floats([0.1, 0.9]), floats([0.8, 0.2]), b"1", (True, False)),
        (floats(0.1, 0.9), floats(0.8, 0.2), b"0", (False, True)),
        (floats([0.1, 0.9], [0.9, 0.1]), floats([0.1, 0.9], [0.1, 0.9]), b"[1, 0]", (True, False)),
        (ints(3), ints(3, 3), b"3", (True, False)),
        # Labels that say nothing about such an answer.
        (floats([1.5]), floats([1.5]), b"1.5", (None, None)),
        (ints(3, 4), ints(3, 4), b"3", (None, None)),
        (ints(3), ints(3), b"[3", (None, None)),
        (ints(3), ints(3), b"[" * 900 + b"]" * 900, (None, None)),
    ],
)
def test_a_label_says_who_is_right(
    stable: Tensor, shadow: Tensor, label: bytes, right: tuple[bool | None, bool | None]
) -> None:
    found = compare(outputs(y=stable), outputs(y=shadow), label)
    assert (found.stable_right, found.shadow_right) == right


def test_the_label_is_of_the_first_exact_output() -> None:
    one = outputs(scores=floats(0.1, 0.9), label=ints(7), other=ints(1))
    assert compare(one, one, b"7") == Comparison(True, True, True)
    assert compare(one, one, b"1") == Comparison(True, False, False)
