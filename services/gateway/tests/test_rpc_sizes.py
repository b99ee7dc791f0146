"""Large gRPC messages through the gateway, and how many of them it takes at once."""

import asyncio

import grpc.aio
import orjson
import pytest
from grpc.aio import StreamStreamMultiCallable, UnaryUnaryMultiCallable
from lepton_common.http2 import literal
from lepton_common.http2_frames import PREFACE, Flag, Kind, frame, settings_frame
from lepton_common.http11 import Request
from lepton_common.records import Scope
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


async def test_messages_of_one_tenant_leave_room_for_others_and_are_refused_until_there_is_more(lab: Lab) -> None:
    waiting: list[Request] = []
    arrived = asyncio.Semaphore(0)

    def wait(request: Request) -> None:
        waiting.append(request)
        arrived.release()

    lab.mesh.handler = wait
    await lab.serve("m", 1, tenant="other")
    theirs = await lab.new_key(Scope.INFER, tenant="other")
    await lab.until("/v2/models/m/ready", 503, key=theirs)
    mine, other = ((("authorization", f"Bearer {key}"),) for key in (lab.key, theirs))
    message = infer_request(LARGE)
    async with grpc.aio.insecure_channel("{}:{}".format(*lab.grpc_address)) as channel:
        infer: UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(INFER)
        calls = [asyncio.ensure_future(infer(message, metadata=each)) for each in (mine, mine, other)]
        async with lab.patience():
            for _ in calls:
                await arrived.acquire()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await infer(message, metadata=mine)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert dict(refused.value.trailing_metadata() or ())["retry-after"] == "1"
        assert "room" in (refused.value.details() or "")
        lab.mesh.handler = echo
        for each in waiting:
            echo(each)
        await asyncio.gather(*calls)
        await infer(message, metadata=mine)


async def test_who_only_announces_large_messages_keeps_nobody_out(lab: Lab) -> None:
    lab.mesh.handler = echo
    head = [
        *((b":method", b"POST"), (b":scheme", b"http"), (b":path", INFER.encode()), (b":authority", b"localhost")),
        *((b"content-type", b"application/grpc"), (b"authorization", b"Bearer " + lab.key.encode())),
    ]
    announced = b"\0" + (1_000_000).to_bytes(4, "big")
    frames = b"".join(
        frame(Kind.HEADERS, Flag.END_HEADERS, 2 * number + 1, b"".join(literal(*each) for each in head))
        + frame(Kind.DATA, 0, 2 * number + 1, announced)
        for number in range(20)
    )
    reader, writer = await asyncio.open_connection(*lab.grpc_address)
    writer.write(PREFACE + settings_frame({}) + frames + frame(Kind.PING, 0, 0, b"are read"))
    async with lab.patience():
        await reader.readuntil(b"are read")
        async with grpc.aio.insecure_channel("{}:{}".format(*lab.grpc_address)) as channel:
            infer: UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(INFER)
            answer = await infer(infer_request(LARGE), metadata=(("authorization", f"Bearer {lab.key}"),))
            live: UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
                "/inference.GRPCInferenceService/ServerLive"
            )
            alive = pb.ServerLiveResponse.FromString(await live(b"")).live
    writer.close()
    assert pb.ModelInferResponse.FromString(answer).raw_output_contents == [LARGE]
    assert alive
