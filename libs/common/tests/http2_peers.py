"""Peers of the HTTP/2 server: the `h2` library as a client, on a transport in memory."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from lepton_common.http2 import Server, ServerLimits, Sink, Stream, literal
from lepton_common.http2_connection import Connection

HEAD = b"\x88" + literal(b"content-type", b"application/grpc")
TRAILERS = literal(b"grpc-status", b"0")
HEADERS = [(":method", "POST"), (":scheme", "http"), (":authority", "x"), (":path", "/echo"), ("te", "trailers")]


class Echo(Sink):
    """Answers with the body, once it is whole. What happened stands in `seen`."""

    def __init__(self, stream: Stream, seen: list[tuple[int, str, bytes]]) -> None:
        self.stream = stream
        self.seen = seen
        self.body = b""

    def received(self, data: bytes) -> None:
        self.body += data
        self.stream.credit(len(data))

    def ended(self) -> None:
        self.seen.append((self.stream.id, "ended", self.body))
        self.stream.reply(HEAD, self.body, TRAILERS)

    def lost(self) -> None:
        self.seen.append((self.stream.id, "lost", self.body))


class MemoryTransport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.ended = self.aborted = False
        self.unread = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.ended, "written after the end"
        self.written += data

    def get_write_buffer_size(self) -> int:
        return self.unread

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.ended = True

    def abort(self) -> None:
        self.aborted = True


class Talk:
    """A server's connection in memory and an `h2` client at its other end. Must be made on a running loop."""

    def __init__(self, server: Server | None = None, limits: ServerLimits | None = None) -> None:
        self.seen: list[tuple[int, str, bytes]] = []
        self.server = server or Server(lambda stream: Echo(stream, self.seen), limits)
        self.server.loop = asyncio.get_running_loop()
        self.transport = MemoryTransport()
        self.connection = Connection(self.server)
        self.connection.connection_made(self.transport)
        self.client = H2Connection(H2Configuration(header_encoding=None))
        self.client.initiate_connection()
        self.events: list[Event] = []
        self.bodies: Counter[int] = Counter()

    def is_over(self) -> bool:
        """Whether our side has closed the connection."""
        return self.transport.ended

    def begin(self, number: int, *, ends: bool = False, more: Sequence[tuple[str, str]] = ()) -> None:
        self.client.send_headers(number, [*HEADERS, *more], end_stream=ends)

    def request(self, number: int, body: bytes) -> None:
        self.begin(number)
        self.client.send_data(number, body, end_stream=True)

    def pass_on(self, raw: bytes = b"") -> None:
        """Both sides read what the other has written, and `raw`, until nobody has anything to say."""
        while True:
            sent = self.client.data_to_send() + raw
            raw = b""
            if sent:
                self.connection.data_received(sent)
            self.connection.sender.flush()
            got = bytes(self.transport.written)
            self.transport.written.clear()
            if not sent and not got:
                return
            if got:
                self.take(self.client.receive_data(got))

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            self.events.append(event)
            if isinstance(event, DataReceived):
                self.bodies[event.stream_id] += len(event.data)

    def at(self, seconds: float) -> None:
        """The server's clock goes on, and its sweep comes by."""
        self.server.now += seconds
        self.connection.sweep(self.server.now)

    @property
    def story(self) -> list[tuple[str, int | None]]:
        """What the client heard, in order, of each stream: its answers, its end, its reset with the code."""
        told: list[tuple[str, int | None]] = []
        for event in self.events:
            match event:
                case ResponseReceived():
                    told.append(("head", event.stream_id))
                case TrailersReceived():
                    told.append(("trailers", event.stream_id))
                case StreamEnded():
                    told.append(("end", event.stream_id))
                case StreamReset():
                    told.append((f"reset {int(event.error_code)}", event.stream_id))
                case ConnectionTerminated():
                    told.append((f"goaway {int(event.error_code or 0)}", event.last_stream_id))
        return told
