"""numpy arrays to and from Open Inference Protocol bodies, in the binary tensor extension."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import ArrayLike, NDArray

from lepton.errors import Invalid, LeptonError

Array = NDArray[Any]
HEADER_LENGTH = "inference-header-content-length"

_DTYPES = {
    "BOOL": "?",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
_DATATYPES = {np.dtype(code): name for name, code in _DTYPES.items()}


class Outputs(dict[str, Array]):
    """A model's answer: arrays by output name. `version` is the model version that computed them, `request_id` what
    `trace` knows the request by, if it was traced.

    The arrays are views of the answer's bytes: copy one before writing into it.
    """

    def __init__(self, arrays: Mapping[str, Array], version: str, request_id: str = "") -> None:
        super().__init__(arrays)
        self.version = version
        self.request_id = request_id


def dtype_of(datatype: str) -> np.dtype[Any]:
    """The numpy dtype of an OIP datatype; BYTES are objects. Raises Invalid for an unknown one."""
    if datatype == "BYTES":
        return np.dtype(object)
    if datatype == "BF16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    if datatype not in _DTYPES:
        raise Invalid(f"unknown datatype {datatype!r}")
    return np.dtype(_DTYPES[datatype])


def encode(inputs: Mapping[str, ArrayLike], outputs: Sequence[str] | None = None) -> tuple[dict[str, str], bytes]:
    """Headers and body of an inference request that also wants its answer in binary. `outputs` None asks for all.

    Raises Invalid, naming the input, for values that are no tensor, and for inputs without names.
    """
    if not isinstance(inputs, Mapping):
        raise Invalid("The inputs are not given by name.", hint='Write {"NAME": array}.')
    tensors, blobs = [], []
    for name, value in inputs.items():
        datatype, array, blob = _encode_tensor(name, value)
        size = {"binary_data_size": len(blob)}
        tensors.append({"name": name, "shape": array.shape, "datatype": datatype, "parameters": size})
        blobs.append(blob)
    request: dict[str, Any] = {"inputs": tensors, "parameters": {"binary_data_output": True}}
    if outputs is not None:
        request["outputs"] = [{"name": name} for name in outputs]
    header = orjson.dumps(request)
    headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(header))}
    return headers, b"".join((header, *blobs))


def _encode_tensor(name: str, value: ArrayLike) -> tuple[str, Array, bytes]:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise Invalid(f"input {name!r}: rows of different lengths are no tensor") from error
    if array.dtype.kind in "OSU":
        return "BYTES", array, b"".join(_encode_element(name, each) for each in array.ravel().tolist())
    if array.dtype.name == "bfloat16":
        return "BF16", array, array.tobytes()
    datatype = _DATATYPES.get(array.dtype.newbyteorder("<"))
    if datatype is None:
        raise Invalid(f"input {name!r}: {array.dtype} has no counterpart in the Open Inference Protocol")
    return datatype, array, array.astype(_DTYPES[datatype], copy=False).tobytes()


def _encode_element(name: str, element: object) -> bytes:
    if isinstance(element, str):
        element = element.encode()
    if not isinstance(element, bytes):
        raise Invalid(f"input {name!r}: {type(element).__name__} among its elements, expected text or bytes")
    return len(element).to_bytes(4, "little") + element


def decode(headers: Mapping[str, str], body: bytes) -> Outputs:
    """The answer to an inference request, JSON or binary. Raises LeptonError when it is not a well-formed one."""
    try:
        length = int(headers.get(HEADER_LENGTH) or len(body))
        answer = _loads(body[:length])
        arrays, offset = {}, length
        for tensor in answer["outputs"]:
            size = (tensor.get("parameters") or {}).get("binary_data_size")
            if size is None:
                arrays[tensor["name"]] = from_json(tensor["datatype"], tensor["data"], tensor["shape"])
            else:
                arrays[tensor["name"]] = _from_binary(tensor, body[offset : offset + size])
                offset += size
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LeptonError("The answer is not an Open Inference Protocol response.") from error
    version = str(answer.get("model_version") or headers.get("x-lepton-version", ""))
    return Outputs(arrays, version, headers.get("x-request-id", ""))


def _loads(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return json.loads(data)  # Knows the bare NaN and Infinity that some servers send.


def _from_binary(tensor: dict[str, Any], blob: bytes) -> Array:
    shape = tensor["shape"]
    if tensor["datatype"] != "BYTES":
        return np.frombuffer(blob, dtype_of(tensor["datatype"])).reshape(shape)
    elements, offset = [], 0
    while offset < len(blob):
        start = offset + 4
        offset = start + int.from_bytes(blob[offset:start], "little")
        elements.append(blob[start:offset])
    return _objects(elements, shape)


def from_json(datatype: str, data: Any, shape: Sequence[int] | None = None) -> Array:
    """The array of a datatype from flat or nested JSON data; null is NaN.

    Raises ValueError or TypeError when the data does not fit datatype or shape.
    """
    if datatype == "BYTES":
        nested = np.array(data, dtype=object)
        flat = [each.encode() if isinstance(each, str) else each for each in nested.ravel().tolist()]
        return _objects(flat, nested.shape if shape is None else shape)
    dtype = dtype_of(datatype)
    # numpy reads None as NaN only on the way to a 64-bit float.
    array = np.array(data, dtype=np.float64 if dtype.kind in "fV" else dtype).astype(dtype)
    return array if shape is None else array.reshape(shape)


def _objects(elements: list[Any], shape: Sequence[int]) -> Array:
    array = np.empty(math.prod(shape), dtype=object)
    array[:] = elements
    return array.reshape(shape)


def to_json(array: Array) -> Any:
    """The array as nested lists; bytes become text, with U+FFFD for what is none."""
    if array.dtype == object:
        text = [each.decode(errors="replace") for each in array.ravel()]
        return _objects(text, array.shape).tolist()
    return array.tolist()
