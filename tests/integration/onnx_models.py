"""Small ONNX models that behave in one known way each, and what they answer."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]

FEATURES, CLASSES = 4, ("ant", "bee", "cat")

# OIP's datatypes with the ONNX element types and numpy dtypes that carry them.
DATATYPES: dict[str, tuple[int, Any]] = {
    "BOOL": (TensorProto.BOOL, np.bool_),
    "UINT8": (TensorProto.UINT8, np.uint8),
    "UINT16": (TensorProto.UINT16, np.uint16),
    "UINT32": (TensorProto.UINT32, np.uint32),
    "UINT64": (TensorProto.UINT64, np.uint64),
    "INT8": (TensorProto.INT8, np.int8),
    "INT16": (TensorProto.INT16, np.int16),
    "INT32": (TensorProto.INT32, np.int32),
    "INT64": (TensorProto.INT64, np.int64),
    "FP16": (TensorProto.FLOAT16, np.float16),
    "FP32": (TensorProto.FLOAT, np.float32),
    "FP64": (TensorProto.DOUBLE, np.float64),
    "BF16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
    "BYTES": (TensorProto.STRING, np.object_),
}

# onnxruntime's Python interface cannot give one model both bfloat16 and text.
WITHOUT_BF16 = tuple(name for name in DATATYPES if name != "BF16")
WITH_BF16 = ("BF16", "FP32")

Port = tuple[str, int, Sequence[int | str]]


def mlp(seed: int = 1, *, labels: bool = True) -> onnx.ModelProto:
    """x FP32 [-1, 4] → scores FP32 [-1, 3], label INT64 [-1]. Another seed is another model; may be batched."""
    model = _model(
        [
            helper.make_node("MatMul", ["x", "w1"], ["hidden"]),
            helper.make_node("Relu", ["hidden"], ["active"]),
            helper.make_node("MatMul", ["active", "w2"], ["scores"]),
            helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0),
        ],
        [("x", TensorProto.FLOAT, ("rows", FEATURES))],
        [("scores", TensorProto.FLOAT, ("rows", len(CLASSES))), ("label", TensorProto.INT64, ("rows",))],
        dict(zip(("w1", "w2"), _weights(seed), strict=True)),
    )
    if labels:
        helper.set_model_props(model, {"labels": json.dumps(CLASSES)})
    return model


def mlp_scores(x: Array, seed: int = 1) -> Array:
    """What `mlp(seed)` answers."""
    w1, w2 = _weights(seed)
    scores: Array = np.maximum(x @ w1, 0) @ w2
    return scores


def _weights(seed: int) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    return (
        random.standard_normal((FEATURES, 16)).astype(np.float32),
        random.standard_normal((16, len(CLASSES))).astype(np.float32),
    )


def identities(datatypes: Iterable[str]) -> onnx.ModelProto:
    """in_T [-1, 2] → out_T [-1, 2], unchanged, for each of the datatypes T; may be batched."""
    names = tuple(datatypes)
    pair = ("rows", 2)
    return _model(
        [helper.make_node("Identity", [f"in_{name}"], [f"out_{name}"]) for name in names],
        [(f"in_{name}", DATATYPES[name][0], pair) for name in names],
        [(f"out_{name}", DATATYPES[name][0], pair) for name in names],
    )


def echo(datatype: str = "FP32", shape: Sequence[int | str] = ("rows", "columns")) -> onnx.ModelProto:
    """x → y, unchanged; by default of any two-dimensional shape."""
    element = DATATYPES[datatype][0]
    return _model([helper.make_node("Identity", ["x"], ["y"])], [("x", element, shape)], [("y", element, shape)])


def arithmetic() -> onnx.ModelProto:
    """a, b FP32 [-1, 2] → sum, difference, product FP32 [-1, 2]; may be batched."""
    pair = ("rows", 2)
    outputs = {"sum": "Add", "difference": "Sub", "product": "Mul"}
    return _model(
        [helper.make_node(operator, ["a", "b"], [name]) for name, operator in outputs.items()],
        [(name, TensorProto.FLOAT, pair) for name in ("a", "b")],
        [(name, TensorProto.FLOAT, pair) for name in outputs],
    )


def slow() -> onnx.ModelProto:
    """rounds INT64 [1] → y FP32 []: takes about 10 µs of one core a round."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["goes"]), helper.make_node("MatMul", ["a", "eye"], ["product"])],
        "round",
        [_port("i", TensorProto.INT64, ()), _port("go", TensorProto.BOOL, ()), _port("a", TensorProto.FLOAT, (64, 64))],
        [_port("goes", TensorProto.BOOL, ()), _port("product", TensorProto.FLOAT, (64, 64))],
    )
    return _model(
        [
            helper.make_node("Squeeze", ["rounds"], ["count"]),
            helper.make_node("Loop", ["count", "true", "ones"], ["last"], body=body),
            helper.make_node("ReduceMean", ["last"], ["y"], keepdims=0),
        ],
        [("rounds", TensorProto.INT64, (1,))],
        [("y", TensorProto.FLOAT, ())],
        {"true": np.array(True), "ones": np.ones((64, 64), np.float32), "eye": np.eye(64, dtype=np.float32)},
    )


def fragile() -> onnx.ModelProto:
    """x FP32 [-1], shape INT64 [2] → y FP32 [-1, -1]: fails while it runs when x does not fill the shape."""
    return _model(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        [("x", TensorProto.FLOAT, ("n",)), ("shape", TensorProto.INT64, (2,))],
        [("y", TensorProto.FLOAT, ("rows", "columns"))],
    )


def lookup() -> onnx.ModelProto:
    """index INT64 [-1] → y FP32 [-1], a tenth of it: fails while it runs on an index that is not 0 to 9."""
    return _model(
        [helper.make_node("Gather", ["tenths", "index"], ["y"])],
        [("index", TensorProto.INT64, ("rows",))],
        [("y", TensorProto.FLOAT, ("rows",))],
        {"tenths": np.arange(10, dtype=np.float32) / 10},
    )


def neighbourly() -> onnx.ModelProto:
    """x FP32 [-1, 2] → y FP32 [-1, 2]: the shares of each column. Rows depend on each other: never to be batched."""
    return _model(
        [helper.make_node("Softmax", ["x"], ["y"], axis=0)],
        [("x", TensorProto.FLOAT, ("rows", 2))],
        [("y", TensorProto.FLOAT, ("rows", 2))],
    )


def laborious(rounds: int) -> onnx.ModelProto:
    """As `mlp`, after so many rounds of work, about 10 µs of one core each."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["goes"]), helper.make_node("MatMul", ["a", "eye"], ["product"])],
        "round",
        [_port("i", TensorProto.INT64, ()), _port("go", TensorProto.BOOL, ()), _port("a", TensorProto.FLOAT, (64, 64))],
        [_port("goes", TensorProto.BOOL, ()), _port("product", TensorProto.FLOAT, (64, 64))],
    )
    return _spoilt(
        [
            helper.make_node("Loop", ["count", "true", "ones"], ["last"], body=body),
            helper.make_node("ReduceMin", ["last"], ["least"], keepdims=0),
            helper.make_node("Mul", ["x", "least"], ["spoilt"]),
        ],
        {
            "true": np.array(True),
            "count": np.array(rounds),
            "ones": np.ones((64, 64), np.float32),
            "eye": np.eye(64, dtype=np.float32),
        },
    )


def failing_at_four() -> onnx.ModelProto:
    """As `mlp`, but fails while it runs, and says so, when the last of x is 4: a worker's trial does not find out."""
    return _spoilt(
        [
            *_last_is_four(),
            helper.make_node("Where", ["is_four", "wrong", "right"], ["shape"]),
            helper.make_node("Reshape", ["x", "shape"], ["spoilt"]),
        ],
        {"right": np.array([-1, FEATURES]), "wrong": np.array([-1, 7]), **_FOUR},
    )


def crashing_at_four() -> onnx.ModelProto:
    """As `mlp`, but kills its worker when the last of x is 4: the smallest integer, divided by -1, does not fit."""
    return _spoilt(
        [
            *_last_is_four(),
            helper.make_node("Where", ["is_four", "minus", "plus"], ["divisor"]),
            helper.make_node("Div", ["smallest", "divisor"], ["never"]),
            helper.make_node("Cast", ["never"], ["number"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["number", "zero"], ["nothing"]),
            helper.make_node("Add", ["x", "nothing"], ["spoilt"]),
        ],
        {
            "smallest": np.array([-(2**31)], np.int32),
            "minus": np.array([-1], np.int32),
            "plus": np.array([1], np.int32),
            "zero": np.array([0], np.float32),
            **_FOUR,
        },
    )


_FOUR = {"last": np.array(FEATURES - 1), "four": np.array(4, np.float32)}


def _last_is_four() -> list[onnx.NodeProto]:
    """x → is_four [1]: whether the last feature of any row is 4."""
    return [
        helper.make_node("Gather", ["x", "last"], ["lasts"], axis=1),
        helper.make_node("ReduceMax", ["lasts"], ["greatest"], keepdims=1),
        helper.make_node("Equal", ["greatest", "four"], ["is_four"]),
    ]


def _spoilt(nodes: list[onnx.NodeProto], constants: dict[str, Array]) -> onnx.ModelProto:
    """As `mlp(1)`, of `spoilt`, which the nodes make of x."""
    model = mlp(1)
    (first, *rest) = model.graph.node
    first.input[0] = "spoilt"
    spoilt = [*nodes, first, *rest]
    del model.graph.node[:]
    model.graph.node.extend(spoilt)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    onnx.checker.check_model(model, full_check=True)
    return model


def refused_at_load() -> onnx.ModelProto:
    """A valid model that no worker can load: onnxruntime has no kernel that takes a BF16 number to a power on a CPU."""
    shape = ("rows", 2)
    return _model(
        [helper.make_node("Pow", ["x", "x"], ["y"])],
        [("x", TensorProto.BFLOAT16, shape)],
        [("y", TensorProto.BFLOAT16, shape)],
    )


def crashing_at_load() -> onnx.ModelProto:
    """A valid model that kills the process that loads it: the smallest integer, divided by -1, does not fit."""
    return _model(
        [helper.make_node("Div", ["least", "minus"], ["never"]), helper.make_node("Add", ["x", "never"], ["y"])],
        [("x", TensorProto.INT32, ("rows",))],
        [("y", TensorProto.INT32, ("rows",))],
        {"least": np.array([-(2**31)], np.int32), "minus": np.array([-1], np.int32)},
    )


def hanging_at_load() -> onnx.ModelProto:
    """A valid model that never comes back when a worker tries it."""
    shape = ("rows",)
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["goes"]), helper.make_node("Identity", ["a"], ["b"])],
        "round",
        [_port("i", TensorProto.INT64, ()), _port("go", TensorProto.BOOL, ()), _port("a", TensorProto.FLOAT, shape)],
        [_port("goes", TensorProto.BOOL, ()), _port("b", TensorProto.FLOAT, shape)],
    )
    return _model(
        [helper.make_node("Loop", ["count", "true", "x"], ["y"], body=body)],
        [("x", TensorProto.FLOAT, shape)],
        [("y", TensorProto.FLOAT, shape)],
        {"true": np.array(True), "count": np.array(2**62)},
    )


def _model(
    nodes: Iterable[onnx.NodeProto],
    inputs: Iterable[Port],
    outputs: Iterable[Port],
    constants: dict[str, Array] | None = None,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "model",
        [_port(*each) for each in inputs],
        [_port(*each) for each in outputs],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def _port(name: str, element: int, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, list(shape))
