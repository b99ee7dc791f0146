"""The HTTP/2 server under gRPC: asyncio.Protocol, no task, future or timer per request.

    server = Server(handler)                  # handler(stream) -> Sink | None, on the loop's thread
    await server.start("127.0.0.1", 8001)
    stream.reply(head, body, trailers)        # once; an answer to a peer that left is dropped
    await server.drain(grace_s=10)

Cleartext with prior knowledge, as gRPC speaks it inside a mesh. An echoed request costs 1.6 times the CPU that it costs
on `http11.py`; on grpc.aio it costs 28 times. It is as safe: limits on every size and time, on how many streams a peer
may have, and on frames that cost it nothing (rapid reset, floods of pings, settings, continuations).
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from lepton_common.http2_connection import Connection
from lepton_common.http2_frames import Code
from lepton_common.http2_headers import RequestHead, literal
from lepton_common.http2_stream import Sink, Stream
from lepton_common.listener import Listener

__all__ = ["Code", "Handler", "RequestHead", "Server", "ServerLimits", "Sink", "Stream", "literal"]

Handler = Callable[[Stream], Sink | None]


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What a peer may cost. Windows are in bytes: so much may be under way of one body, and of all of them.

    Frames that carry nothing cost 1, what makes work or undoes it 8; of `max_cost` a tenth is forgiven every 0.1 s. A
    gRPC client in a hurry pings once a round trip, and a proxy passes on what many callers give up at once.
    """

    max_header_bytes: int = 32 << 10
    max_streams: int = 1024
    stream_window: int = 1 << 20
    connection_window: int = 8 << 20
    max_cost: int = 10_000
    max_unsent_bytes: int = 1 << 30  # of answers that the server's peers together do not take
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    quiet_timeout_s: float = 60.0  # with requests open; then the peer is asked whether it is there
    idle_timeout_s: float = 3600.0
    write_timeout_s: float = 30.0


class Server(Listener[Connection]):
    """Listens on one address and hands every request to `handler` as soon as its headers are there."""

    def __init__(self, handler: Handler, limits: ServerLimits | None = None) -> None:
        super().__init__()
        self.handler = handler
        self.limits = limits or ServerLimits()
        self.unsent_bytes = 0

    def accept(self) -> asyncio.Protocol:
        return Connection(self)

    def failed(self, stream: Stream, error: Exception) -> None:
        """A handler or sink raised: the loop's exception handler gets the error."""
        path = stream.head.path[:200].decode("latin-1")
        self.loop.call_exception_handler({"message": f"handler of {path} failed", "exception": error})

    def sweep(self) -> None:
        for connection in tuple(self.connections):
            connection.sweep(self.now)
        if self.unsent_bytes > self.limits.max_unsent_bytes:
            self._shed()

    def _shed(self) -> None:
        """Those who have taken nothing for the longest time lose their answers, until there is room."""
        streams = [each for peer in self.connections for each in peer.receiver.streams.values() if each.unsent_bytes]
        for stream in sorted(streams, key=lambda each: each.write_deadline):
            if self.unsent_bytes <= self.limits.max_unsent_bytes:
                return
            stream.reset(Code.ENHANCE_YOUR_CALM)
