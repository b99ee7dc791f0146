"""Wrong inputs to a model, JSON and binary: a 4xx that names what is wrong, and a platform that serves on."""

import gzip
import json
import zlib
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .local_platform import Platform
from .oip_requests import GOOD, MAX_BODY_BYTES, ROW, binary, error_of, infer, send_binary, with_input
from .onnx_models import WITHOUT_BF16
from .raw_http import exchange, post

pytestmark = pytest.mark.usefixtures("serves_on")

# --- JSON -------------------------------------------------------------------------------------------------------------

HUGE = 2**63

WRONG_INPUTS: dict[str, tuple[Any, str]] = {
    "unknown-name": (with_input(name="z"), "'z'"),
    "no-name": (with_input(name=None), "input"),
    "name-number": (with_input(name=5), "'5'"),
    "wrong-datatype": (with_input(datatype="INT32"), "'x'"),
    "unknown-datatype": (with_input(datatype="FLOAT"), "'x'"),
    "no-datatype": (with_input(datatype=None), "'x'"),
    "datatype-list": (with_input(datatype=["FP32"]), "'x'"),
    "no-shape": (with_input(shape=None), "'x'"),
    "shape-text": (with_input(shape="1,4"), "'x'"),
    "shape-float": (with_input(shape=[1.0, 4.0]), "'x'"),
    "shape-bool": (with_input(shape=[True, 4]), "'x'"),
    "negative-dim": (with_input(shape=[-1, 4]), "'x'"),
    "negative-both": (with_input(shape=[-2, -2]), "'x'"),
    "other-rank": (with_input(shape=[4]), "'x'"),
    "other-size": (with_input(shape=[4, 1]), "'x'"),
    "too-few": (with_input(data=ROW[:3]), "'x'"),
    "too-many": (with_input(data=[*ROW, 5.0]), "'x'"),
    "more-rows-than-data": (with_input(shape=[2, 4]), "'x'"),
    "none-but-rows": (with_input(data=[]), "'x'"),
    "ragged": (with_input(data=[[1, 2, 3], [4]]), "'x'"),
    "ragged-depth": (with_input(data=[[1, 2], 3, 4]), "'x'"),
    "deeply-ragged": (with_input(data=[[[1], [2]], [[3], [4, 5]]]), "'x'"),
    "no-data": (with_input(data=None), "'x'"),
    "data-number": (with_input(data=1.0), "'x'"),
    "data-object": (with_input(data={"0": 1.0}), "'x'"),
    "data-text": (with_input(data="1234"), "'x'"),
    "text-among-numbers": (with_input(data=[1, 2, 3, "4"]), "'x'"),
    "bool-among-numbers": (with_input(data=[1, 2, 3, True]), "'x'"),
    "object-among-numbers": (with_input(data=[1, 2, 3, {}]), "'x'"),
    "too-great": (with_input(data=[1, 2, 3, 1e39]), "'x'"),
    "binary-size-without-header": (with_input(data=None, parameters={"binary_data_size": 16}), "'x'"),
    "parameters-list": (with_input(parameters=[1]), "'x'"),
    "given-twice": ({"inputs": GOOD["inputs"] * 2}, "'x'"),
    "missing": ({"inputs": []}, "'x'"),
    "no-inputs": ({"id": "1"}, "inputs"),
    "inputs-object": ({"inputs": {"x": ROW}}, "inputs"),
    "inputs-of-text": ({"inputs": ["x"]}, "inputs"),
    "inputs-null": ({"inputs": None}, "inputs"),
    "id-number": ({**GOOD, "id": 5}, "id"),
    "parameters-text": ({**GOOD, "parameters": "fast"}, "parameters"),
    "parameter-object": ({**GOOD, "parameters": {"a": {}}}, "'a'"),
    "timeout-text": ({**GOOD, "parameters": {"timeout": "1s"}}, "timeout"),
    "timeout-negative": ({**GOOD, "parameters": {"timeout": -1}}, "timeout"),
    "binary-output-text": ({**GOOD, "parameters": {"binary_data_output": "yes"}}, "binary_data_output"),
    "outputs-object": ({**GOOD, "outputs": {"name": "scores"}}, "outputs"),
    "output-unknown": ({**GOOD, "outputs": [{"name": "nothing"}]}, "'nothing'"),
    "output-without-name": ({**GOOD, "outputs": [{}]}, "output"),
    "output-twice": ({**GOOD, "outputs": [{"name": "label"}] * 2}, "'label'"),
    "classes-text": ({**GOOD, "outputs": [{"name": "scores", "parameters": {"classification": "2"}}]}, "'scores'"),
    "classes-negative": ({**GOOD, "outputs": [{"name": "scores", "parameters": {"classification": -2}}]}, "'scores'"),
    "list": ([1, 2], "object"),
    "text": ("hello", "object"),
    "null": (None, "object"),
    "empty-object": ({}, "inputs"),
    "empty": (b"", "empty"),
    "not-json": (b"{inputs: x}", "JSON"),
    "cut-off": (json.dumps(GOOD).encode()[:-5], "JSON"),
    "two-documents": (json.dumps(GOOD).encode() * 2, "JSON"),
    "not-utf8": (b'{"id": "\xff\xfe"}', "JSON"),
    "lone-surrogate": (b'{"id": "\\ud800", "inputs": []}', "JSON"),
    "nul": (b"\x00" * 100, "JSON"),
    "form": (b"inputs=x&shape=1", "JSON"),
    "deeply-nested": (b"[" * 100_000, "JSON"),
    "deeply-nested-data": (json.dumps(with_input(data=0)).replace('"data": 0', f'"data": {"[" * 500}1{"]" * 500}'), ""),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_wrong_request_is_refused_by_name(http: httpx.Client, mlp: str, case: str) -> None:
    body, named = WRONG_INPUTS[case]
    content = body.encode() if case == "deeply-nested-data" else body
    assert named in error_of(infer(http, mlp, content), 400)


@pytest.mark.parametrize(
    "shape",
    [[HUGE, HUGE], [0, HUGE], [2**31, 2**33], [2**62, 4], [1 << 29, 1], [10**30, 1]],
    ids=["2^126", "0", "2^64", "2^64b", "2^29", "10^30"],
)
def test_shape_beyond_all_measure_takes_no_memory(http: httpx.Client, echo: str, shape: list[int]) -> None:
    answer = infer(http, echo, {"inputs": [{"name": "x", "shape": shape, "datatype": "FP32", "data": [1.0]}]})
    assert answer.status_code in {400, 413}
    assert "'x'" in answer.json()["error"]


UNFIT_VALUES: dict[str, list[object]] = {
    "BOOL": [2, -1, 0.5, "true", None],
    "UINT8": [256, -1, 1.5, "1", True, None],
    "UINT64": [2**64, -1, 1e300],
    "INT8": [128, -129],
    "INT32": [2**31, -(2**31) - 1, 1e20],
    "INT64": [2**63, -(2**63) - 1, 0.1, 9007199254740993.0],
    "FP16": [65520.0, "1", False],
    "FP64": ["1", [1], {}],
    "BYTES": [5, None, True, {}],
}


@pytest.mark.parametrize(
    ("datatype", "value"),
    [(datatype, value) for datatype, values in UNFIT_VALUES.items() for value in values],
)
def test_value_that_does_not_fit_its_datatype_is_refused(
    http: httpx.Client, every_datatype: str, datatype: str, value: object
) -> None:
    inputs = []
    for each in WITHOUT_BF16:
        zero = "" if each == "BYTES" else 0
        data = [zero, value if each == datatype else zero]
        inputs.append({"name": f"in_{each}", "shape": [1, 2], "datatype": each, "data": data})
    assert f"'in_{datatype}'" in error_of(infer(http, every_datatype, {"inputs": inputs}), 400)


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_not_a_number_is_taken_where_numbers_may_be_none_and_only_there(
    http: httpx.Client, mlp: str, every_datatype: str, token: str
) -> None:
    body = json.dumps(with_input(data=[[1, 2, 3, 4]])).replace("4]]", f"{token}]]").encode()
    assert infer(http, mlp, body).status_code == 200
    integers = {"name": "in_INT32", "shape": [1, 2], "datatype": "INT32", "data": [0, 4]}
    body = json.dumps({"inputs": [integers]}).replace("4]", f"{token}]").encode()
    assert "'in_INT32'" in error_of(infer(http, every_datatype, body), 400)


# --- binary data, compression -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "size", "named"),
    [
        (b"\0" * 15, None, "'x'"),
        (b"\0" * 17, None, "'x'"),
        (b"\0" * 32, None, "'x'"),
        (b"", None, "'x'"),
        (b"\0" * 16, 15, "'x'"),
        (b"\0" * 16, 17, "'x'"),
        (b"\0" * 20, 16, "additional"),
        (b"\0" * 16, -1, "'x'"),
        (b"\0" * 16, 2**63, "'x'"),
        (b"\0" * 16, "16", "'x'"),
        (b"\0" * 16, 16.0, "'x'"),
        (b"\0" * 16, True, "'x'"),
    ],
)
def test_binary_data_of_another_size_is_refused(
    http: httpx.Client, mlp: str, data: bytes, size: object, named: str
) -> None:
    assert named in error_of(send_binary(http, mlp, *binary(data, size=size)), 400)


@pytest.mark.parametrize("length", ["-1", "abc", "1.5", "99999999999999999999", "0x10", "", "1", "10"])
def test_wrong_header_length_is_refused(http: httpx.Client, mlp: str, length: str) -> None:
    body, _ = binary(b"\0" * 16)
    assert error_of(send_binary(http, mlp, body, length), 400)


@pytest.mark.parametrize("off", [-1, 1, 16, 1000])
def test_header_length_that_is_off_is_refused(http: httpx.Client, mlp: str, off: int) -> None:
    body, length = binary(b"\0" * 16)
    assert error_of(send_binary(http, mlp, body, length + off), 400)


def test_raw_binary_body_of_the_wrong_size_is_refused(http: httpx.Client, mlp: str, arithmetic: str) -> None:
    assert send_binary(http, mlp, np.array(ROW, np.float32).tobytes(), 0).status_code == 200
    assert "'x'" in error_of(send_binary(http, mlp, b"\0" * 15, 0), 400)
    assert "one input" in error_of(send_binary(http, arithmetic, b"\0" * 16, 0), 400)


@pytest.mark.parametrize(
    "data",
    [
        b"\x05\0\0\0abc",
        b"\xff\xff\xff\xffabc",
        b"\x03\0\0",
        b"\x03\0\0\0abc\x01",
        b"\x01\0\0\0\xff",
        b"",
    ],
    ids=["too-short", "4-GiB", "no-length", "rest", "not-utf8", "nothing"],
)
def test_damaged_text_elements_are_refused(http: httpx.Client, text: str, data: bytes) -> None:
    tensor = {"name": "x", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
    header = json.dumps({"inputs": [tensor]}).encode()
    assert "'x'" in error_of(send_binary(http, text, header + data, len(header)), 400)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize("damage", ["plain", "cut", "tail", "twisted"])
def test_damaged_compression_is_refused(http: httpx.Client, mlp: str, encoding: str, damage: str) -> None:
    plain = json.dumps(GOOD).encode()
    packed = gzip.compress(plain, mtime=0) if encoding == "gzip" else zlib.compress(plain)
    body = {
        "plain": plain,
        "cut": packed[:-3],
        "tail": packed + b"tail",
        "twisted": packed[:20] + bytes([packed[20] ^ 0xFF]) + packed[21:],
    }[damage]
    assert encoding in error_of(infer(http, mlp, body, content_encoding=encoding), 400)


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, deflate", "x"])
def test_other_compressions_are_refused(http: httpx.Client, mlp: str, encoding: str) -> None:
    assert error_of(infer(http, mlp, json.dumps(GOOD).encode(), content_encoding=encoding), 415)


def test_zip_bomb_is_refused(http: httpx.Client, mlp: str) -> None:
    bomb = gzip.compress(b"\0" * (4 * MAX_BODY_BYTES), compresslevel=1, mtime=0)
    assert len(bomb) < MAX_BODY_BYTES >> 5
    assert "decompresses to more" in error_of(infer(http, mlp, bomb, content_encoding="gzip"), 413)


# --- anything ---------------------------------------------------------------------------------------------------------

ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True)
    | st.text(max_size=10)
    | st.sampled_from(["x", "FP32", "BYTES", "scores", "label"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
VALID: dict[str, Any] = {
    "id": "1",
    "parameters": {"binary_data_output": False, "timeout": 1_000_000, "custom": "a"},
    "inputs": [
        {"name": "x", "shape": [2, 4], "datatype": "FP32", "parameters": {}, "data": [[1, 2, 3, 4], [5, 6, 7, 8]]}
    ],
    "outputs": [
        {"name": "scores", "parameters": {"binary_data": False, "classification": 2}},
        {"name": "label", "parameters": {"binary_data": False}},
    ],
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*path, key)
        yield from places(each, (*path, key))


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid request with up to three things changed: values replaced, taken away or doubled, bytes twisted."""
    body = deepcopy(VALID)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from([*places(body)] or [()]))
        if not path:
            break
        *way, last = path
        holder: Any = body
        for key in way:
            holder = holder[key]
        match draw(st.sampled_from(["replace", "remove", "double"])):
            case "replace":
                holder[last] = draw(ANY_JSON)
            case "remove":
                del holder[last]
            case "double" if isinstance(holder, list):
                holder.append(deepcopy(holder[last]))
            case _:
                holder[f"{last}2"] = holder[last]
    content = bytearray(json.dumps(body).encode())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.sampled_from([None, None, None, len(content) // 2]))])


HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "inference-header-content-length": st.sampled_from(["0", "1", "50", "100000", "-5", "x"]),
        "content-encoding": st.sampled_from(["identity", "gzip", "br"]),
        "accept-encoding": st.sampled_from(["gzip", "deflate", "*;q=0", "nonsense"]),
        "x-request-timeout-ms": st.sampled_from(["1000", "x"]),
        "content-type": st.sampled_from(["text/plain", "application/octet-stream", "multipart/form-data"]),
        "expect": st.just("100-continue"),
    },
)


def test_no_mutation_of_a_valid_request_is_the_platforms_fault(http: httpx.Client, mlp: str) -> None:
    @settings(max_examples=300, suppress_health_check=list(HealthCheck))
    @given(body=mutated(), headers=st.one_of(st.just({}), HEADERS))
    def check(body: bytes, headers: dict[str, str]) -> None:
        answer = http.post(f"/v2/models/{mlp}/infer", content=body, headers=headers)
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, (answer.status_code, answer.text)
        if answer.status_code != 200:
            assert error_of(answer, answer.status_code)

    check()


def test_no_bytes_at_all_are_the_platforms_fault(platform: Platform, mlp: str) -> None:
    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(noise=st.binary(max_size=200), cut=st.integers(0, 120), shape=st.lists(st.integers(-3, 2**40), max_size=3))
    def check(noise: bytes, cut: int, shape: list[int]) -> None:
        body, length = binary(noise, shape=shape)
        request = post(f"/v2/models/{mlp}/infer", body, f"Inference-Header-Content-Length: {length}")
        for content in (request, request[:cut] + noise + b"\r\n\r\n"):
            try:
                status, _ = exchange(platform.port, content, patience_s=0.3)
            except TimeoutError:
                continue  # It waits for the rest of what looked like a request.
            assert status < 500 or status == 501

    check()
