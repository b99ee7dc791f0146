"""Infer responses of gRPC, made of OIP's binary form: raw tensors pass through as bytes.

What tritonclient and Triton's own examples rely on: answers always come in `raw_output_contents`, also to requests with
typed contents, unless the request's parameter `binary_data_output` is false.
"""

from array import array
from functools import lru_cache

import orjson
from lepton_common.errors import Invalid
from lepton_common.http11_request import Buffer

from lepton_gateway import inference_pb2 as pb
from lepton_gateway.rpc_codec import CONTENTS, LENGTH_BYTES, MAX_USUAL_BYTES

_ID = pb.ModelInferResponse.ID_FIELD_NUMBER
_ID_KEY = b',"id":"'  # behind the model's name and version, so that it is met first
_RAW_OUTPUT = pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER


def encode_response(body: bytes, header_length: int, *, typed: bool, final: bool) -> list[Buffer]:
    """A ModelInferResponse in pieces, of an HTTP answer whose outputs are all binary. `final` marks it as the last."""
    head = body[:header_length]
    if typed:
        return [_typed_response(head, memoryview(body)[header_length:], final).SerializeToString()]
    describe = _described if header_length <= MAX_USUAL_BYTES else _described.__wrapped__
    usual, identity = _split(head)
    first, tags = describe(usual, final)
    pieces: list[Buffer] = [first, tagged(_ID, len(identity)), identity] if identity else [first]
    view, offset = memoryview(body), header_length
    for tag, size in tags:
        pieces += (tag, view[offset : offset + size])
        offset += size
    return pieces


def _split(head: bytes) -> tuple[bytes, bytes]:
    """The head with an empty id, the same for all answers of a kind, and the id. One with escapes stays in the head."""
    start = head.index(_ID_KEY) + len(_ID_KEY)
    end = head.index(b'"', start)
    identity = head[start:end]
    return (head, b"") if b"\\" in identity else (head[:start] + head[end:], identity)


@lru_cache(maxsize=1024)
def _described(head: bytes, final: bool) -> tuple[bytes, tuple[tuple[bytes, int], ...]]:
    """The response without its raw outputs, and what stands before each of these, with its size in bytes."""
    response, sizes = _response_of(head, final=final)
    return response.SerializeToString(), tuple((tagged(_RAW_OUTPUT, size), size) for size in sizes)


def _typed_response(head: bytes, tensors: memoryview, final: bool) -> pb.ModelInferResponse:
    response, sizes = _response_of(head, final=final)
    offset = 0
    for output, size in zip(response.outputs, sizes, strict=True):
        _fill(output, bytes(tensors[offset : offset + size]))
        offset += size
    return response


def _response_of(head: bytes, *, final: bool) -> tuple[pb.ModelInferResponse, list[int]]:
    """The response without what its outputs hold, and their sizes in bytes."""
    document = orjson.loads(head)
    response = pb.ModelInferResponse(
        model_name=document["model_name"], model_version=document["model_version"], id=document["id"]
    )
    if final:
        response.parameters["triton_final_response"].bool_param = True
    for each in document["outputs"]:
        response.outputs.add(name=each["name"], datatype=each["datatype"], shape=each["shape"])
    return response, [each["parameters"]["binary_data_size"] for each in document["outputs"]]


def tagged(field: int, size: int) -> bytes:
    """What stands in a message before a field of so many bytes."""
    found = bytearray((field << 3 | 2,))
    while size > 0x7F:
        found.append(size & 0x7F | 0x80)
        size >>= 7
    found.append(size)
    return bytes(found)


def _fill(output: pb.ModelInferResponse.InferOutputTensor, data: bytes) -> None:
    """The output's typed contents. Raises Invalid for a datatype that has none."""
    known = CONTENTS.get(output.datatype)
    if known is None:
        raise Invalid(f"output {output.name!r}: {output.datatype} has no typed contents: leave out binary_data_output")
    field, code = known
    values = getattr(output.contents, field)
    if code:
        values.extend(array(code, data))
        return
    offset = 0
    while offset < len(data):
        start = offset + LENGTH_BYTES
        offset = start + int.from_bytes(data[offset:start], "little")
        values.append(data[start:offset])
