"""Infer requests and responses of gRPC as OIP's binary form and back: raw tensors pass through as bytes.

What tritonclient and Triton's own examples rely on: answers always come in `raw_output_contents`, also to requests with
typed contents, unless the request's parameter `binary_data_output` is false.
"""

import sys
from array import array
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import orjson
from lepton_common.errors import Invalid, Unsupported

from lepton_gateway import inference_pb2 as pb

# The field of InferTensorContents for a datatype, and the array type of its raw form.
_CONTENTS = {
    "BOOL": ("bool_contents", "B"),
    "INT8": ("int_contents", "b"),
    "INT16": ("int_contents", "h"),
    "INT32": ("int_contents", "i"),
    "INT64": ("int64_contents", "q"),
    "UINT8": ("uint_contents", "B"),
    "UINT16": ("uint_contents", "H"),
    "UINT32": ("uint_contents", "I"),
    "UINT64": ("uint64_contents", "Q"),
    "FP32": ("fp32_contents", "f"),
    "FP64": ("fp64_contents", "d"),
    "BYTES": ("bytes_contents", ""),
}
_LENGTH_BYTES = 4
_RAW_REPLY = "binary_data_output"

assert sys.byteorder == "little", "raw tensors are little-endian"


def infer_target(model: str, version: str) -> bytes:
    """The path of the model's inference."""
    return _target(model, version, "/infer")


@lru_cache(maxsize=4096)
def _target(model: str, version: str, verb: str) -> bytes:
    middle = f"/versions/{quote(version, safe='')}" if version else ""
    return f"/v2/models/{quote(model, safe='')}{middle}{verb}".encode()


def model_target(model: str, version: str, verb: str = "") -> bytes:
    """The path of a model, or of something about it: `/ready`, `/config`, `/stats`. Raises Invalid without a name."""
    if not model:
        raise Invalid("name: a model's name is missing")
    return _target(model, version, verb)


def encode_request(request: pb.ModelInferRequest) -> tuple[int, bytes]:
    """(length of the JSON part, body) of the same request over HTTP. Raises Invalid naming what is wrong."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise Invalid(f"raw_input_contents: {len(raw)} entries, expected one for each of {len(request.inputs)} inputs")
    parameters = parameters_of(request.parameters)
    parameters[_RAW_REPLY] = True
    tensors: list[bytes] = []
    inputs = []
    for index, each in enumerate(request.inputs):
        if each.parameters:
            _refuse_shared_memory(each.parameters)
        if not raw:
            data = _raw_of(each)
        elif each.HasField("contents"):
            raise Invalid(
                "contents field must not be specified when using raw_input_contents "
                f"for '{each.name}' for model '{request.model_name}'"
            )
        else:
            data = raw[index]
        tensors.append(data)
        inputs.append(
            {
                "name": each.name,
                "datatype": each.datatype,
                "shape": list(each.shape),
                "parameters": {"binary_data_size": len(data)},
            }
        )
    document: dict[str, Any] = {"inputs": inputs, "parameters": parameters}
    if request.id:
        document["id"] = request.id
    if request.outputs:
        document["outputs"] = [_output_of(each) for each in request.outputs]
    head = orjson.dumps(document)
    return len(head), b"".join((head, *tensors))


def wants_typed(request: pb.ModelInferRequest) -> bool:
    """Whether the answer shall come in typed contents."""
    choice = request.parameters.get(_RAW_REPLY) if request.parameters else None
    return choice is not None and choice.WhichOneof("parameter_choice") == "bool_param" and not choice.bool_param


def decode_response(body: bytes, header_length: int, *, typed: bool) -> pb.ModelInferResponse:
    """The response in an HTTP answer whose outputs are all binary."""
    document = orjson.loads(body[:header_length])
    response = pb.ModelInferResponse(
        model_name=document["model_name"], model_version=document["model_version"], id=document["id"]
    )
    offset = header_length
    for each in document["outputs"]:
        end = offset + each["parameters"]["binary_data_size"]
        output = response.outputs.add(name=each["name"], datatype=each["datatype"], shape=each["shape"])
        if typed:
            _fill(output, body[offset:end])
        else:
            response.raw_output_contents.append(body[offset:end])
        offset = end
    return response


def parameters_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The chosen values by name. Raises Invalid for a parameter without one."""
    found: dict[str, Any] = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is None:
            raise Invalid(f"parameter {name[:80]!r} has no value")
        found[name] = getattr(parameter, choice)
    return found


def _output_of(output: pb.ModelInferRequest.InferRequestedOutputTensor) -> dict[str, Any]:
    if not output.parameters:
        return {"name": output.name}
    _refuse_shared_memory(output.parameters)
    own = parameters_of(output.parameters)
    own["binary_data"] = True
    return {"name": output.name, "parameters": own}


def _refuse_shared_memory(parameters: Mapping[str, Any]) -> None:
    if any(name.startswith("shared_memory") for name in parameters):
        raise Unsupported("shared memory is not supported: send tensors as raw_input_contents")


def _raw_of(tensor: pb.ModelInferRequest.InferInputTensor) -> bytes:
    """The typed contents in their binary form. Raises Invalid."""
    known = _CONTENTS.get(tensor.datatype)
    if known is None:
        wanted = f"datatype {tensor.datatype[:20]!r} has no typed contents: use raw_input_contents"
        raise Invalid(f"input {tensor.name[:80]!r}: {wanted}")
    field, code = known
    filled = [each.name for each, _ in tensor.contents.ListFields()]
    if filled not in ([], [field]):
        raise Invalid(f"input {tensor.name[:80]!r}: {tensor.datatype} goes into {field}, got {', '.join(filled)}")
    values = getattr(tensor.contents, field)
    if not code:
        return b"".join(part for each in values for part in (len(each).to_bytes(_LENGTH_BYTES, "little"), each))
    try:
        return array(code, values).tobytes()
    except OverflowError:
        raise Invalid(f"input {tensor.name[:80]!r}: a value does not fit {tensor.datatype}") from None


def _fill(output: pb.ModelInferResponse.InferOutputTensor, data: bytes) -> None:
    """The output's typed contents. Raises Invalid for a datatype that has none."""
    known = _CONTENTS.get(output.datatype)
    if known is None:
        raise Invalid(f"output {output.name!r}: {output.datatype} has no typed contents: leave out {_RAW_REPLY}")
    field, code = known
    values = getattr(output.contents, field)
    if code:
        values.extend(array(code, data))
        return
    offset = 0
    while offset < len(data):
        start = offset + _LENGTH_BYTES
        offset = start + int.from_bytes(data[offset:start], "little")
        values.append(data[start:offset])
