"""Requests of a model with one input, as callers write them, and answers as they read them."""

from typing import Any

import ml_dtypes
import numpy as np
import orjson
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from lepton_common import oip, tensors
from lepton_common.signature import DTYPES, Signature, TensorSpec
from lepton_common.tensors import Array

ROWS = Signature((TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, 2)),))


def one(datatype: str, shape: tuple[int, ...] = (-1,)) -> Signature:
    """A signature with one input `x` and one output `y` of the same kind."""
    return Signature((TensorSpec("x", datatype, shape),), (TensorSpec("y", datatype, shape),))


def request(data: object, shape: list[int], datatype: str = "FP32", **fields: Any) -> bytes:
    return orjson.dumps({"inputs": [{"name": "x", "shape": shape, "datatype": datatype, "data": data}], **fields})


def decode(data: object, shape: list[int], datatype: str, spec_shape: tuple[int, ...] = (-1,)) -> Array:
    return oip.decode_request(request(data, shape, datatype), None, one(datatype, spec_shape)).inputs["x"]


def binary_request(array: Array, datatype: str, **fields: Any) -> tuple[bytes, int]:
    data = bytes(tensors.to_binary(datatype, array))
    entry = {
        "name": "x",
        "shape": list(array.shape),
        "datatype": datatype,
        "parameters": {"binary_data_size": len(data)},
    }
    header = orjson.dumps({"inputs": [entry], **fields})
    return header + data, len(header)


def answer(request: oip.InferRequest, array: Array, signature: Signature) -> tuple[dict[str, Any], bytes]:
    """The response's JSON document and its binary part."""
    length, parts = oip.encode_response("m", "1", request, {"y": array}, signature)
    body = b"".join(parts)
    split = len(body) if length is None else length
    return orjson.loads(body[:split]), body[split:]


def arrays(datatype: str) -> st.SearchStrategy[Array]:
    shapes = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)
    if datatype == "BYTES":
        return hnp.arrays(object, shapes, elements=st.text(max_size=6).map(str.encode), fill=st.nothing())
    if datatype == "BF16":
        return hnp.arrays(np.float32, shapes, elements=st.floats(-(2.0**99), 2.0**99, width=32)).map(
            lambda array: array.astype(ml_dtypes.bfloat16)
        )
    return hnp.arrays(DTYPES[datatype], shapes)


def assert_same(got: Array, want: Array) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    if want.dtype == object:
        assert got.tolist() == want.tolist()
    else:
        assert got.tobytes() == want.tobytes()


TWO = Signature(
    (TensorSpec("a", "INT32", (-1,)), TensorSpec("b", "BYTES", (-1,))),
    (TensorSpec("p", "INT32", (-1,)), TensorSpec("q", "FP32", (-1, 3))),
)
