"""The hot path's HTTP/1.1 server: asyncio.Protocol on httptools, one plain call a request.

    server = Server(handler)                  # handler(request) -> None; it answers now or later, on the loop's thread
    await server.start("127.0.0.1", 8000)
    request.respond(200, JSON, body)          # exactly once; an answer to a peer that left is dropped
    await server.drain(grace_s=10)

`http11_client.py` is the other half. What makes it fast: no task, future or timer per request, one write per
answer, and heads that repeat are parsed once (`Server.heads`). What keeps it safe: llhttp in its strict mode, one
request at a time per connection however many are pipelined, and limits on every size and time.
"""

import asyncio
import email.utils
from collections.abc import Callable
from dataclasses import dataclass

from lepton_common.http11_body import SMALL_BYTES, Refused, Room
from lepton_common.http11_connection import Connection
from lepton_common.http11_request import JSON, Buffer, Head, Request, error_body, header_block
from lepton_common.listener import Listener

__all__ = [
    "JSON",
    "Buffer",
    "Handler",
    "Head",
    "Refused",
    "Request",
    "Screen",
    "Server",
    "ServerLimits",
    "error_body",
    "header_block",
]

Handler = Callable[[Request], None]
Screen = Callable[[Head, str], None]

_MAX_HEADS = 1024


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What a peer may cost. A head or body must be complete within its time, a write must make progress within its.

    Bodies over 64 KiB have `max_buffered_bytes` together, until they are answered: see `http11_body.Room`. One of
    `max_body_bytes` has room in any case.
    """

    max_body_bytes: int = 64 << 20
    max_buffered_bytes: int = 1 << 30
    max_header_bytes: int = 32 << 10
    max_headers: int = 128  # a proxy in front, which lets 100 through, adds a few
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    idle_timeout_s: float = 75.0  # longer than any client keeps a connection, so that it is the client who closes
    write_timeout_s: float = 30.0
    max_pipelined: int = 16


class Server(Listener[Connection]):
    """Listens on one address and hands every request to `handler`.

    `no_room_headers` are more header lines of the 503 for a body that there is no room for. `screen` is asked before
    memory is spent on a body of more than 64 KiB, with the request's head and peer: it raises `Refused` for one that
    nobody would take.
    """

    def __init__(
        self,
        handler: Handler,
        limits: ServerLimits | None = None,
        no_room_headers: bytes = b"",
        screen: Screen | None = None,
    ) -> None:
        super().__init__()
        self.handler = handler
        self.screen = screen
        self.limits = limits or ServerLimits()
        self.room = Room(max(self.limits.max_buffered_bytes, self.limits.max_body_bytes), no_room_headers)
        # Heads by their bytes: a caller repeats its own. Unique ones (trace ids) only pass through.
        self.heads: dict[bytes, Head] = {}
        self.date = b""

    def accept(self) -> asyncio.Protocol:
        return Connection(self)

    def remember(self, data: bytes, head: Head) -> None:
        """Keep the parsed head when `data` was exactly that head and the body it announced, which needs no room."""
        cut = data.find(b"\r\n\r\n") + 4
        if len(data) - cut == head.length <= SMALL_BYTES:
            if len(self.heads) >= _MAX_HEADS:
                self.heads.clear()
            self.heads[data[:cut]] = head

    def failed(self, request: Request, error: Exception) -> None:
        """A handler raised: the caller gets a 500 without details, the loop's exception handler gets the error."""
        self.loop.call_exception_handler(
            {"message": f"handler of {request.method} {request.path} failed", "exception": error}
        )
        if not request.answered:
            request.respond(500, JSON, error_body("internal error"))

    def sweep(self) -> None:
        self.date = f"date: {email.utils.formatdate(usegmt=True)}\r\n".encode()
        for connection in tuple(self.connections):
            connection.probe()
            if connection.deadline <= self.now:
                connection.expire()
