"""Requests of gRPC as the worker reads them: the same tensors, whatever their datatype and form."""

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from lepton_common import oip
from lepton_common.errors import Invalid
from lepton_common.signature import DTYPES, Signature, TensorSpec
from lepton_common.tensors import Array, to_binary
from lepton_gateway import inference_pb2 as pb
from lepton_gateway import rpc_codec
from lepton_gateway.rpc_answers import encode_response
from lepton_gateway.rpc_codec import encode_request

FIELDS = {
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "BOOL": "bool_contents",
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
SHAPES = arrays.array_shapes(min_dims=1, max_dims=3, max_side=4)


@st.composite
def tensors(draw: st.DrawFn, datatype: str) -> Array:
    shape = draw(SHAPES)
    if datatype == "BYTES":
        values = draw(st.lists(st.binary(max_size=20), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
        array = np.empty(len(values), dtype=object)
        array[:] = values
        return array.reshape(shape)
    bits = np.dtype(DTYPES[datatype])
    raw = draw(arrays.arrays(np.uint8, (*shape, bits.itemsize)))
    if datatype == "BOOL":
        return np.asarray(raw[..., 0] % 2 == 1)
    found: Array = raw.view(bits).reshape(shape)
    return found


def signature_of(datatype: str, dims: int) -> Signature:
    tensor = TensorSpec(name="x", datatype=datatype, shape=(-1,) * dims)
    return Signature(inputs=(tensor,), outputs=(tensor,))


def decoded(message: bytes, signature: Signature) -> oip.InferRequest:
    """What the worker makes of the message, once it came through the gateway."""
    _, header_length, body = encode_request(message)
    return oip.decode_request(body, header_length, signature)


def request_of(datatype: str, array: Array, *, typed: bool) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="m", id="7")
    each = request.inputs.add(name="x", datatype=datatype, shape=array.shape)
    if typed:
        getattr(each.contents, FIELDS[datatype]).extend(array.ravel().tolist())
    else:
        request.raw_input_contents.append(bytes(to_binary(datatype, array)))
    return request


@pytest.mark.parametrize("datatype", DTYPES)
@settings(max_examples=30)
@given(data=st.data())
def test_any_tensor_arrives_as_it_was(datatype: str, data: st.DataObject) -> None:
    array = data.draw(tensors(datatype))
    typed = datatype in FIELDS and data.draw(st.booleans())
    if typed and datatype in ("FP32", "FP64"):
        array = np.nan_to_num(array)  # Of a NaN the bits may differ.
    request = request_of(datatype, array, typed=typed)
    found = decoded(request.SerializeToString(), signature_of(datatype, array.ndim))
    assert found.id == "7"
    assert found.inputs["x"].shape == array.shape
    assert to_binary(datatype, found.inputs["x"]) == to_binary(datatype, array)


@given(st.lists(st.binary(max_size=300), max_size=4), st.text(max_size=5), st.integers(0, 2**40), st.booleans())
def test_large_messages_are_read_as_protobuf_reads_them(raw: list[bytes], name: str, big: int, unknown: bool) -> None:
    request = pb.ModelInferRequest(model_name=name, raw_input_contents=raw)
    request.inputs.add(name="x", shape=[big, -1])
    request.parameters["p"].double_param = 0.5
    message = request.SerializeToString() + (b"\x99\x06" + bytes(8) + b"\x9d\x06" + bytes(4)) * unknown
    found = rpc_codec._split(memoryview(message))
    assert found is not None
    rest, pieces = found
    assert [bytes(each) for each in pieces] == raw
    whole = pb.ModelInferRequest.FromString(message)
    whole.ClearField("raw_input_contents")
    assert pb.ModelInferRequest.FromString(rest) == whole


@given(st.binary(max_size=40), st.integers(0, 45), st.binary(max_size=4))
def test_a_large_message_is_refused_where_protobuf_refuses_it(head: bytes, cut: int, insert: bytes) -> None:
    message = pb.ModelInferRequest(model_name="m", raw_input_contents=[head, b"abc"]).SerializeToString()
    message = message[:cut] + insert + message[cut + len(insert) :][: max(0, 40 - cut)]
    try:
        whole: pb.ModelInferRequest | None = pb.ModelInferRequest.FromString(message)
    except Exception:
        whole = None
    found = rpc_codec._split(memoryview(message))
    if found is None:
        return  # Protobuf judges.
    try:
        rest = pb.ModelInferRequest.FromString(found[0])
    except Exception:
        assert whole is None
        return
    assert whole is not None
    assert [bytes(each) for each in found[1]] == list(whole.raw_input_contents)
    assert rest.model_name == whole.model_name


def test_a_message_of_many_fields_is_for_protobuf_to_read() -> None:
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=[b"\1"] * 200)
    for index in range(200):
        request.inputs.add(name=f"x{index}", datatype="INT8", shape=[1])
    message = request.SerializeToString()
    assert rpc_codec._split(memoryview(message)) is None
    wanted, _, body = encode_request(message)
    assert body == wanted.head + b"\1" * 200


def test_messages_that_differ_in_their_ids_and_tensors_only_keep_each_their_own() -> None:
    found = []
    for identity, size in (("a", 1), ('"}', 2), ("", 2)):
        request = pb.ModelInferRequest(model_name="m", id=identity, raw_input_contents=[bytes(size)])
        request.inputs.add(name="x", datatype="INT8", shape=[-1])
        _, length, body = encode_request(request.SerializeToString())
        document = orjson.loads(body[:length])
        found.append((document.get("id", ""), document["inputs"][0]["parameters"]["binary_data_size"], body[length:]))
    assert found == [("a", 1, b"\0"), ('"}', 2, b"\0\0"), ("", 2, b"\0\0")]


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("datatype", FIELDS)
def test_an_answer_is_the_message_that_protobuf_would_make(datatype: str, typed: bool) -> None:
    array = np.array([b"a", b""], dtype=object) if datatype == "BYTES" else np.ones(2, DTYPES[datatype])
    raw = bytes(to_binary(datatype, array))
    output = {"name": "y", "datatype": datatype, "shape": [2], "parameters": {"binary_data_size": len(raw)}}
    head = orjson.dumps({"model_name": "m", "model_version": "3", "id": "7", "outputs": [output, output]})
    pieces = encode_response(head + raw + raw, len(head), typed=typed, final=True)
    response = pb.ModelInferResponse.FromString(b"".join(pieces))
    assert (response.model_name, response.model_version, response.id) == ("m", "3", "7")
    assert response.parameters["triton_final_response"].bool_param
    assert list(response.raw_output_contents) == ([] if typed else [raw, raw])
    if typed:
        assert list(getattr(response.outputs[1].contents, FIELDS[datatype])) == array.tolist()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_an_answer_has_its_own_id(identity: str) -> None:
    output = {"name": "y", "datatype": "INT8", "shape": [2], "parameters": {"binary_data_size": 2}}
    head = orjson.dumps({"model_name": "m", "model_version": "3", "id": identity, "outputs": [output]})
    pieces = encode_response(head + b"ab", len(head), typed=False, final=False)
    response = pb.ModelInferResponse.FromString(b"".join(pieces))
    assert (response.id, list(response.raw_output_contents)) == (identity, [b"ab"])


def broken(change: str) -> pb.ModelInferRequest:
    request = request_of("INT8", np.array([1], np.int8), typed=True)
    tensor = request.inputs[0]
    match change:
        case "overflow":
            tensor.contents.int_contents[0] = 300
        case "field":
            tensor.contents.fp32_contents.append(1)
        case "datatype":
            tensor.datatype = "FP16"
        case "both":
            request.raw_input_contents.append(b"1")
        case "count":
            request.raw_input_contents.extend([b"1", b"2"])
        case "shared":
            tensor.parameters["shared_memory_region"].string_param = "r"
        case "parameter":
            tensor.ClearField("parameters")
            request.parameters["empty"].SetInParent()
    return request


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("overflow", "input 'x': a value does not fit INT8"),
        ("field", "input 'x': INT8 goes into int_contents, got int_contents, fp32_contents"),
        ("datatype", "input 'x': datatype 'FP16' has no typed contents"),
        ("both", "contents field must not be specified when using raw_input_contents for 'x' for model 'm'"),
        ("count", "raw_input_contents: 2 entries, expected one for each of 1 inputs"),
        ("shared", "shared memory is not supported"),
        ("parameter", "parameter 'empty' has no value"),
    ],
)
def test_errors_name_the_input(change: str, told: str) -> None:
    with pytest.raises(Invalid, match=told.replace("(", r"\(")):
        encode_request(broken(change).SerializeToString())
