"""uvicorn as our services run it, over real sockets: what a peer that is slow, endless or deaf can hold."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from lepton_common import app_server
from lepton_common.app_server import AppServer
from starlette.types import Receive, Scope, Send

from .http11_peers import Peer

GET = b"GET /a HTTP/1.1\r\nhost: x\r\n"
MEGABYTE = b"x" * (1 << 20)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body and says how long it was; under /long it writes 64 MB."""
    size = 0
    while (message := await receive()).get("more_body"):
        size += len(message["body"])
    size += len(message.get("body", b""))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(64 if scope["path"] == "/long" else 0):
        await send({"type": "http.response.body", "body": MEGABYTE, "more_body": True})
    await send({"type": "http.response.body", "body": b"%d" % size})


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AppServer]:
    for name, value in {"_KEEP_ALIVE_S": 0.3, "_HEADER_TIMEOUT_S": 0.3, "_WRITE_TIMEOUT_S": 0.2}.items():
        monkeypatch.setattr(app_server, name, value)
    server = AppServer(app)
    await server.start("127.0.0.1", 0)
    yield server
    await server.drain(0)


@pytest.fixture
async def peer(server: AppServer) -> AsyncIterator[Peer]:
    reader, writer = await asyncio.open_connection(*server.address)
    yield Peer(reader, writer)
    writer.close()


async def ended(peer: Peer) -> bytes:
    """What the server still said before it ended the connection, which it does in time."""
    async with asyncio.timeout(10):
        try:
            return await peer.reader.read()
        except ConnectionResetError:
            return b""


@pytest.mark.parametrize(
    "pieces",
    [[], [b"\r\n"], [b"G"], [GET], [GET, b"a: b"], [GET + b"\r\n", b"\r\n"], [GET + b"\r\n", GET]],
    ids=["silent", "blank line", "letter", "no end", "half a header", "blank line later", "second request"],
)
async def test_request_that_does_not_come_is_not_waited_for(peer: Peer, pieces: list[bytes]) -> None:
    for piece in pieces:
        peer.send(piece)
        await asyncio.sleep(0.05)
    assert (await ended(peer)).count(b"200 OK") == sum(GET + b"\r\n" in piece for piece in pieces)


async def test_request_that_drips_in_is_cut(peer: Peer) -> None:
    async def drip() -> None:
        for letter in b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a" * 10_000:
            peer.send(bytes([letter]))
            await asyncio.sleep(0.05)

    dripping = asyncio.create_task(drip())
    assert await ended(peer) == b""
    assert not dripping.done(), "it was not over by itself"
    dripping.cancel()


@pytest.mark.parametrize(
    "head",
    [
        GET + b"".join(b"a%d: b\r\n" % n for n in range(200)) + b"\r\n",
        GET + b"a:\r\n" * 200 + b"\r\n",
        GET + b"a: " + b"b" * 500_000,
        GET + b"a" * 500_000,
        b"GET /" + b"a" * 500_000,
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3;" + b"a" * 500_000,
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n" + b"a" * 500_000,
    ],
    ids=["many", "many of one", "value", "name", "target", "chunk extension", "trailer"],
)
async def test_endless_head_is_refused(peer: Peer, head: bytes) -> None:
    peer.send(head)
    assert b"200 OK" not in await ended(peer)


async def test_slow_bodies_and_answers_that_are_read_are_no_fault(peer: Peer) -> None:
    for _ in range(2):
        peer.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 8\r\n\r\n")
        for _ in range(8):
            await asyncio.sleep(0.06)
            peer.send(b"x")
        async with asyncio.timeout(10):
            head = await peer.reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert await peer.reader.readuntil(b"0\r\n\r\n") == b"1\r\n8\r\n0\r\n\r\n"


async def test_answer_that_is_not_read_is_given_up(server: AppServer, peer: Peer) -> None:
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # it is one for reading, too
    peer.send(b"GET /long HTTP/1.1\r\nhost: x\r\n\r\n")
    async with asyncio.timeout(10):
        while not server.server_state.tasks:  # noqa: ASYNC110 - uvicorn tells nobody
            await asyncio.sleep(0.01)
        while server.server_state.tasks or server.server_state.connections:  # noqa: ASYNC110 - uvicorn tells nobody
            await asyncio.sleep(0.01)
    assert not server.server_state.tasks, "nothing is kept for a peer that does not read"
