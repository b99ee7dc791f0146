"""The client over real sockets, against a peer that answers with exactly the bytes a test gives it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from lepton_common.http11 import Request, Server
from lepton_common.http11_client import Call, Failure, Upstream, UpstreamError, UpstreamLimits

HEAD = b"POST / HTTP/1.1\r\nhost: x\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CLOSE = b"close"


class Asked(Call):
    """A call whose end can be awaited."""

    __slots__ = ("ended",)

    def __init__(self, body: bytes | list[bytes] = b"", timeout_s: float = 5.0) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(HEAD, body, loop.time() + timeout_s)
        self.ended: asyncio.Future[tuple[int, dict[bytes, bytes], bytes]] = loop.create_future()

    def answered(self, status: int, headers: dict[bytes, bytes], body: bytes) -> None:
        self.ended.set_result((status, headers, body))

    def failed(self, error: UpstreamError) -> None:
        self.ended.set_exception(error)


async def ask(upstream: Upstream, body: bytes | list[bytes] = b"", timeout_s: float = 5.0) -> tuple[int, bytes]:
    call = Asked(body, timeout_s)
    upstream.send(call)
    status, _, answer = await call.ended
    return status, answer


async def failure(upstream: Upstream, timeout_s: float = 5.0) -> tuple[Failure, bool]:
    with pytest.raises(UpstreamError) as caught:
        await ask(upstream, timeout_s=timeout_s)
    return caught.value.failure, caught.value.began


class Script:
    """Answers the n-th request of each connection with the n-th entry, in pieces cut at "|"; None closes at once."""

    def __init__(self, *connections: list[bytes | None]) -> None:
        self.scripts = list(connections)
        self.opened = 0
        self.requests = 0
        self.gone = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        try:
            for answer in script:
                await reader.readuntil(b"\r\n\r\n")
                self.requests += 1
                if answer is None:
                    return
                for piece in answer.split(b"|"):
                    if piece == CLOSE:
                        return
                    writer.write(piece)
                    await asyncio.sleep(0.01)  # so that the pieces are read by themselves
            await reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.gone.set()
            writer.close()


@asynccontextmanager
async def scripted(
    *connections: list[bytes | None], limits: UpstreamLimits | None = None
) -> AsyncIterator[tuple[Upstream, Script]]:
    script = Script(*connections)
    server = await asyncio.start_server(script, "127.0.0.1")
    host, port = server.sockets[0].getsockname()
    upstream = Upstream(host, port, limits)
    try:
        yield upstream, script
    finally:
        await upstream.close()
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0)


@asynccontextmanager
async def served(
    handler: Callable[[Request], None], limits: UpstreamLimits | None = None
) -> AsyncIterator[tuple[Upstream, Server]]:
    server = Server(handler)
    await server.start("127.0.0.1")
    upstream = Upstream(*server.address, limits)
    try:
        yield upstream, server
    finally:
        await upstream.close()
        await server.drain(0)


def echo(request: Request) -> None:
    request.respond(200, b"", request.body)


async def test_connections_are_kept_and_shared() -> None:
    async with served(echo, UpstreamLimits(max_connections=3)) as (upstream, server):
        for n in range(3):
            bodies = [b"%d-%d" % (n, i) for i in range(20)]
            assert await asyncio.gather(*(ask(upstream, body) for body in bodies)) == [(200, body) for body in bodies]
            assert len(server.connections) == 3


async def test_large_bodies_pass_both_ways() -> None:
    body = bytes(range(256)) * 20_000
    async with served(echo) as (upstream, _):
        assert await ask(upstream, [body[:7], body[7:]]) == (200, body)


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        (OK, 200, b"ok"),
        (OK.replace(b"ok", b"o|k"), 200, b"ok"),
        (b"HTTP/1.1 2|00 OK\r\nConte|nt-Length: 0\r\n\r\n", 200, b""),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n|1\r\nk\r\n0\r\n\r\n", 200, b"ok"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, 200, b"ok"),
        (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n|" + OK, 200, b"ok"),
    ],
)
async def test_every_framing_of_an_answer_keeps_the_connection(answer: bytes, status: int, body: bytes) -> None:
    async with scripted([answer, answer, OK]) as (upstream, script):
        assert await ask(upstream) == (status, body)
        assert await ask(upstream) == (status, body)
        assert await ask(upstream) == (200, b"ok")
        assert script.opened == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\n\r\nto the |end|close",
        b"HTTP/1.0 200 OK\r\nContent-Length: 10\r\n\r\nto the |end|close",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 10\r\n\r\nto the end",
    ],
)
async def test_an_answer_that_ends_its_connection_is_followed_by_another(answer: bytes) -> None:
    async with scripted([answer]) as (upstream, script):
        for n in range(2):
            assert await ask(upstream) == (200, b"to the end")
            assert script.opened == n + 1


async def test_a_connection_closed_while_idle_costs_no_request() -> None:
    async with scripted([OK, None], [OK, OK]) as (upstream, script):
        assert await ask(upstream) == (200, b"ok")
        assert await ask(upstream) == (200, b"ok")
        assert script.opened == 2
        assert script.requests == 3


async def test_a_request_is_repeated_once_only() -> None:
    async with scripted([OK, None], [None]) as (upstream, script):
        await ask(upstream)
        assert await failure(upstream) == (Failure.LOST, False)
        assert script.opened == 2


async def test_a_request_whose_answer_began_is_not_repeated() -> None:
    async with scripted([OK, b"HTTP/1.1 200 OK\r\n|close"]) as (upstream, script):
        await ask(upstream)
        assert await failure(upstream) == (Failure.LOST, True)
        assert script.opened == 1


async def test_a_fresh_connection_that_is_lost_is_an_error() -> None:
    async with scripted([None]) as (upstream, script):
        assert await failure(upstream) == (Failure.LOST, False)
        assert script.opened == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
    ],
)
async def test_what_is_not_an_answer_is_an_error(answer: bytes) -> None:
    async with scripted([answer]) as (upstream, _):
        assert await failure(upstream) == (Failure.INVALID, True)


async def test_surplus_bytes_never_become_the_answer_to_another_request() -> None:
    evil = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
    async with scripted([OK + evil], [OK], limits=UpstreamLimits(max_connections=1)) as (upstream, script):
        for answer in await asyncio.gather(ask(upstream), ask(upstream)):
            assert answer == (200, b"ok")
        assert script.opened == 2
    async with scripted([OK + b"|" + evil], [OK]) as (upstream, script):
        await ask(upstream)
        async with asyncio.timeout(5):
            await script.gone.wait()
        assert await ask(upstream) == (200, b"ok")


async def test_answers_over_the_limits_are_errors() -> None:
    limits = UpstreamLimits(max_response_bytes=10, max_header_bytes=100)
    async with scripted([b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello hello"], limits=limits) as (upstream, _):
        assert await failure(upstream) == (Failure.TOO_LARGE, True)
    async with scripted([b"HTTP/1.1 200 OK\r\nA: " + b"b" * 200], limits=limits) as (upstream, _):
        assert await failure(upstream) == (Failure.TOO_LARGE, True)


async def test_a_deadline_ends_the_call_and_its_connection() -> None:
    left = asyncio.Event()

    def hold(request: Request) -> None:
        request.on_disconnect = left.set

    async with served(hold, UpstreamLimits(max_connections=1)) as (upstream, _):
        waits = asyncio.create_task(failure(upstream, timeout_s=0.1))
        assert await failure(upstream, timeout_s=0.05) == (Failure.TIMEOUT, False)
        assert await waits == (Failure.TIMEOUT, False)
        async with asyncio.timeout(5):
            await left.wait()


async def test_a_cancelled_call_is_noticed_by_the_server_and_never_ends() -> None:
    left = asyncio.Event()
    arrived: asyncio.Queue[Request] = asyncio.Queue()

    def hold(request: Request) -> None:
        request.on_disconnect = left.set
        arrived.put_nowait(request)

    async with served(hold, UpstreamLimits(max_connections=1)) as (upstream, _):
        running, waiting, last = Asked(), Asked(), Asked()
        for call in (running, waiting, last):
            upstream.send(call)
        await arrived.get()
        waiting.cancel()
        running.cancel()
        async with asyncio.timeout(5):
            await left.wait()
            (await arrived.get()).respond(200, b"")
            await last.ended
        assert not running.ended.done()
        assert not waiting.ended.done()


async def test_a_refused_connection_fails_every_call_that_waits() -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1")
    host, port = server.sockets[0].getsockname()
    server.close()
    upstream = Upstream(host, port, UpstreamLimits(max_connections=2))
    outcomes = await asyncio.gather(*(failure(upstream) for _ in range(10)))
    assert outcomes == [(Failure.CONNECT, False)] * 10
    await upstream.close()


async def test_too_many_waiting_calls_are_refused_at_once() -> None:
    limits = UpstreamLimits(max_connections=1, max_waiting=2)
    arrived = asyncio.Event()
    async with served(lambda request: arrived.set(), limits) as (upstream, _):
        calls = [Asked() for _ in range(4)]
        for call in calls[:2]:
            upstream.send(call)
        await arrived.wait()
        for call in calls[2:]:
            upstream.send(call)
        assert await failure(upstream) == (Failure.FULL, False)
        for call in calls:
            call.cancel()


async def test_idle_connections_are_closed_in_time() -> None:
    async with served(echo, UpstreamLimits(idle_s=0.05)) as (upstream, server):
        await ask(upstream)
        assert server.connections
        # The server itself would keep an idle connection for 75 s.
        async with asyncio.timeout(5):
            while server.connections:  # noqa: ASYNC110 - nobody is told that a connection ended
                await asyncio.sleep(0.01)
        await ask(upstream)
