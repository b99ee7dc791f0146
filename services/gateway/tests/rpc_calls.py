"""gRPC calls of the gateway as bytes on a socket: many at once, without a client that checks what it sends."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, DataReceived, ResponseReceived, StreamEnded, StreamReset, TrailersReceived

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"


@dataclass
class Answered:
    """What came back of one call: its gRPC status and message, -1 where the stream was reset."""

    status: int = -1
    message: str = ""
    body: bytearray = field(default_factory=bytearray)
    ends: int = 0


def framed(message: bytes) -> bytes:
    return b"\x00" + len(message).to_bytes(4, "big") + message


async def call_all(
    address: tuple[str, int], key: str, bodies: Iterable[tuple[str, bytes]], at_once: int = 100
) -> list[Answered]:
    """The answers to all calls, (path, body), in their order, over one connection."""
    reader, writer = await asyncio.open_connection(*address)
    client = H2Connection(H2Configuration(header_encoding=None))
    client.initiate_connection()
    waiting = list(bodies)[::-1]
    answers: dict[int, Answered] = {}
    open_calls: set[int] = set()

    def begin() -> None:
        while waiting and len(open_calls) < at_once:
            path, body = waiting.pop()
            number = client.get_next_available_stream_id()
            headers = [(":method", "POST"), (":scheme", "http"), (":authority", "x"), (":path", path)]
            more = [("te", "trailers"), ("content-type", "application/grpc"), ("authorization", f"Bearer {key}")]
            client.send_headers(number, headers + more)
            client.send_data(number, body, end_stream=True)
            answers[number] = Answered()
            open_calls.add(number)

    begin()
    while open_calls:
        writer.write(client.data_to_send())
        async with asyncio.timeout(10):
            data = await reader.read(1 << 18)
        assert data, "the gateway closed the connection"
        for event in client.receive_data(data):
            match event:
                case ResponseReceived() | TrailersReceived():
                    headers_of = dict(event.headers)
                    if b"grpc-status" in headers_of:
                        answers[event.stream_id].status = int(headers_of[b"grpc-status"])
                        answers[event.stream_id].message = headers_of.get(b"grpc-message", b"").decode()
                case DataReceived():
                    answers[event.stream_id].body += event.data
                    client.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                case StreamEnded() | StreamReset() if event.stream_id is not None:
                    answers[event.stream_id].ends += isinstance(event, StreamEnded)
                    open_calls.discard(event.stream_id)
                case ConnectionTerminated():
                    raise AssertionError(f"the gateway said farewell: {event.error_code} {event.additional_data!r}")
        begin()
    writer.close()
    await writer.wait_closed()
    return [answers[number] for number in sorted(answers)]
