"""Infer requests and responses of gRPC as OIP's binary form and back: raw tensors pass through as bytes.

What tritonclient and Triton's own examples rely on: answers always come in `raw_output_contents`, also to requests with
typed contents, unless the request's parameter `binary_data_output` is false.
"""

import sys
from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import orjson
from google.protobuf.message import DecodeError
from lepton_common.errors import Invalid, NotFound, Unsupported
from lepton_common.http11_request import Buffer

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
_LARGE_BYTES = 256 << 10
_MAX_NAME = 253
_MAX_VARINT_BYTES = 10
_RAW_INPUT = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | 2
_RAW_OUTPUT = pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER
_RAW_REPLY = "binary_data_output"

assert sys.byteorder == "little", "raw tensors are little-endian"


def infer_target(model: str, version: str) -> bytes:
    """The path of the model's inference. Raises NotFound for what can be no model's name or version."""
    return _checked_target(model, version, "/infer")


def _checked_target(model: str, version: str, verb: str) -> bytes:
    """Longer ones are no names, and must not be remembered."""
    if len(model) > _MAX_NAME:
        raise NotFound(f"model {model[:80]!r} is not known")
    if len(version) > _MAX_NAME:
        raise NotFound(f"model {model[:80]!r} has no version {version[:80]!r}")
    return _target(model, version, verb)


@lru_cache(maxsize=4096)
def _target(model: str, version: str, verb: str) -> bytes:
    middle = f"/versions/{quote(version, safe='')}" if version else ""
    return f"/v2/models/{quote(model, safe='')}{middle}{verb}".encode()


def model_target(model: str, version: str, verb: str = "") -> bytes:
    """The path of a model, or of something about it: `/ready`, `/config`, `/stats`. Raises Invalid without a name."""
    if not model:
        raise Invalid("name: a model's name is missing")
    return _checked_target(model, version, verb)


def read_request(message: bytes | bytearray) -> tuple[pb.ModelInferRequest, Sequence[Buffer]]:
    """The message, and its raw tensors: protobuf would copy large ones twice. Raises Invalid."""
    found = _split(memoryview(message)) if len(message) > _LARGE_BYTES else None
    try:
        if found is not None:
            rest, raw = found
            return pb.ModelInferRequest.FromString(rest), raw
        request = pb.ModelInferRequest.FromString(bytes(message))
        return request, request.raw_input_contents
    except DecodeError:
        raise Invalid("the message is not a ModelInferRequest") from None


def _split(message: memoryview) -> tuple[bytes, list[memoryview]] | None:
    """The message without its raw tensors, and they. None when it is something for protobuf to judge."""
    rest: list[memoryview] = []
    raw: list[memoryview] = []
    offset = 0
    while offset < len(message):
        tag, start = _varint(message, offset)
        match tag & 7:
            case 0:
                size, stop = 0, _varint(message, start)[1]
            case 1:
                stop = start + 8
            case 2:
                size, start = _varint(message, start)
                stop = start + size
            case 5:
                stop = start + 4
            case _:
                return None
        if not start <= stop <= len(message) or start < 0:
            return None
        if tag == _RAW_INPUT:
            raw.append(message[start:stop])
        else:
            rest.append(message[offset:stop])
        offset = stop
    return b"".join(rest), raw


def _varint(data: memoryview, offset: int) -> tuple[int, int]:
    """A number of protobuf's and where it ends, -1 when it does not."""
    value = 0
    for shift, byte in enumerate(data[offset : offset + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, offset + shift + 1
    return 0, -1


def tagged(field: int, size: int) -> bytes:
    """What stands in a message before a field of so many bytes."""
    found = bytearray((field << 3 | 2,))
    while size > 0x7F:
        found.append(size & 0x7F | 0x80)
        size >>= 7
    found.append(size)
    return bytes(found)


def encode_request(request: pb.ModelInferRequest, raw: Sequence[Buffer]) -> tuple[int, bytes]:
    """(length of the JSON part, body) of the same request over HTTP. Raises Invalid naming what is wrong."""
    if raw and len(raw) != len(request.inputs):
        raise Invalid(f"raw_input_contents: {len(raw)} entries, expected one for each of {len(request.inputs)} inputs")
    parameters = parameters_of(request.parameters)
    parameters[_RAW_REPLY] = True
    tensors: list[Buffer] = []
    inputs = []
    for index, each in enumerate(request.inputs):
        if each.parameters:
            _refuse_shared_memory(each.parameters)
        data: Buffer
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


def encode_response(body: bytes, header_length: int, *, typed: bool, final: bool) -> list[Buffer]:
    """A ModelInferResponse in pieces, of an HTTP answer whose outputs are all binary. `final` marks it as the last."""
    document = orjson.loads(body[:header_length])
    response = pb.ModelInferResponse(
        model_name=document["model_name"], model_version=document["model_version"], id=document["id"]
    )
    if final:
        response.parameters["triton_final_response"].bool_param = True
    raw: list[Buffer] = []
    view = memoryview(body)
    offset = header_length
    for each in document["outputs"]:
        size = each["parameters"]["binary_data_size"]
        data = view[offset : offset + size]
        output = response.outputs.add(name=each["name"], datatype=each["datatype"], shape=each["shape"])
        if typed:
            _fill(output, bytes(data))
        else:
            raw += (tagged(_RAW_OUTPUT, size), data)
        offset += size
    return [response.SerializeToString(), *raw]


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
