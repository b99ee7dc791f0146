"""Stand-ins around a real mesh: workers that can be told to misbehave, callers that count what they are told."""

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar

import httptools
import httpx
from lepton_common.envelope import Message
from lepton_common.etcd import EtcdClient
from lepton_common.events import Event
from lepton_common.foreign import Message as ForeignMessage
from lepton_common.mirror import Mirror
from lepton_common.records import SERVING, WORKERS, Assigned, Loaded, LoadState, Serving, Share, WorkerState
from lepton_common.types import ModelRef
from lepton_rollout.workers import Signal

E = TypeVar("E", bound=Event)


class StandIn:
    """A worker as the mesh sees one. It answers with its name, the version asked for and the body's size."""

    def __init__(self, name: str, pool: str = "cpu") -> None:
        self.name = name
        self.pool = pool
        self.is_ready = True
        self.refused: set[str] = set()  # versions answered as not loaded
        self.cuts_connections = False
        self.is_full = False
        self.is_stuck = False  # takes requests and never answers
        self.is_listening = True
        self.answered = 0
        self.heard: deque[dict[str, str]] = deque(maxlen=1000)  # the headers of the last requests
        self.connections: set[asyncio.Transport] = set()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.die()

    def state(self, *, draining: bool = False) -> WorkerState:
        return WorkerState(
            id=self.name, pool=self.pool, address=f"127.0.0.1:{self.port}", device="cpu", draining=draining
        )

    def die(self) -> None:
        """As after kill -9: nobody listens and every connection is reset."""
        loop = asyncio.get_running_loop()
        for listener in self._server.sockets:
            loop.remove_reader(listener)
        # Not at once: asyncio would lose, unclosed, what it is accepting at this moment.
        loop.call_soon(self._server.close)
        self.is_listening = False
        for connection in tuple(self.connections):
            connection.abort()


StartWorker = Callable[..., Awaitable[StandIn]]


class _Connection(asyncio.Protocol):
    def __init__(self, worker: StandIn) -> None:
        self._worker = worker

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._parser = httptools.HttpRequestParser(self)
        self._worker.connections.add(transport)
        if not self._worker.is_listening:
            transport.abort()  # Accepted before the worker's death, made after it.

    def connection_lost(self, exc: Exception | None) -> None:
        self._worker.connections.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._path, self._version, self._size = b"", "", 0
        self._headers: dict[str, str] = {}

    def on_url(self, url: bytes) -> None:
        self._path = url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode().lower()] = value.decode()
        if name.lower() == b"x-lepton-version":
            self._version = value.decode()

    def on_body(self, body: bytes) -> None:
        self._size += len(body)

    def on_message_complete(self) -> None:
        worker = self._worker
        if self._path == b"/v2/health/ready":
            self._answer(200 if worker.is_ready else 503, {})
            return
        worker.heard.append(self._headers)
        if worker.is_stuck:
            return
        if worker.cuts_connections:
            self._transport.abort()
        elif self._version in worker.refused:
            self._answer(503, {"error": "not loaded"}, b"x-lepton-reason: not-loaded\r\n")
        elif worker.is_full:
            worker.answered += 1
            self._answer(503, {"error": "the queue is full"}, b"x-envoy-ratelimited: true\r\n")
        else:
            worker.answered += 1
            self._answer(200, {"worker": worker.name, "version": self._version, "size": self._size})

    def _answer(self, status: int, body: dict[str, Any], headers: bytes = b"") -> None:
        data = json.dumps(body).encode()
        head = b"HTTP/1.1 %d .\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % (status, len(data))
        self._transport.write(head + headers + b"\r\n" + data)


class Traffic:
    """Callers that ask a model without pause, and count what they are told."""

    def __init__(self, client: httpx.AsyncClient, model: ModelRef) -> None:
        self._client = client
        self._model = model
        self.answers: dict[str, int] = {}
        self._answered = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._ask()) for _ in range(8)]
        for task in self._tasks:
            task.add_done_callback(lambda _: self._answered.set())
        await self.more(50)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self._tasks:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if not isinstance(result, asyncio.CancelledError):
                raise AssertionError(f"a caller ended: {result!r}")

    @property
    def total(self) -> int:
        return sum(self.answers.values())

    async def more(self, count: int) -> None:
        """That many more answers have come."""
        wanted = self.total + count
        # A caller that has ended raises at the end of the block.
        while self.total < wanted and not any(task.done() for task in self._tasks):
            self._answered.clear()
            await self._answered.wait()

    async def _ask(self) -> None:
        while True:
            response = await infer(self._client, self._model)
            told = f"{response.status_code} version {response.headers.get('x-lepton-version')}"
            self.answers[told] = self.answers.get(told, 0) + 1
            self._answered.set()


async def infer(
    client: httpx.AsyncClient, model: ModelRef, *, version: str | None = None, body: bytes = b"{}"
) -> httpx.Response:
    headers = {"Host": model.host} | ({"x-lepton-version": version} if version else {})
    return await client.post(f"/v2/models/{model.model}/infer", headers=headers, content=body)


def serving(model: ModelRef, generation: int, split: Mapping[int, float], *warm: int, pool: str = "cpu") -> Serving:
    """A record of which all versions are in one pool."""
    return Serving(
        tenant=model.tenant,
        model=model.model,
        generation=generation,
        stable=next(iter(split), None),
        split=tuple(Share(version=version, percent=percent) for version, percent in split.items()),
        versions=tuple(assigned(version, pool) for version in (*split, *warm)),
    )


def assigned(version: int, pool: str = "cpu") -> Assigned:
    return Assigned(version=version, sha256=f"{version:064x}", size_bytes=1000, pool=pool)


class PoolWorker:
    """A stand-in that does at once what etcd assigns, and says so there; some versions fail or take long."""

    def __init__(self, etcd: EtcdClient, stand_in: StandIn) -> None:
        self.stand_in = stand_in
        self.failing: dict[int, str] = {}
        self.slow: set[int] = set()
        self._etcd = etcd
        self._changed = Signal()
        self._mirror = Mirror(etcd, SERVING, Serving.model_validate_json, lambda key, serving: self._changed.send())

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._mirror.run())
            while True:
                seen = self._changed.count
                state = self.stand_in.state().model_copy(update={"versions": tuple(self._versions())})
                await self._etcd.put(f"{WORKERS}{state.id}", state.model_dump_json().encode())
                await self._changed.wait(seen, 60)

    def look_again(self) -> None:
        """What was set on it counts from now on."""
        self._changed.send()

    def _versions(self) -> Iterator[Loaded]:
        for serving in self._mirror.items.values():
            for each in serving.versions:
                if each.pool != self.stand_in.pool:
                    continue
                reason = self.failing.get(each.version, "")
                loading = LoadState.LOADING if each.version in self.slow else LoadState.READY
                yield Loaded(
                    tenant=serving.tenant,
                    model=serving.model,
                    version=each.version,
                    sha256=each.sha256,
                    state=LoadState.FAILED if reason else loading,
                    reason=reason,
                )


class RecordingBus:
    """The bus without Kafka: keeps what is sent, and hands over what a test says has happened."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self._handlers: dict[type[Event], Callable[[Any], Awaitable[None]]] = {}

    def subscribe(self, kind: type[E], handler: Callable[[E], Awaitable[None]]) -> None:
        self._handlers[kind] = handler

    def hear(self, topic: str, handler: Callable[[ForeignMessage], Awaitable[None]]) -> None: ...

    async def tell(self, event: Event) -> None:
        await self._handlers[type(event)](event)

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def send(self, messages: Sequence[Message]) -> None:
        self.sent.extend(messages)

    async def close(self) -> None: ...
