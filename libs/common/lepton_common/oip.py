"""Open Inference Protocol v2: infer requests and responses as JSON and with the binary tensor extension.

Sources: kserve/open-inference-protocol, triton-inference-server/server docs/protocol (binary data, classification,
parameters), and what tritonclient 2.73 puts on the wire: no content type is looked at, every error is
`{"error": "<string>"}`, `id` is never null, only 200 is success.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson

from lepton_common.errors import Invalid
from lepton_common.signature import DTYPES, Signature, TensorSpec
from lepton_common.tensors import Array, checked_shape, classify, from_binary, from_json, to_binary, to_json

EXTENSIONS = (
    "classification",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
)

Parameters = Mapping[str, Any]  # of str, int, float or bool

_NONE: Parameters = {}


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output the caller wants: binary or JSON; with `classification` > 0 as its top classes."""

    name: str
    binary: bool = False
    classification: int = 0


@dataclass(slots=True)
class InferRequest:
    """A checked request: every input of the signature, in the signature's order, and the outputs to answer with."""

    id: str
    inputs: dict[str, Array]
    outputs: Sequence[RequestedOutput]
    parameters: Parameters


def decode_request(body: bytes | bytearray, header_length: int | None, signature: Signature) -> InferRequest:
    """The request in `body`, checked against the signature. Raises Invalid naming what is wrong.

    `header_length` is the value of Inference-Header-Content-Length: None for pure JSON, 0 for a raw binary body.
    """
    if header_length == 0:
        return _decode_raw(body, signature)
    tail: memoryview | None = None
    if header_length is not None:
        if header_length > len(body):
            raise Invalid(f"Inference-Header-Content-Length is {header_length}, the body has {len(body)} bytes")
        tail = memoryview(body)[header_length:]
        body = body[:header_length]
    document = _parse(body)
    if type(document) is not dict:
        raise Invalid("the request must be a JSON object")
    request_id = document.get("id")
    if request_id is None:
        request_id = _new_id()
    elif type(request_id) is not str:
        raise Invalid("id must be a string")
    parameters = _parameters("the request", document) if "parameters" in document else _NONE
    return InferRequest(
        request_id,
        _decode_inputs(document.get("inputs"), tail, signature),
        _decode_outputs(document.get("outputs"), parameters, signature),
        parameters,
    )


def header_length_of(value: bytes | None) -> int | None:
    """The number in an Inference-Header-Content-Length header. Raises Invalid when it is not one."""
    if value is None:
        return None
    if not value.isdigit() or len(value) > 18:
        raise Invalid("Inference-Header-Content-Length must be a non-negative integer")
    return int(value)


def encode_response(
    model: str,
    version: str,
    request: InferRequest,
    outputs: Mapping[str, Array],
    signature: Signature,
    labels: Sequence[str] = (),
) -> tuple[int | None, list[bytes | memoryview]]:
    """(Inference-Header-Content-Length or None for pure JSON, parts of the body), the requested outputs in their order.

    Raises Invalid when an output cannot be given in the form that was asked for.
    """
    json_parts = [_response_head(model, version), orjson.dumps(request.id), b',"outputs":[']
    binary_parts: list[bytes | memoryview] = []
    for position, wanted in enumerate(request.outputs):
        if position:
            json_parts.append(b",")
        spec = signature.output_of[wanted.name]
        array, datatype = outputs[wanted.name], spec.datatype
        if wanted.classification:
            batched = array.ndim > 1 and spec.shape[0] == -1
            array, datatype = classify(spec.name, array, batched, wanted.classification, labels), "BYTES"
        if wanted.binary:
            data = to_binary(datatype, array)
            binary_parts.append(data)
            json_parts.append(_output_head(spec.name, datatype, array.shape))
            json_parts.append(b'"parameters":{"binary_data_size":%d}}' % len(data))
        else:
            json_parts += (
                _output_head(spec.name, datatype, array.shape),
                b'"data":',
                to_json(spec.name, datatype, array),
                b"}",
            )
    json_parts.append(b"]}")
    header = b"".join(json_parts)
    return (len(header) if any(wanted.binary for wanted in request.outputs) else None), [header, *binary_parts]


def _new_id() -> str:
    # Unique is enough. os.urandom would give up the interpreter lock to the model's threads for every request.
    return f"{random.getrandbits(128):032x}"


def _parse(body: bytes | bytearray) -> Any:
    """The JSON value of the body. orjson first; it refuses NaN and Infinity, which clients do send."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        reason = str(error) if body else "the body is empty"
    try:
        text = body.decode()
        document = json.loads(text)
        if "\\u" in text:
            json.dumps(document, ensure_ascii=False).encode()  # a lone surrogate is not text
    except (ValueError, RecursionError):
        raise Invalid(f"the request is not JSON: {reason}") from None
    return document


def _parameters(owner: str, item: Mapping[str, Any]) -> Parameters:
    parameters = item.get("parameters")
    if parameters is None:
        return _NONE
    if type(parameters) is not dict:
        raise Invalid(f"{owner}: parameters must be an object")
    for key, value in parameters.items():
        if not isinstance(value, str | int | float | bool):
            raise Invalid(f"{owner}: parameter {key[:80]!r} must be a string, number or boolean")
    return parameters


def _flag(owner: str, parameters: Parameters, key: str, default: bool) -> bool:
    value = parameters.get(key, default)
    if type(value) is not bool:
        raise Invalid(f"{owner}: parameter {key} must be true or false")
    return value


def _decode_inputs(items: object, tail: memoryview | None, signature: Signature) -> dict[str, Array]:
    if type(items) is not list:
        raise Invalid("inputs must be a list")
    arrays: dict[str, Array] = {}
    offset = 0
    for item in items:
        spec = _input_spec(item, signature)
        if spec.name in arrays:
            raise Invalid(f"input {spec.name!r} is given twice")
        shape = checked_shape(spec, item.get("shape"))
        size = None
        if "parameters" in item:
            size = _parameters(f"input {spec.name!r}", item).get("binary_data_size")
        if size is None:
            if "data" not in item:
                raise Invalid(f"input {spec.name!r}: data is missing")
            arrays[spec.name] = from_json(spec, shape, item["data"])
            continue
        if tail is None:
            raise Invalid(f"input {spec.name!r}: binary_data_size needs the header Inference-Header-Content-Length")
        if type(size) is not int or size < 0 or size > len(tail) - offset:
            raise Invalid(f"input {spec.name!r}: unexpected size {size}, {len(tail) - offset} bytes are left")
        arrays[spec.name] = from_binary(spec, shape, tail[offset : offset + size])
        offset += size
    if tail is not None and offset != len(tail):
        raise Invalid(f"unexpected additional input data: {len(tail) - offset} bytes after the last binary input")
    if len(arrays) != len(signature.inputs):
        missing = next(spec for spec in signature.inputs if spec.name not in arrays)
        raise Invalid(f"input {missing.name!r} is missing: {missing.datatype} {list(missing.shape)}")
    return arrays if len(arrays) == 1 else {name: arrays[name] for name in signature.input_of}


def _input_spec(item: object, signature: Signature) -> TensorSpec:
    """The spec of an input entry whose name and datatype are right."""
    if type(item) is not dict:
        raise Invalid("each of inputs must be an object")
    name = item.get("name")
    spec = signature.input_of.get(name) if type(name) is str else None
    if spec is None:
        expected = ", ".join(map(repr, signature.input_of))
        raise Invalid(f"input {str(name)[:80]!r} is unknown: the model takes {expected}")
    if item.get("datatype") != spec.datatype:
        got = item.get("datatype")
        shown = got if type(got) is str and got in DTYPES else repr(got)[:80]
        raise Invalid(f"input {spec.name!r}: got datatype {shown}, expected {spec.datatype}")
    return spec


@lru_cache(maxsize=1024)
def _all_outputs(names: tuple[str, ...], binary: bool) -> tuple[RequestedOutput, ...]:
    return tuple(RequestedOutput(name, binary) for name in names)


def _decode_outputs(items: object, parameters: Parameters, signature: Signature) -> Sequence[RequestedOutput]:
    binary = _flag("the request", parameters, "binary_data_output", False) if parameters else False
    if items is None or items == []:
        return _all_outputs(tuple(signature.output_of), binary)
    if type(items) is not list:
        raise Invalid("outputs must be a list")
    wanted: dict[str, RequestedOutput] = {}
    for item in items:
        name = item.get("name") if type(item) is dict else None
        if type(name) is not str or name not in signature.output_of:
            expected = ", ".join(map(repr, signature.output_of))
            raise Invalid(f"output {str(name)[:80]!r} is unknown: the model gives {expected}")
        if name in wanted:
            raise Invalid(f"output {name!r} is asked for twice")
        owner = f"output {name!r}"
        own = _parameters(owner, item)
        top = own.get("classification", 0)
        if type(top) is not int or top < 0:
            raise Invalid(f"{owner}: classification must be a non-negative integer")
        wanted[name] = RequestedOutput(name, _flag(owner, own, "binary_data", binary), top)
    return tuple(wanted.values())


def _decode_raw(body: bytes | bytearray, signature: Signature) -> InferRequest:
    """A raw binary request: the whole body is the only input, the unknown dimension follows from its size."""
    if len(signature.inputs) != 1:
        raise Invalid(f"a raw binary request needs a model with one input, this one has {len(signature.inputs)}")
    spec = signature.inputs[0]
    if spec.datatype == "BYTES":
        shape = tuple(1 if dim == -1 else dim for dim in spec.shape)
        data = memoryview(len(body).to_bytes(4, "little") + body)
    else:
        shape = _raw_shape(spec, len(body))
        data = memoryview(body)
    array = from_binary(spec, checked_shape(spec, list(shape)), data)
    return InferRequest(_new_id(), {spec.name: array}, _all_outputs(tuple(signature.output_of), True), _NONE)


def _raw_shape(spec: TensorSpec, size_bytes: int) -> tuple[int, ...]:
    """The shape that `size_bytes` fill: one unknown dimension is solved; of several the first, the batch, is 1."""
    shape = list(spec.shape)
    if shape.count(-1) > 1 and shape[0] == -1:
        shape[0] = 1
    if shape.count(-1) > 1:
        raise Invalid(f"input {spec.name!r}: a raw binary request cannot tell the unknown dimensions of {shape}")
    if -1 in shape:
        known_bytes = DTYPES[spec.datatype].itemsize
        for dim in shape:
            known_bytes *= 1 if dim == -1 else dim
        shape[shape.index(-1)] = size_bytes // known_bytes if known_bytes else 0
    return tuple(shape)


@lru_cache(maxsize=1024)
def _response_head(model: str, version: str) -> bytes:
    return orjson.dumps({"model_name": model, "model_version": version})[:-1] + b',"id":'


@lru_cache(maxsize=4096)
def _output_head(name: str, datatype: str, shape: tuple[int, ...]) -> bytes:
    return orjson.dumps({"name": name, "datatype": datatype, "shape": shape})[:-1] + b","
