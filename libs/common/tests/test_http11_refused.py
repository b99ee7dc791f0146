"""What a peer gets for what it may not do, over real sockets."""

import orjson
import pytest
from lepton_common.http11 import ServerLimits

from .http11_peers import CHUNKED, GET, POST, Held, connected, echo, refused, serving

SMUGGLING = {
    "length and chunked": POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "the same length twice": POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "list of lengths": POST + b"Content-Length: 3, 3\r\n\r\nabc",
    "signed length": POST + b"Content-Length: +3\r\n\r\nabc",
    "negative length": POST + b"Content-Length: -3\r\n\r\nabc",
    "hexadecimal length": POST + b"Content-Length: 0x3\r\n\r\nabc",
    "overflowing length": POST + b"Content-Length: 18446744073709551619\r\n\r\nabc",
    "unknown coding": POST + b"Transfer-Encoding: identity\r\n\r\nabc",
    "coding like chunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "two codings": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked in HTTP/1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunk longer than said": CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n",
    "negative chunk": CHUNKED + b"-3\r\nabc\r\n0\r\n\r\n",
    "overflowing chunk": CHUNKED + b"fffffffffffffffff\r\nabc\r\n0\r\n\r\n",
    "hexadecimal prefix": CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n",
    "chunk line without CR": CHUNKED + b"3\nabc\r\n0\r\n\r\n",
    "lines without CR": b"GET / HTTP/1.1\nHost: x\n\n",
    "header line without CR": b"GET / HTTP/1.1\r\nHost: x\nA: b\r\n\r\n",
    "space before the colon": POST + b"Content-Length : 3\r\n\r\nabc",
    "folded header": POST + b"A: b\r\n c\r\n\r\n",
    "NUL in a header": POST + b"A: b\0c\r\n\r\n",
    "CR in a header": POST + b"A: b\rc\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "unknown method": b"INFER / HTTP/1.1\r\nHost: x\r\n\r\n",
    "control character in the target": b"GET /\x01 HTTP/1.1\r\nHost: x\r\n\r\n",
    "not HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "tunnel": b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "websocket": b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
}


@pytest.mark.parametrize("name", SMUGGLING)
async def test_ambiguous_or_malformed_requests_get_400_and_the_connection_ends(name: str) -> None:
    held = Held()
    async with serving(held) as server, connected(server) as peer:
        peer.send(SMUGGLING[name], GET)
        answer = await peer.answer()
        assert answer.status == 400
        assert answer.error
        assert await peer.closed()
        assert held.arrived.empty()


@pytest.mark.parametrize("version", [b"0.9", b"2.0"])
async def test_other_versions_of_http_are_refused(version: bytes) -> None:
    answer = await refused(ServerLimits(), b"GET / HTTP/%b\r\nHost: x\r\n\r\n" % version)
    assert answer.status == 505


async def test_a_refusal_waits_for_the_answers_before_it() -> None:
    held = Held()
    async with serving(held) as server, connected(server) as peer:
        peer.send(GET, POST, b"Content-Length: x\r\n\r\n")
        (await held.arrived.get()).respond(200, b"")
        assert (await peer.answer()).status == 200
        assert (await peer.answer()).status == 400
        assert await peer.closed()


async def test_a_body_over_the_limit_is_refused_before_it_is_read() -> None:
    limits = ServerLimits(max_body_bytes=10)
    assert (await refused(limits, POST, b"Content-Length: 11\r\n\r\n")).status == 413
    assert (await refused(limits, CHUNKED, b"6\r\nabcdef\r\n6\r\nabcdef\r\n")).status == 413


async def test_a_peer_that_goes_on_sending_can_still_read_the_refusal() -> None:
    async with serving(echo, ServerLimits(max_body_bytes=10)) as server, connected(server) as peer:
        peer.send(POST, b"Content-Length: 8000000\r\n\r\n", b"x" * 8_000_000)
        await peer.writer.drain()
        answer = await peer.answer()
        assert answer.status == 413
        assert "8000000" in answer.error


@pytest.mark.parametrize(
    "pieces",
    [
        [b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 3000 + b"\r\n\r\n"],
        [b"GET / HTTP/1.1\r\nHost: x\r\n", *(b"A%d: b\r\n" % n for n in range(1000))],
        [b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A" * 100_000],
        [CHUNKED, b"3;" + b"a" * 600_000],
        [CHUNKED, b"0\r\n" + b"a" * 600_000],
    ],
    ids=["header", "headers", "name", "chunk extension", "trailer"],
)
async def test_endless_headers_are_refused(pieces: list[bytes]) -> None:
    assert (await refused(ServerLimits(max_header_bytes=2000), *pieces)).status == 431


@pytest.mark.parametrize("header", [b"a%d: b\r\n", b"a: %d\r\n"], ids=["different", "one"])
async def test_headers_are_counted(header: bytes) -> None:
    lines = b"".join(header % n for n in range(7))
    assert (
        await refused(ServerLimits(max_headers=7), b"GET / HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n")
    ).status == 431
    async with serving(echo, ServerLimits(max_headers=8)) as server, connected(server) as peer:
        peer.send(b"GET / HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n", GET)
        assert [(await peer.answer()).status, (await peer.answer()).status] == [200, 200]


@pytest.mark.parametrize("rest", [b"", b" HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["endless", "complete"])
async def test_a_long_target_is_refused(rest: bytes) -> None:
    assert (await refused(ServerLimits(max_header_bytes=2000), b"GET /" + b"a" * 3000 + rest)).status == 414


async def test_expectations_are_met_or_refused() -> None:
    async with serving(echo) as server, connected(server) as peer:
        peer.send(POST, b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        assert (await peer.answer()).status == 100
        peer.send(b"ok")
        assert orjson.loads((await peer.answer()).body)["body"] == "ok"
    assert (await refused(ServerLimits(), POST, b"Expect: gold\r\nContent-Length: 2\r\n\r\n")).status == 417
    late = ServerLimits(max_body_bytes=1)
    assert (await refused(late, POST, b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")).status == 413


async def test_an_invitation_to_continue_does_not_overtake_an_answer() -> None:
    held = Held()
    async with serving(held) as server, connected(server) as peer:
        peer.send(GET, POST, b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        (await held.arrived.get()).respond(200, b"")
        assert [(await peer.answer()).status, (await peer.answer()).status] == [200, 100]
        peer.send(b"ok")
        assert (await held.arrived.get()).body == b"ok"
