"""Infer requests of gRPC in OIP's binary form: raw tensors pass through as bytes."""

import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import orjson
from google.protobuf.message import DecodeError
from lepton_common.errors import Invalid, NotFound, Unsupported
from lepton_common.http11_request import Buffer

from lepton_gateway import inference_pb2 as pb

# The field of InferTensorContents for a datatype, and the array type of its raw form.
CONTENTS = {
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
LENGTH_BYTES = 4
# What is understood once and remembered: so many bytes beside the tensors, and so many of these, at most.
MAX_USUAL_BYTES = 4096
_MAX_USUAL_TENSORS = 64
# Protobuf is quicker with small messages and with many fields; large tensors it would copy twice.
_LARGE_BYTES = 64 << 10
_MAX_FIELDS = 256
_MAX_NAME = 253
_MAX_VARINT_BYTES = 10
_RAW_INPUT = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | 2
_RAW_REPLY = "binary_data_output"
_FINAL_REPLY = "triton_enable_empty_final_response"

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


@dataclass(frozen=True, slots=True)
class Wanted:
    """A ModelInferRequest, but for its raw tensors, as the HTTP request that means the same.

    Its body is `head`, which is JSON and lacks only the id, and the tensors: the raw ones, or `tensors`, which came in
    typed contents. The answer shall have typed contents if `typed`, and say that it is the last one if `final`.
    """

    target: bytes
    head: bytes
    tensors: bytes
    typed: bool
    final: bool


def encode_request(message: bytes | bytearray) -> tuple[Wanted, int, bytes]:
    """What the message asks for, the length of the JSON in front of its body over HTTP, and this body.

    Raises Invalid naming what is wrong, and NotFound. Raw tensors are not looked at. What is beside them and the id is
    the same in most messages of a caller: it is understood once.
    """
    found = _split(memoryview(message)) if len(message) > _LARGE_BYTES else None
    request = _parsed(bytes(message) if found is None else found[0])
    raw: Sequence[Buffer] = list(request.raw_input_contents) if found is None else found[1]
    identity, sizes = request.id, tuple(map(len, raw))
    request.ClearField("raw_input_contents")
    request.ClearField("id")
    rest = request.SerializeToString() if 0 < len(raw) <= _MAX_USUAL_TENSORS else b""
    wanted = _understood(rest, sizes) if 0 < len(rest) <= MAX_USUAL_BYTES else _wanted(request, sizes)
    head = b'%b,"id":%b}' % (wanted.head[:-1], orjson.dumps(identity)) if identity else wanted.head
    return wanted, len(head), b"".join((head, wanted.tensors, *raw))


def _split(message: memoryview) -> tuple[bytes, list[Buffer]] | None:
    """The message without its raw tensors, and they. None when it is something for protobuf to judge."""
    rest: list[memoryview] = []
    raw: list[Buffer] = []
    offset, end = 0, len(message)
    for _ in range(_MAX_FIELDS):
        if offset == end:
            return b"".join(rest), raw
        tag, start = _varint(message, offset)
        match tag & 7:
            case 0:
                stop = _varint(message, start)[1]
            case 1:
                stop = start + 8
            case 2:
                size, start = _varint(message, start)
                stop = start + size
            case 5:
                stop = start + 4
            case _:
                return None
        if not 0 < start <= stop <= end:
            return None
        if tag == _RAW_INPUT:
            raw.append(message[start:stop])
        else:
            rest.append(message[offset:stop])
        offset = stop
    return None


def _varint(data: memoryview, offset: int) -> tuple[int, int]:
    """A number of protobuf's and where it ends, -1 when it does not."""
    if 0 <= offset < len(data) and (value := data[offset]) < 0x80:
        return value, offset + 1
    value = 0
    for shift, byte in enumerate(data[offset : offset + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, offset + shift + 1
    return 0, -1


@lru_cache(maxsize=1024)
def _understood(message: bytes, sizes: tuple[int, ...]) -> Wanted:
    """See `encode_request`; `sizes` are of the raw tensors, in bytes."""
    return _wanted(_parsed(message), sizes)


def _parsed(message: bytes) -> pb.ModelInferRequest:
    try:
        return pb.ModelInferRequest.FromString(message)
    except DecodeError:
        raise Invalid("the message is not a ModelInferRequest") from None


def _wanted(request: pb.ModelInferRequest, sizes: tuple[int, ...]) -> Wanted:
    if not request.model_name:
        raise Invalid("model_name is missing")
    target = infer_target(request.model_name, request.model_version)
    if sizes and len(sizes) != len(request.inputs):
        raise Invalid(
            f"raw_input_contents: {len(sizes)} entries, expected one for each of {len(request.inputs)} inputs"
        )
    parameters = parameters_of(request.parameters)
    typed = parameters.get(_RAW_REPLY) is False
    final = _FINAL_REPLY in parameters
    parameters[_RAW_REPLY] = True
    tensors: list[bytes] = []
    inputs = []
    for index, each in enumerate(request.inputs):
        if each.parameters:
            _refuse_shared_memory(each.parameters)
        if not sizes:
            tensors.append(_raw_of(each))
        elif each.HasField("contents"):
            raise Invalid(
                "contents field must not be specified when using raw_input_contents "
                f"for '{each.name}' for model '{request.model_name}'"
            )
        size = sizes[index] if sizes else len(tensors[index])
        inputs.append(
            {
                "name": each.name,
                "datatype": each.datatype,
                "shape": list(each.shape),
                "parameters": {"binary_data_size": size},
            }
        )
    document: dict[str, Any] = {"inputs": inputs, "parameters": parameters}
    if request.outputs:
        document["outputs"] = [_output_of(each) for each in request.outputs]
    return Wanted(target, orjson.dumps(document), b"".join(tensors), typed, final)


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
    known = CONTENTS.get(tensor.datatype)
    if known is None:
        wanted = f"datatype {tensor.datatype[:20]!r} has no typed contents: use raw_input_contents"
        raise Invalid(f"input {tensor.name[:80]!r}: {wanted}")
    field, code = known
    filled = [each.name for each, _ in tensor.contents.ListFields()]
    if filled not in ([], [field]):
        raise Invalid(f"input {tensor.name[:80]!r}: {tensor.datatype} goes into {field}, got {', '.join(filled)}")
    values = getattr(tensor.contents, field)
    if not code:
        return b"".join(part for each in values for part in (len(each).to_bytes(LENGTH_BYTES, "little"), each))
    try:
        return array(code, values).tobytes()
    except OverflowError:
        raise Invalid(f"input {tensor.name[:80]!r}: a value does not fit {tensor.datatype}") from None
