import ml_dtypes
import numpy as np
import pytest
from lepton_common.errors import Invalid
from lepton_common.signature import DTYPES, TensorSpec
from lepton_worker.engine import Engine

from .conftest import OnnxFile

ONNX_TYPES = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "INT8": "int8",
    "INT16": "int16", "INT32": "int32", "INT64": "int64", "FP16": "float16", "FP32": "float", "FP64": "double",
    "BF16": "bfloat16", "BYTES": "string",
}  # fmt: skip


def echo(onnx_type: str) -> str:
    return f"g ({onnx_type}[N] x) => ({onnx_type}[N] y) {{ y = Identity(x) }}"


def test_the_signature_is_the_graphs(onnx_file: OnnxFile) -> None:
    graph = "g (float[N, 3] x, int64 k) => (float[N, 3] y, int64 z) { y = Identity(x) z = Identity(k) }"
    signature = Engine(onnx_file(graph), 1).signature
    assert signature.inputs == (TensorSpec("x", "FP32", (-1, 3)), TensorSpec("k", "INT64", ()))
    assert signature.outputs == (TensorSpec("y", "FP32", (-1, 3)), TensorSpec("z", "INT64", ()))


@pytest.mark.parametrize("datatype", ONNX_TYPES)
def test_every_datatype_goes_through(datatype: str, onnx_file: OnnxFile) -> None:
    engine = Engine(onnx_file(echo(ONNX_TYPES[datatype])), 1)
    assert engine.signature.inputs[0].datatype == datatype
    if datatype == "BYTES":
        given = np.array(["é".encode(), b""], object)
        assert engine.run({"x": given})["y"].tolist() == ["é", ""]
    else:
        given = np.array([0, 1, 1]).astype(DTYPES[datatype])
        got = engine.run({"x": given})["y"]
        assert got.dtype == given.dtype
        assert got.tobytes() == given.tobytes()


def test_every_datatype_is_covered() -> None:
    assert set(ONNX_TYPES) == set(DTYPES)


def test_a_value_read_from_a_request_may_be_read_only(onnx_file: OnnxFile) -> None:
    given = np.frombuffer(np.ones(2, np.float32).tobytes(), np.float32)
    assert Engine(onnx_file(echo("float")), 1).run({"x": given})["y"].tolist() == [1.0, 1.0]


def test_bfloat16_outputs_outlive_the_runtimes_own_value(onnx_file: OnnxFile) -> None:
    engine = Engine(onnx_file(echo("bfloat16")), 1)
    first = engine.run({"x": np.array([1.5, 2.5], ml_dtypes.bfloat16)})["y"]
    engine.run({"x": np.array([7, 8], ml_dtypes.bfloat16)})
    assert first.tolist() == [1.5, 2.5]


def test_labels_come_from_the_models_metadata(onnx_file: OnnxFile) -> None:
    assert Engine(onnx_file(labels='["cat", "dog"]'), 1).labels == ("cat", "dog")
    assert Engine(onnx_file(labels="cat, dog"), 1).labels == ()


def test_text_that_is_not_utf8_is_refused_by_name(onnx_file: OnnxFile) -> None:
    with pytest.raises(Invalid, match="input 'x': the model takes text"):
        Engine(onnx_file(echo("string")), 1).run({"x": np.array([b"\xff"], object)})


def test_a_value_that_the_model_refuses_is_the_callers_error(onnx_file: OnnxFile) -> None:
    engine = Engine(onnx_file("g (int64[N] x) => (float[N] y) <float[2] w = {1, 2}> { y = Gather(w, x) }"), 1)
    with pytest.raises(Invalid, match="out of data bounds, idx=7"):
        engine.run({"x": np.array([7])})


@pytest.mark.parametrize(
    "graph",
    [
        "g (float[N, M] x) => (float[P, Q] y) <int64[2] shape = {-1, 3}> { y = Reshape(x, shape) }",
        "g (float[N, M] x) => (int32[N, M] y) { i = Cast<to = 6>(x) z = Sub(i, i) y = Div(i, z) }",
    ],
)
def test_values_that_a_model_fails_on_are_refused_by_name_and_without_paths(graph: str, onnx_file: OnnxFile) -> None:
    with pytest.raises(Invalid, match=r"these values of 'x': .*(cannot be reshaped|division by zero)") as raised:
        Engine(onnx_file(graph), 1).run({"x": np.ones((2, 4), np.float32)})
    assert "/" not in raised.value.message
    assert ".h:" not in raised.value.message


def test_text_beside_bfloat16_is_refused_when_the_model_is_loaded(onnx_file: OnnxFile) -> None:
    graph = "g (bfloat16[N] x, string[N] s) => (bfloat16[N] y, string[N] t) { y = Identity(x) t = Identity(s) }"
    with pytest.raises(Invalid, match="input 's': onnxruntime does not run text and BF16"):
        Engine(onnx_file(graph), 1)


def test_bytes_that_are_no_model_are_refused(onnx_file: OnnxFile) -> None:
    path = onnx_file()
    path.write_bytes(b"not onnx")
    with pytest.raises(Invalid, match="cannot load the model") as raised:
        Engine(path, 1)
    assert str(path.parent) not in raised.value.message


def test_what_the_protocol_cannot_carry_is_refused(onnx_file: OnnxFile) -> None:
    graph = "g (float[N] x) => (seq(float[N]) y) { y = SequenceConstruct(x) }"
    with pytest.raises(Invalid, match=r"output 'y' is seq\(tensor\(float\)\)"):
        Engine(onnx_file(graph), 1)
