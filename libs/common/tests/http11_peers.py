"""The other end of a server's connections, and handlers for it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import orjson
from lepton_common.http11 import JSON, Handler, Request, Server, ServerLimits

GET = b"GET /a?b=c HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        message = orjson.loads(self.body)["error"]
        assert isinstance(message, str)
        return message


class Peer:
    """The other end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, *pieces: bytes) -> None:
        self.writer.writelines(pieces)

    async def answer(self, *, body: bool = True) -> Answer:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:-2])
        length = int(headers.get("content-length", "0")) if body else 0
        return Answer(int(head[0].split(" ")[1]), headers, await self.reader.readexactly(length))

    async def closed(self) -> bool:
        """The server closed and had nothing more to say."""
        return await self.reader.read() == b""


class MemoryTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.ended = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return 0

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    close = abort = write_eof

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


@asynccontextmanager
async def connected(server: Server) -> AsyncIterator[Peer]:
    reader, writer = await asyncio.open_connection(*server.address, limit=1 << 26)
    try:
        yield Peer(reader, writer)
    finally:
        writer.close()


@asynccontextmanager
async def serving(
    handler: Handler, limits: ServerLimits | None = None, no_room_headers: bytes = b""
) -> AsyncIterator[Server]:
    server = Server(handler, limits, no_room_headers)
    await server.start("127.0.0.1")
    try:
        yield server
    finally:
        await server.drain(0)


def post(body: bytes) -> bytes:
    return b"%bContent-Length: %d\r\n\r\n%b" % (POST, len(body), body)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def echo(request: Request) -> None:
    seen = {"method": request.method, "path": request.path, "query": request.query, "body": request.body.decode()}
    request.respond(200, JSON, orjson.dumps(seen))


class Held:
    """A handler that keeps requests until the test answers them."""

    def __init__(self) -> None:
        self.arrived: asyncio.Queue[Request] = asyncio.Queue()
        self.left: asyncio.Queue[Request] = asyncio.Queue()

    def __call__(self, request: Request) -> None:
        request.on_disconnect = lambda: self.left.put_nowait(request)
        self.arrived.put_nowait(request)


async def refused(limits: ServerLimits, *pieces: bytes) -> Answer:
    """The error that `pieces` get; no request reaches a handler, and the connection ends."""
    held = Held()
    async with serving(held, limits) as server, connected(server) as peer:
        peer.send(*pieces)
        answer = await peer.answer()
        assert await peer.closed()
        assert held.arrived.empty()
        assert answer.headers["connection"] == "close"
        assert answer.headers["content-type"] == "application/json"
        assert answer.error
        return answer
