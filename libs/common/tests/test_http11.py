"""The server over real sockets: what a peer may do."""

import asyncio
import socket

import orjson
import pytest
from lepton_common.http11 import Buffer, Request, Server, ServerLimits, header_block

from .http11_peers import CHUNKED, GET, POST, Held, connected, echo, refused, serving

# --- ordinary requests ---


async def test_a_request_is_answered_and_the_connection_kept() -> None:
    async with serving(echo) as server, connected(server) as peer:
        for body in (b"one", b"two", b"two", b""):
            peer.send(POST, b"content-length: %d\r\n\r\n" % len(body), body)
            answer = await peer.answer()
            assert orjson.loads(answer.body) == {"method": "POST", "path": "/", "query": "", "body": body.decode()}
            assert answer.status == 200
            assert answer.headers["content-type"] == "application/json"
            assert "gmt" in answer.headers["date"]
            assert "connection" not in answer.headers


async def test_headers_are_lower_case_trimmed_and_joined() -> None:
    held = Held()
    async with serving(held) as server, connected(server) as peer:
        peer.send(b"GET /a HTTP/1.1\r\nHOST: x\r\nAccept: a \t\r\nEmpty:\r\naccept:  b\r\n\r\n")
        request = await held.arrived.get()
        assert request.headers == {b"host": b"x", b"accept": b"a, b", b"empty": b""}
        assert request.peer == "127.0.0.1"


async def test_a_chunked_body_is_put_together_and_its_trailers_ignored() -> None:
    held = Held()
    async with serving(held) as server, connected(server) as peer:
        peer.send(CHUNKED, b"3\r\nabc\r\n5;x=y\r\ndefgh\r\n0\r\nAuthorization: nobody\r\n\r\n", GET)
        request = await held.arrived.get()
        assert request.body == b"abcdefgh"
        assert b"authorization" not in request.headers
        request.respond(200, b"")
        assert (await held.arrived.get()).path == "/a"


async def test_large_bodies_pass_both_ways_in_parts() -> None:
    body = bytes(range(256)) * 40_000
    parts: list[Buffer] = [memoryview(body)[:5], bytearray(body[5:]), b"end"]
    async with serving(lambda request: request.respond(200, b"", parts)) as server, connected(server) as peer:
        peer.send(POST, b"Content-Length: %d\r\n\r\n" % len(body), body)
        assert (await peer.answer()).body == body + b"end"


async def test_head_has_the_length_but_no_body() -> None:
    async with serving(echo) as server, connected(server) as peer:
        peer.send(GET.replace(b"GET", b"HEAD"), GET)
        answer = await peer.answer(body=False)
        assert int(answer.headers["content-length"]) > 0
        assert (await peer.answer()).status == 200


async def test_connection_close_is_obeyed() -> None:
    async with serving(echo) as server, connected(server) as peer:
        peer.send(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await peer.answer()).headers["connection"] == "close"
        assert await peer.closed()


async def test_http_1_0_is_closed_unless_it_asks_to_be_kept() -> None:
    async with serving(echo) as server, connected(server) as peer:
        peer.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert (await peer.answer()).headers["connection"] == "keep-alive"
        peer.send(b"GET / HTTP/1.0\r\n\r\n")
        assert (await peer.answer()).headers["connection"] == "close"
        assert await peer.closed()


async def test_pipelined_requests_are_answered_in_order() -> None:
    held = Held()
    async with serving(held) as server, connected(server) as peer:
        peer.send(*(b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % n for n in range(50)))
        for n in range(50):
            request = await held.arrived.get()
            assert request.path == f"/{n}"
            assert held.arrived.empty()  # The next one is handed over when this one is answered.
            request.respond(200, b"", request.target)
        assert [(await peer.answer()).body for _ in range(50)] == [b"/%d" % n for n in range(50)]


async def test_a_peer_that_pipelines_without_end_is_held_back() -> None:
    count = 30_000
    held = Held()
    async with serving(held, ServerLimits(max_pipelined=2)) as server, connected(server) as peer:
        peer.send((b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 1000 + b"\r\n\r\n") * count)
        request = await held.arrived.get()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(peer.writer.drain(), 0.3)
        server.handler = lambda request: request.respond(200, b"")
        request.respond(200, b"")
        for _ in range(count):
            assert (await peer.answer()).status == 200


# --- time ---


@pytest.mark.parametrize(
    ("limits", "pieces"),
    [
        (ServerLimits(header_timeout_s=0.1), [b"GET / HTTP/1.1\r\nHost"]),
        (ServerLimits(body_timeout_s=0.1), [POST + b"Content-Length: 3\r\n\r\nab"]),
    ],
    ids=["head", "body"],
)
async def test_a_request_that_does_not_arrive_in_time_gets_408(limits: ServerLimits, pieces: list[bytes]) -> None:
    assert (await refused(limits, *pieces)).status == 408


async def test_an_idle_connection_is_closed() -> None:
    async with serving(echo, ServerLimits(idle_timeout_s=0.1)) as server, connected(server) as peer:
        peer.send(GET)
        await peer.answer()
        assert await peer.closed()


async def test_a_handler_may_take_longer_than_every_limit() -> None:
    held = Held()
    limits = ServerLimits(idle_timeout_s=0.1, header_timeout_s=0.1, body_timeout_s=0.1)
    async with serving(held, limits) as server, connected(server) as peer:
        peer.send(GET, GET)
        for _ in range(2):
            request = await held.arrived.get()
            await asyncio.sleep(0.3)  # The time itself is what is tested.
            request.respond(200, b"")
            assert (await peer.answer()).status == 200


async def test_a_peer_that_does_not_read_its_answers_is_dropped() -> None:
    body = b"x" * 50_000_000
    server = Server(lambda request: request.respond(200, b"", body), ServerLimits(write_timeout_s=0.2))
    await server.start("127.0.0.1")
    with socket.create_connection(server.address) as peer:
        peer.sendall(GET)
        peer.setblocking(False)
        await asyncio.get_running_loop().sock_recv(peer, 10)
        began = asyncio.get_running_loop().time()
        await server.drain(60)  # It ends when the connection does.
        assert asyncio.get_running_loop().time() - began < 30


async def test_a_peer_that_reads_slowly_gets_the_whole_answer() -> None:
    body = b"x" * 20_000_000
    limits = ServerLimits(write_timeout_s=0.3)
    async with serving(lambda request: request.respond(200, b"", body), limits) as server, connected(server) as peer:
        peer.send(GET)
        await peer.reader.readuntil(b"\r\n\r\n")
        for _ in range(8):
            await peer.reader.readexactly(2_500_000)
            await asyncio.sleep(0.1)
        peer.send(GET)
        assert (await peer.answer()).body == body


# --- peers that leave ---


async def test_a_half_closed_peer_gets_its_answers() -> None:
    held = Held()
    async with serving(held) as server, connected(server) as peer:
        peer.send(GET, GET)
        peer.writer.write_eof()
        for _ in range(2):
            request = await held.arrived.get()
            await asyncio.sleep(0.25)  # Probes go out meanwhile.
            request.respond(200, b"")
        statuses = [answer.status for answer in [await peer.answer() for _ in range(2)]]
        while statuses[-1] != 200 or statuses.count(200) < 2:
            statuses.append((await peer.answer()).status)
        assert set(statuses) == {100, 200}
        assert await peer.closed()
        assert held.left.empty()


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "close"])
async def test_a_handler_hears_that_the_peer_left(reset: bool) -> None:
    held = Held()
    async with serving(held) as server:
        with socket.create_connection(server.address) as peer:
            peer.sendall(GET)
            request = await held.arrived.get()
            if reset:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        async with asyncio.timeout(5):
            assert await held.left.get() is request
        request.respond(200, b"")  # Dropped, without complaint.


async def test_requests_behind_the_one_whose_peer_left_are_not_handed_over() -> None:
    held = Held()
    async with serving(held) as server:
        with socket.create_connection(server.address) as peer:
            peer.sendall(GET * 3)
            await held.arrived.get()
        async with asyncio.timeout(5):
            await held.left.get()
        assert held.arrived.empty()


# --- handlers and the end ---


async def test_a_failing_handler_is_a_500_without_details() -> None:
    def fail(request: Request) -> None:
        raise KeyError("secret")

    failures: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
    async with serving(fail) as server, connected(server) as peer:
        peer.send(GET, GET)
        for _ in range(2):
            answer = await peer.answer()
            assert answer.status == 500
            assert answer.error == "internal error"
    assert [type(failure["exception"]) for failure in failures] == [KeyError, KeyError]


async def test_answering_twice_is_an_error_of_the_handler() -> None:
    held = Held()
    async with serving(held) as server, connected(server) as peer:
        peer.send(GET)
        request = await held.arrived.get()
        request.respond(200, header_block([(b"a", b"b")]))
        with pytest.raises(RuntimeError):
            request.respond(200, b"")
        assert (await peer.answer()).headers["a"] == "b"


async def test_drain_finishes_what_is_in_flight_and_takes_nothing_new() -> None:
    held = Held()
    async with serving(held) as server, connected(server) as idle, connected(server) as busy:
        address = server.address
        idle.send(GET)
        (await held.arrived.get()).respond(200, b"")
        await idle.answer()
        busy.send(GET)
        request = await held.arrived.get()
        draining = asyncio.create_task(server.drain(5))
        assert await idle.closed()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*address)
        request.respond(200, b"")
        assert (await busy.answer()).headers["connection"] == "close"
        assert await busy.closed()
        busy.writer.close()
        await draining


async def test_drain_ends_with_its_grace() -> None:
    held = Held()
    async with serving(held) as server, connected(server) as peer:
        peer.send(GET)
        await held.arrived.get()
        await server.drain(0.1)
        assert (await held.left.get()).path == "/a"


async def test_one_peer_does_not_hold_up_another() -> None:
    held = Held()
    async with serving(held) as server, connected(server) as first, connected(server) as second:
        first.send(GET)
        await held.arrived.get()
        second.send(GET)
        (await held.arrived.get()).respond(200, b"", b"second")
        assert (await second.answer()).body == b"second"
