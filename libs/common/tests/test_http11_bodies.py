"""The room for bodies: what came of them counts, what was announced does not, and all of it is free in the end."""

from collections.abc import Callable
from contextlib import AsyncExitStack
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lepton_common.http11 import Request, Server, ServerLimits
from lepton_common.http11_body import SMALL_BYTES
from lepton_common.http11_connection import Connection
from lepton_common.testing import until

from .http11_peers import CHUNKED, GET, POST, Held, MemoryTransport, chunk, connected, post, serving

ROOM = 1 << 20
LIMITS = ServerLimits(max_body_bytes=ROOM, max_buffered_bytes=ROOM)


@pytest.mark.parametrize(
    "pieces",
    [
        [POST, b"Expect: 100-continue\r\nContent-Length: 300000\r\n\r\n"],
        [post(bytes(300_000))],
        [CHUNKED, chunk(bytes(300_000))],
    ],
    ids=["announced", "sent", "chunked"],
)
async def test_a_body_without_room_is_503_until_those_before_it_are_answered(pieces: list[bytes]) -> None:
    held = Held()
    async with serving(held, LIMITS) as server, connected(server) as first, connected(server) as peer:
        first.send(post(bytes(800_000)))
        request = await held.arrived.get()
        peer.send(*pieces)
        answer = await peer.answer()
        assert (answer.status, answer.headers["retry-after"], answer.headers["connection"]) == (503, "1", "close")
        assert answer.error.endswith("bytes, more than there is room for now")
        assert await peer.closed()
        assert server.room.refused == 1
        request.respond(200, b"")
        await first.answer()
        first.send(post(bytes(300_000)))
        assert len((await held.arrived.get()).body) == 300_000


async def test_a_body_without_room_is_refused_with_the_headers_of_who_runs_the_server() -> None:
    held = Held()
    async with (
        serving(held, LIMITS, b"x-full: yes\r\n") as server,
        connected(server) as first,
        connected(server) as peer,
    ):
        first.send(post(bytes(800_000)))
        await held.arrived.get()
        peer.send(post(bytes(300_000)))
        answer = await peer.answer()
        assert (answer.status, answer.headers["x-full"], answer.headers["retry-after"]) == (503, "yes", "1")


async def test_bodies_that_are_announced_take_no_room_from_others() -> None:
    held = Held()
    async with serving(held, LIMITS) as server, AsyncExitStack() as peers:
        for _ in range(50):
            peer = await peers.enter_async_context(connected(server))
            peer.send(POST, b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % ROOM)
            assert (await peer.answer()).status == 100
        peer = await peers.enter_async_context(connected(server))
        peer.send(post(bytes(ROOM)))
        assert len((await held.arrived.get()).body) == ROOM


async def test_small_bodies_get_in_when_there_is_no_room_at_all() -> None:
    held = Held()
    small = bytes(SMALL_BYTES)
    async with serving(held, LIMITS) as server, connected(server) as greedy, AsyncExitStack() as peers:
        greedy.send(post(bytes(ROOM)))
        await held.arrived.get()
        for pieces in ([post(small)], [CHUNKED, chunk(small), b"0\r\n\r\n"], [post(small)]):
            peer = await peers.enter_async_context(connected(server))
            peer.send(*pieces)
            assert (await held.arrived.get()).body == small


async def test_one_body_of_the_largest_size_has_room_in_any_case() -> None:
    held = Held()
    limits = ServerLimits(max_body_bytes=ROOM, max_buffered_bytes=1)
    async with serving(held, limits) as server, connected(server) as peer:
        peer.send(post(bytes(ROOM)))
        assert len((await held.arrived.get()).body) == ROOM


@pytest.mark.parametrize(
    ("pieces", "status"),
    [
        ([CHUNKED, chunk(bytes(800_000)), b"no chunk"], 400),
        ([CHUNKED, chunk(bytes(600_000)), chunk(bytes(600_000))], 413),
        ([POST, b"Content-Length: 800001\r\n\r\n", bytes(800_000)], 408),
    ],
)
async def test_a_body_that_is_refused_leaves_its_room_at_once(pieces: list[bytes], status: int) -> None:
    held = Held()
    limits = ServerLimits(max_body_bytes=ROOM, max_buffered_bytes=ROOM, body_timeout_s=0.1 if status == 408 else 60)
    async with serving(held, limits) as server, connected(server) as refused, connected(server) as peer:
        refused.send(*pieces)
        assert (await refused.answer()).status == status
        assert server.room.free == ROOM
        peer.send(post(bytes(300_000)))
        await held.arrived.get()


@pytest.mark.parametrize("end", ["malformed", "half-closed"])
def test_what_will_not_be_whole_leaves_its_room_though_its_peer_waits_for_an_answer(end: str) -> None:
    server = Server(lambda request: None, LIMITS)
    peer = Connection(server)
    peer.connection_made(MemoryTransport())
    peer.data_received(GET + CHUNKED + chunk(bytes(800_000)))
    assert server.room.free == ROOM - 800_000
    if end == "malformed":
        peer.data_received(b"not a chunk")
    else:
        assert peer.eof_received()
    assert server.room.free == ROOM


def test_a_large_body_counts_though_it_comes_whole_with_a_head_that_is_known() -> None:
    held: list[Request] = []
    server = Server(held.append, LIMITS)
    peer = Connection(server)
    peer.connection_made(MemoryTransport())
    for _ in range(2):
        peer.data_received(post(bytes(100_000)))
        assert server.room.free == ROOM - 100_000
        held.pop().respond(200, b"")
        assert server.room.free == ROOM


@pytest.mark.parametrize("length", [b"Content-Length: 900000", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("half", [False, True])
async def test_nothing_is_kept_of_a_peer_that_leaves_in_the_middle_of_a_body(length: bytes, half: bool) -> None:
    async with serving(Held(), LIMITS) as server:
        async with connected(server) as peer:
            peer.send(POST, b"Expect: 100-continue\r\n", length, b"\r\n\r\n")
            assert (await peer.answer()).status == 100
            peer.send(chunk(bytes(800_000)))
            await until(lambda: server.room.free <= ROOM - 800_000)
            if half:
                peer.writer.write_eof()
        await server.drain(10)  # Returns once the peer's connection is gone.
        assert server.room.free == ROOM


@pytest.mark.parametrize(
    "pieces", [[post(bytes(800_000))], [GET, post(bytes(800_000))], [GET, CHUNKED, chunk(bytes(800_000))]]
)
@pytest.mark.parametrize("half", [False, True])
async def test_nothing_is_kept_of_a_peer_that_leaves_before_its_answer(pieces: list[bytes], half: bool) -> None:
    held = Held()
    async with serving(held, LIMITS) as server:
        async with connected(server) as peer:
            peer.send(*pieces)
            await held.arrived.get()
            if half:
                peer.writer.write_eof()
        await server.drain(10)
        assert server.room.free == ROOM


KINDS: dict[str, Callable[[bytes], bytes]] = {
    "sized": post,
    "last": lambda body: POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body),
    "chunked": lambda body: CHUNKED + chunk(body) + b"0\r\n\r\n",
    "malformed": lambda body: CHUNKED + chunk(body) + b"not a chunk",
}
REQUESTS = st.tuples(
    st.sampled_from(sorted(KINDS)), st.sampled_from([1000, SMALL_BYTES, SMALL_BYTES + 1, 100_000, 200_000])
)
# Of one peer: what it sends, in pieces that end at these parts of it. What is after the last one never comes.
STREAMS = st.tuples(st.lists(REQUESTS, max_size=4), st.lists(st.floats(0, 1), min_size=1, max_size=6))


def pieces_of(requests: list[tuple[str, int]], ends: list[float]) -> list[bytes]:
    stream = b"".join(KINDS[kind](bytes(size)) for kind, size in requests)
    return [stream[a:b] for a, b in pairwise(sorted({0, *(round(each * len(stream)) for each in ends)}))]


@given(st.lists(STREAMS, min_size=1, max_size=4), st.lists(st.booleans(), max_size=20))
def test_the_room_holds_what_waits_and_is_all_free_when_peers_are_gone(
    streams: list[tuple[list[tuple[str, int]], list[float]]], answers: list[bool]
) -> None:
    room, decided, waiting = 250_000, iter(answers), set[Request]()

    def handler(request: Request) -> None:
        if next(decided, True):
            request.respond(200, b"")
        else:
            waiting.add(request)
            request.on_disconnect = lambda: waiting.remove(request)

    server = Server(handler, ServerLimits(max_body_bytes=150_000, max_buffered_bytes=room))
    peers = [(Connection(server), pieces_of(*stream)) for stream in streams]
    for peer, _ in peers:
        peer.connection_made(MemoryTransport())
    for turn in range(7):
        for peer, pieces in peers:
            for piece in pieces[turn : turn + 1]:
                peer.data_received(piece)
                kept = sum(len(each.body) for each in waiting if len(each.body) > SMALL_BYTES)
                assert 0 <= server.room.free <= room - kept
    for request in sorted(waiting, key=id)[::2]:
        waiting.remove(request)
        request.respond(200, b"")
    for peer, _ in peers:
        peer.connection_lost(None)
    assert not waiting
    assert server.room.free == room
