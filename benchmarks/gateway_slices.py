"""Two gateways in one process, asked in turns of a hundred requests: what tells their costs apart, however busy the
machine is. What differs is CPU time of one thread, so callers and mesh, which cost the same each time, cancel out."""

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import uvloop
from lepton.ports import free_port
from lepton_common import envelope
from lepton_common.etcd import EtcdClient
from lepton_common.http11 import Request, Server
from lepton_common.kafka_client import Bootstrap, Producer, Record
from lepton_common.telemetry import configure
from lepton_common.types import ModelRef
from lepton_gateway.main import build
from lepton_gateway.reporter import event_of
from lepton_gateway.settings import Settings
from lepton_gateway.windows import SPLIT, Windows
from prometheus_client import CollectorRegistry

_CONNECTIONS = 32
_SLICE = 128
_SECONDS_TOLD = 60
# Answers in a second of the windows that are told: what a busy gateway gives.
_BUSY = 10_000


@dataclass(frozen=True)
class Slices:
    """`request_us` is what windows add to a request, with its 95 % interval.

    It is the difference of each gateway's lower quintiles over the slices: other load only ever adds to a slice.

    `second_us` is what they add to a second of a busy model, whatever its requests: closing, encoding, sending.
    """

    pairs: int
    request_us: float
    low_us: float
    high_us: float
    second_us: float


class _Caller(asyncio.Protocol):
    """One connection with one request in flight, as long as `next_one` gives any."""

    def __init__(self, next_one: Callable[[], bytes | None], answered: Callable[[], None]) -> None:
        self._next = next_one
        self._answered = answered

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def ask(self) -> None:
        request = self._next()
        if request is not None:
            self.transport.write(request)  # type: ignore[attr-defined]  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        assert data.startswith(b"HTTP/1.1 200"), data[:100]
        self._answered()
        self.ask()


class _Callers:
    """Thirty-two connections to one gateway."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._to_ask = self._to_hear = 0
        self._heard = asyncio.Event()
        self._callers: list[_Caller] = []

    async def connect(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(_CONNECTIONS):
            _, caller = await loop.create_connection(lambda: _Caller(self._next_one, self._answered), "127.0.0.1", port)
            self._callers.append(caller)

    async def ask(self, count: int) -> float:
        """CPU seconds of this thread for so many requests and answers."""
        self._to_ask = self._to_hear = count
        self._heard.clear()
        began = time.thread_time()
        for caller in self._callers:
            caller.ask()
        await self._heard.wait()
        return time.thread_time() - began

    def close(self) -> None:
        for caller in self._callers:
            caller.transport.close()

    def _next_one(self) -> bytes | None:
        if self._to_ask == 0:
            return None
        self._to_ask -= 1
        return self._request

    def _answered(self) -> None:
        self._to_hear -= 1
        if self._to_hear == 0:
            self._heard.set()


@asynccontextmanager
async def _gateway(settings: Settings, windows: Windows) -> AsyncIterator[int]:
    """The port of a whole gateway in this event loop."""
    service = build(settings, configure("gateway", settings, CollectorRegistry()), EtcdClient(settings.etcd), windows)
    stop = asyncio.Event()
    running = asyncio.create_task(service.run(stop))
    while not service.readiness.started:  # noqa: ASYNC110 - readiness tells nobody that it changed
        await asyncio.sleep(0.01)
    try:
        yield settings.port
    finally:
        stop.set()
        await running


async def _compare(
    pairs: int,
    settings: Callable[[int, int], Settings],
    without: Windows,
    answer: Callable[[Request], None],
    body: bytes,
) -> list[tuple[float, float]]:
    """CPU seconds that a request takes with windows and without, in each pair of slices."""
    chance = random.Random(0)
    async with AsyncExitStack() as stack:
        mesh = Server(answer)
        await mesh.start("127.0.0.1")
        stack.push_async_callback(mesh.drain, 0)
        found: list[_Callers] = []
        for windows in (Windows(time.time), without):
            port = await stack.enter_async_context(_gateway(settings(free_port(), mesh.address[1]), windows))
            head = f"POST /v2/models/m/infer HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n\r\n"
            callers = _Callers(head.encode() + body)
            await callers.connect(port)
            stack.callback(callers.close)
            await callers.ask(20 * _SLICE)
            found.append(callers)
        both = []
        for _ in range(pairs):
            spent = {each: await each.ask(_SLICE) for each in chance.sample(found, 2)}
            both.append((spent[found[0]] / _SLICE, spent[found[1]] / _SLICE))
        return both


def _difference(pairs: Sequence[tuple[float, float]]) -> float:
    quintiles: list[float] = [statistics.quantiles(each, n=5)[0] for each in zip(*pairs, strict=True)]
    return quintiles[0] - quintiles[1]


async def _second_us(kafka: str) -> float:
    """CPU microseconds to close a busy second of two versions, encode it, and have Kafka store it."""
    now = 1_800_000_000
    windows = Windows(lambda: float(now))
    counts = windows.of(ModelRef("default", "m"))
    producer = Producer(Bootstrap.parse(kafka), "benchmark")
    chance = random.Random(0)
    spent = []
    for _ in range(_SECONDS_TOLD):
        counts.in_flight = 1
        counts.wake()
        for number in range(_BUSY):
            counts.add(SPLIT, b"2" if number % 10 == 0 else b"1", 200, chance.lognormvariate(-6, 0.5))
        now += 1
        began = time.thread_time()
        windows.roll()
        message = envelope.encode(event_of(windows.closed.popleft(), "g"), "gateway")
        headers = [(name, value.encode()) for name, value in message.headers.items()]
        await producer.send([Record(message.topic, message.key.encode(), message.value, headers)])
        spent.append(time.thread_time() - began)
    await producer.close()
    return 1e6 * statistics.median(spent)


def measure(
    pairs: int,
    settings: Callable[[int, int], Settings],
    without: Windows,
    answer: Callable[[Request], None],
    body: bytes,
) -> Slices:
    """`settings` makes those of a gateway from its own port and the mesh's; `without` are windows that do nothing."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        both = runner.run(_compare(pairs, settings, without, answer, body))
        second_us = runner.run(_second_us(settings(0, 0).kafka))
    chance = random.Random(0)
    resampled = sorted(_difference(chance.choices(both, k=len(both))) for _ in range(1000))
    middle, low, high = (1e6 * each for each in (_difference(both), resampled[25], resampled[-26]))
    return Slices(len(both), middle, low, high, second_us)
