"""Properties of the server's reading, on a transport in memory: any split, any mutation, any order of known heads."""

import re
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from lepton_common.http11 import Request, Server, ServerLimits
from lepton_common.http11_connection import Connection

from .http11_peers import MemoryTransport

MESSAGES = [
    b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n",
    b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /b?c HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello",
    b"POST /b?c HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n\r\n\r\n!",
    b"\r\nPOST /empty HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
    b"POST /d HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1;e=f\r\nd\r\n0\r\nA: b\r\n\r\n",
    b"POST /d HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nok",
    b"GET /old HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
]
Seen = tuple[str, bytes, tuple[tuple[bytes, bytes], ...], bytes]


def read(server: Server, pieces: list[bytes]) -> tuple[list[Seen], MemoryTransport]:
    """What the handler saw of the pieces, each coming by itself on one connection."""
    seen: list[Seen] = []

    def handler(request: Request) -> None:
        seen.append((request.method, request.target, tuple(request.headers.items()), request.body))
        request.respond(200, b"", request.body)

    server.handler = handler
    transport = MemoryTransport()
    connection = Connection(server)
    connection.connection_made(transport)
    for piece in pieces:
        connection.data_received(piece)
    connection.connection_lost(None)
    return seen, transport


def fresh() -> Server:
    return Server(lambda request: None, ServerLimits(max_body_bytes=1000, max_header_bytes=500))


def alone(message: bytes) -> Seen:
    (seen,) = read(fresh(), [message])[0]
    return seen


EXPECTED = {message: alone(message) for message in MESSAGES}


@st.composite
def split_streams(draw: st.DrawFn) -> tuple[list[bytes], list[bytes]]:
    messages = draw(st.lists(st.sampled_from(MESSAGES), min_size=1, max_size=6))
    stream = b"".join(messages)
    cuts = draw(st.lists(st.integers(0, len(stream)), max_size=12))
    return messages, [stream[a:b] for a, b in pairwise(sorted({0, *cuts, len(stream)}))]


@given(split_streams())
def test_any_split_of_the_stream_gives_the_same_requests(case: tuple[list[bytes], list[bytes]]) -> None:
    messages, pieces = case
    seen, transport = read(fresh(), pieces)
    assert seen == [EXPECTED[message] for message in messages]
    assert not transport.ended


@given(st.lists(split_streams(), min_size=1, max_size=4))
def test_what_one_connection_sent_never_changes_what_another_one_says(
    cases: list[tuple[list[bytes], list[bytes]]],
) -> None:
    server = fresh()
    for messages, pieces in cases:
        assert read(server, pieces)[0] == [EXPECTED[message] for message in messages]


@given(st.lists(st.sampled_from(MESSAGES), min_size=1, max_size=6))
def test_a_known_head_is_read_as_an_unknown_one(messages: list[bytes]) -> None:
    server = fresh()
    for _ in range(2):
        assert read(server, messages)[0] == [EXPECTED[message] for message in messages]
    assert all(b"\r\n\r\n" in head and head.strip() for head in server.heads)


@given(
    split_streams(),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=3), st.integers(0, 3)), min_size=1),
)
def test_mutated_bytes_get_an_answer_or_the_end(
    case: tuple[list[bytes], list[bytes]], mutations: list[tuple[float, bytes, int]]
) -> None:
    stream = b"".join(case[1])
    for where, insert, drop in mutations:
        at = int(where * len(stream))
        stream = stream[:at] + insert + stream[at + drop :]
    server = fresh()
    seen, transport = read(server, [stream[i : i + 7] for i in range(0, len(stream), 7)])
    finals = [status for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", transport.written) if status != b"100"]
    assert len(finals) >= len(seen)
    assert len(finals) - len(seen) == server.rejected
    assert server.rejected <= 1
    assert transport.ended or server.rejected == 0
    whole, _ = read(fresh(), [stream])
    assert whole == seen
