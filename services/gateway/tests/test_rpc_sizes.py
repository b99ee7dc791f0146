"""Large gRPC messages through the gateway, and how many of them it takes at once."""

import asyncio

import grpc.aio
import orjson
import pytest
from grpc.aio import StreamStreamMultiCallable, UnaryUnaryMultiCallable
from lepton_common.http11 import Request
from lepton_gateway import inference_pb2 as pb

from .lab import Lab
from .rpc_calls import INFER, STREAM

LARGE = bytes(range(256)) * 3600  # the lab takes 1 MB


def echo(request: Request) -> None:
    """The tensors come back as one output."""
    start = int(request.headers[b"inference-header-content-length"])
    data = request.body[start:]
    output = {"name": "y", "datatype": "UINT8", "shape": [len(data)], "parameters": {"binary_data_size": len(data)}}
    head = orjson.dumps({"model_name": "m", "model_version": "1", "id": "", "outputs": [output]})
    request.respond(200, b"inference-header-content-length: %d\r\n" % len(head), head + data)


def infer_request(*raw: bytes) -> bytes:
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=raw)
    for index, each in enumerate(raw):
        request.inputs.add(name=f"x{index}", datatype="UINT8", shape=[len(each)])
    return request.SerializeToString()


async def test_large_messages_pass_whole_alone_and_in_streams(lab: Lab) -> None:
    lab.mesh.handler = echo
    metadata = (("authorization", f"Bearer {lab.key}"),)
    raw = [LARGE[:500_000], LARGE[500_000:]]
    async with grpc.aio.insecure_channel("{}:{}".format(*lab.grpc_address)) as channel:
        infer: UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(INFER)
        answer = await infer(infer_request(*raw), metadata=metadata)
        assert pb.ModelInferResponse.FromString(answer).raw_output_contents == [LARGE]
        messages = [infer_request(*raw), infer_request(b"small"), infer_request(LARGE)]
        stream: StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(STREAM)
        answers = stream(iter(messages), metadata=metadata)
        got = [pb.ModelStreamInferResponse.FromString(each).infer_response async for each in answers]
    assert [each.raw_output_contents[0] for each in got] == [LARGE, b"small", LARGE]


async def test_messages_that_there_is_no_room_for_are_refused_until_there_is(lab: Lab) -> None:
    waiting: list[Request] = []
    full = asyncio.Event()

    def wait(request: Request) -> None:
        waiting.append(request)
        if len(waiting) == 4:
            full.set()

    lab.mesh.handler = wait
    metadata = (("authorization", f"Bearer {lab.key}"),)
    message = infer_request(LARGE)
    async with grpc.aio.insecure_channel("{}:{}".format(*lab.grpc_address)) as channel:
        infer: UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(INFER)
        calls = [asyncio.ensure_future(infer(message, metadata=metadata)) for _ in range(4)]
        async with lab.patience():
            await full.wait()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await infer(message, metadata=metadata)
        assert refused.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert "room" in (refused.value.details() or "")
        lab.mesh.handler = echo
        for each in waiting:
            echo(each)
        await asyncio.gather(*calls)
        await infer(message, metadata=metadata)
