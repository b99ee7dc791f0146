import json
import math
from typing import Any

import ml_dtypes
import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lepton_common import oip, tensors
from lepton_common.errors import Invalid
from lepton_common.signature import DTYPES, Signature
from lepton_common.tensors import Array

from .oip_bodies import ROWS, TWO, answer, arrays, assert_same, binary_request, decode, one, request


@pytest.mark.parametrize("datatype", DTYPES)
@given(data=st.data())
def test_every_datatype_survives_a_binary_round_trip(datatype: str, data: st.DataObject) -> None:
    array = data.draw(arrays(datatype))
    signature = one(datatype, (-1,) * array.ndim)
    body, length = binary_request(array, datatype, parameters={"binary_data_output": True})
    decoded = oip.decode_request(body, length, signature)
    assert_same(decoded.inputs["x"], array)
    document, tail = answer(decoded, decoded.inputs["x"], signature)
    output = document["outputs"][0]
    assert output["parameters"] == {"binary_data_size": len(tail)}
    assert "data" not in output
    assert tail == body[length:]


@pytest.mark.parametrize("datatype", DTYPES)
@given(data=st.data())
def test_every_datatype_survives_a_json_round_trip(datatype: str, data: st.DataObject) -> None:
    array = data.draw(arrays(datatype))
    if array.dtype.kind in "fV":
        # JSON has one null for NaN and both infinities; NaN payloads and signs are not values.
        array = np.where(np.isfinite(array), array, np.array(np.nan, array.dtype)).astype(array.dtype)
    signature = one(datatype, (-1,) * array.ndim)
    plain = oip.decode_request(*binary_request(array, datatype), signature)
    document, tail = answer(plain, array, signature)
    assert tail == b""
    back = decode(document["outputs"][0]["data"], list(array.shape), datatype, (-1,) * array.ndim)
    if array.dtype.kind in "fV":
        np.testing.assert_array_equal(back.astype(np.float64), array.astype(np.float64))
    else:
        assert_same(back, array)


VALID: list[Any] = [
    {
        "id": "a",
        "inputs": [{"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [[1, 2.5], [3, None]]}],
        "outputs": [{"name": "y", "parameters": {"binary_data": True, "classification": 1}}],
        "parameters": {"binary_data_output": False, "timeout": 5},
    }
]
JUNK: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def assert_read_or_refused(body: bytes, header_length: int | None, signature: Signature) -> None:
    """Nothing but Invalid is raised, and what is read fits the signature."""
    try:
        decoded = oip.decode_request(body, header_length, signature)
    except Invalid:
        return
    array = decoded.inputs["x"]
    assert signature.inputs[0].fits(array.shape)
    assert array.dtype == DTYPES[signature.inputs[0].datatype]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, child in children for deeper in places(child, (*path, key)))]


@given(place=st.sampled_from(places(VALID[0])[1:]), junk=JUNK)
def test_a_request_with_any_part_replaced_is_read_or_refused(place: tuple[Any, ...], junk: Any) -> None:
    document = json.loads(json.dumps(VALID[0]))
    parent = document
    for step in place[:-1]:
        parent = parent[step]
    parent[place[-1]] = junk
    assert_read_or_refused(json.dumps(document).encode(), None, ROWS)


@given(data=st.data())
def test_a_request_with_any_bytes_changed_is_read_or_refused(data: st.DataObject) -> None:
    body, length = binary_request(np.ones((2, 2), np.float32), "FP32")
    start = data.draw(st.integers(0, len(body)))
    end = data.draw(st.integers(start, len(body)))
    mutated = body[:start] + data.draw(st.binary(max_size=8)) + body[end:]
    header_length = data.draw(st.none() | st.just(length) | st.integers(0, 2 * len(body)))
    assert_read_or_refused(mutated, header_length, ROWS)


@given(body=st.binary(max_size=64), signature=st.sampled_from([one(datatype) for datatype in DTYPES]))
def test_any_raw_body_is_read_or_refused(body: bytes, signature: Signature) -> None:
    assert_read_or_refused(body, 0, signature)


@pytest.mark.parametrize("data", [[1.0, 2.0, 3.0, 4.0], [[1, 2], [3, 4]], [[[1.0], [2.0]], [[3.0], [4.0]]]])
def test_data_may_be_flat_or_nested(data: object) -> None:
    assert decode(data, [2, 2], "FP32", (-1, 2)).tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    ("datatype", "data", "expected"),
    [
        ("INT64", [2**63 - 1, -(2**63)], [2**63 - 1, -(2**63)]),
        ("UINT64", [2**64 - 1, 0], [2**64 - 1, 0]),
        ("INT8", [1.0, -128], [1, -128]),
        ("BOOL", [True, 0, 1, False], [True, False, True, False]),
        ("FP64", [2**60, 0.5], [2.0**60, 0.5]),
        ("BYTES", ["é", ""], ["é".encode(), b""]),
    ],
)
def test_json_values_are_exact(datatype: str, data: list[Any], expected: list[Any]) -> None:
    assert decode(data, [len(data)], datatype).tolist() == expected


@pytest.mark.parametrize(
    ("datatype", "data", "message"),
    [
        ("INT8", [128], "does not fit INT8"),
        ("UINT8", [-1], "does not fit UINT8"),
        ("INT64", [2**63], "does not fit INT64"),
        ("UINT64", [float(2**64)], "does not fit UINT64"),
        ("INT64", [-(2**63) - 1.0], "does not fit INT64"),
        ("INT32", [1.5], "1.5 is not an integer"),
        ("INT32", [True], "takes integers, got booleans"),
        ("INT32", [None], "takes integers, got null"),
        ("FP32", [1e39], "does not fit FP32"),
        ("FP16", [70000], "does not fit FP16"),
        ("BF16", [3.5e38], "does not fit BF16"),
        ("FP32", ["1"], "takes numbers, got strings"),
        ("FP32", [True], "takes numbers, got booleans"),
        ("BOOL", [2], "takes true, false, 0 or 1"),
        ("BYTES", [1], "takes strings, got numbers"),
        ("FP32", [[1], 2], "nested unevenly"),
        ("FP32", [[1, 2], [3]], "nested unevenly"),
        ("FP32", "1", "data must be a list"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_name(datatype: str, data: Any, message: str) -> None:
    with pytest.raises(Invalid, match=f"input 'x'.*{message}"):
        decode(data, [1], datatype)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([1, 3], r"got shape \[1, 3\], expected \[-1, 2\]"),
        ([2], r"got shape \[2\], expected \[-1, 2\]"),
        ([2, 2], "needs 4 elements, got 2"),
        ([-1, 2], "non-negative integers"),
        ([True, 2], "non-negative integers"),
        ([1.0, 2], "non-negative integers"),
        (None, "non-negative integers"),
        ([2**62, 2], "more than"),
    ],
)
def test_a_wrong_shape_is_refused_before_anything_is_allocated(shape: Any, message: str) -> None:
    with pytest.raises(Invalid, match=f"input 'x': .*{message}"):
        oip.decode_request(request([1, 2], shape), None, ROWS)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "inputs must be a list"),
        ({"inputs": []}, r"input 'x' is missing: FP32 \[-1, 2\]"),
        ({"inputs": [1]}, "must be an object"),
        ({"inputs": [{"name": "z"}]}, "input 'z' is unknown: the model takes 'x'"),
        ({"inputs": [{"name": ["x"]}]}, "is unknown"),
        ({"inputs": [{"name": "x", "datatype": "INT8"}]}, "got datatype INT8, expected FP32"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2]}]}, "input 'x': data is missing"),
        ({"id": 7, "inputs": []}, "id must be a string"),
        ({"parameters": [], "inputs": []}, "parameters must be an object"),
        ({"parameters": {"a": {}}, "inputs": []}, "parameter 'a' must be a string, number or boolean"),
    ],
)
def test_a_malformed_request_is_refused(document: Any, message: str) -> None:
    with pytest.raises(Invalid, match=message):
        oip.decode_request(orjson.dumps(document), None, ROWS)


@pytest.mark.parametrize(
    ("outputs", "parameters", "message"),
    [
        ([{"name": "q"}], {}, "output 'q' is unknown: the model gives 'y'"),
        ([{"name": "y"}, {"name": "y"}], {}, "asked for twice"),
        ([{"name": "y", "parameters": {"binary_data": 1}}], {}, "binary_data must be true or false"),
        ([{"name": "y", "parameters": {"classification": -1}}], {}, "classification must be"),
        ({}, {}, "outputs must be a list"),
        (None, {"binary_data_output": "yes"}, "binary_data_output must be true or false"),
    ],
)
def test_a_malformed_wish_for_outputs_is_refused(outputs: Any, parameters: Any, message: str) -> None:
    with pytest.raises(Invalid, match=message):
        oip.decode_request(request([1, 2], [1, 2], outputs=outputs, parameters=parameters), None, ROWS)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 3000, b'{"id":"\\ud800","inputs":[NaN]}'])
def test_a_body_that_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(Invalid):
        oip.decode_request(body, None, ROWS)


def test_bare_nan_and_infinity_are_numbers() -> None:
    body = b'{"inputs":[{"name":"x","shape":[2,2],"datatype":"FP32","data":[NaN,Infinity,-Infinity,1]}]}'
    values = oip.decode_request(body, None, ROWS).inputs["x"].ravel().tolist()
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, -math.inf, 1.0]


def test_nan_for_an_integer_is_refused() -> None:
    with pytest.raises(Invalid, match="nan is not an integer"):
        oip.decode_request(b'{"inputs":[{"name":"x","shape":[1],"datatype":"INT32","data":[NaN]}]}', None, one("INT32"))


def test_nan_and_infinity_are_answered_as_null() -> None:
    decoded = oip.decode_request(request([1, 2], [1, 2]), None, ROWS)
    document, _ = answer(decoded, np.array([[np.nan, np.inf]], np.float32), ROWS)
    assert document["outputs"][0]["data"] == [None, None]


def test_the_id_is_echoed_or_generated() -> None:
    decoded = oip.decode_request(request([1, 2], [1, 2], id="abc"), None, ROWS)
    assert answer(decoded, decoded.inputs["x"], ROWS)[0]["id"] == "abc"
    first, second = (oip.decode_request(request([1, 2], [1, 2], id=None), None, ROWS).id for _ in range(2))
    assert first != second


def test_float32_is_written_with_its_own_digits() -> None:
    decoded = oip.decode_request(request([0.1, 2], [1, 2]), None, ROWS)
    _, parts = oip.encode_response("m", "1", decoded, {"y": decoded.inputs["x"]}, ROWS)
    assert b'"data":[0.1,2.0]' in bytes(parts[0])


def two_inputs(outputs: list[Any]) -> oip.InferRequest:
    """`b` binary and first, `a` in JSON: mixed and out of the signature's order."""
    text = np.array([b"one", b"\xff\x00"], object)
    data = bytes(tensors.to_binary("BYTES", text))
    header = orjson.dumps(
        {
            "inputs": [
                {"name": "b", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}},
                {"name": "a", "shape": [2], "datatype": "INT32", "data": [1, 2]},
            ],
            "outputs": outputs,
            "parameters": {"binary_data_output": True},
        }
    )
    return oip.decode_request(header + data, len(header), TWO)


def test_json_and_binary_inputs_may_be_mixed_in_any_order() -> None:
    decoded = two_inputs([])
    assert list(decoded.inputs) == ["a", "b"]
    assert decoded.inputs["b"].tolist() == [b"one", b"\xff\x00"]


def test_outputs_are_answered_in_the_requested_order_and_the_outputs_own_flag_wins() -> None:
    decoded = two_inputs([{"name": "q", "parameters": {"binary_data": False}}, {"name": "p"}])
    values = {"p": np.array([7, 8], np.int32), "q": np.zeros((2, 3), np.float32)}
    length, parts = oip.encode_response("m", "1", decoded, values, TWO)
    document = orjson.loads(parts[0])
    assert length == len(parts[0])
    assert [output["name"] for output in document["outputs"]] == ["q", "p"]
    assert document["outputs"][0]["data"] == [0.0] * 6
    assert bytes(parts[1]) == b"\x07\0\0\0\x08\0\0\0"


@pytest.mark.parametrize(
    ("datatype", "array", "expected"),
    [
        ("FP32", np.array([[0.5, 3.0, 1.0]], np.float32), [b"3.000000:1:cat", b"1.000000:2"]),
        ("FP32", np.array([[1.0, np.nan, 1.0]], np.float32), [b"1.000000:0:dog", b"1.000000:2"]),
        ("INT64", np.array([[5, 7, 6]], np.int64), [b"7:1:cat", b"6:2"]),
        ("BF16", np.array([[0.5, 3.0, 1.0]], ml_dtypes.bfloat16), [b"3.000000:1:cat", b"1.000000:2"]),
    ],
)
def test_classification_gives_the_top_classes_as_value_index_and_label(
    datatype: str, array: Array, expected: list[bytes]
) -> None:
    signature = one(datatype, (-1, 3))
    wanted = oip.InferRequest("i", {}, [oip.RequestedOutput("y", classification=2)], {})
    length, parts = oip.encode_response("m", "1", wanted, {"y": array}, signature, ["dog", "cat"])
    assert length is None
    output = orjson.loads(parts[0])["outputs"][0]
    assert (output["datatype"], output["shape"]) == ("BYTES", [1, 2])
    assert output["data"] == [text.decode() for text in expected]


def test_classification_of_an_unbatched_output_has_no_batch_dimension_and_is_clamped() -> None:
    wanted = oip.InferRequest("i", {}, [oip.RequestedOutput("y", classification=9)], {})
    _, parts = oip.encode_response("m", "1", wanted, {"y": np.array([1, 2], np.uint8)}, one("UINT8", (2,)))
    assert orjson.loads(parts[0])["outputs"][0]["shape"] == [2]


@pytest.mark.parametrize(
    ("datatype", "array", "top", "message"),
    [
        ("BYTES", np.array([b"\xff"], object), 0, "not UTF-8 text: ask for it with binary_data"),
        ("BYTES", np.array([b"a"], object), 1, "classification needs numbers"),
    ],
)
def test_an_output_that_cannot_be_given_as_asked_is_refused(
    datatype: str, array: Array, top: int, message: str
) -> None:
    wanted = oip.InferRequest("i", {}, [oip.RequestedOutput("y", classification=top)], {})
    with pytest.raises(Invalid, match=f"output 'y'.*{message}"):
        oip.encode_response("m", "1", wanted, {"y": array}, one(datatype))


def test_strings_of_the_runtime_are_written_like_bytes() -> None:
    wanted = oip.InferRequest("i", {}, [oip.RequestedOutput("y"), oip.RequestedOutput("y", binary=True)], {})
    _, parts = oip.encode_response("m", "1", wanted, {"y": np.array(["é"], object)}, one("BYTES"))
    assert orjson.loads(parts[0])["outputs"][0]["data"] == ["é"]
    assert bytes(parts[1]) == b"\x02\0\0\0" + "é".encode()
