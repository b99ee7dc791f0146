"""Windows on their way to Kafka: with it, without it, and through a gateway that stood still."""

import asyncio
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
from aiokafka import AIOKafkaConsumer
from lepton.kafka import Kafka, KafkaRuntime
from lepton.ports import free_port
from lepton.processes import freeze
from lepton.servers import Etcd
from lepton_common import envelope
from lepton_common.etcd import EtcdClient
from lepton_common.events import InferenceWindow
from lepton_common.http11 import JSON, Request, Server
from lepton_common.kafka_client import Bootstrap, Producer, ensure_topics
from lepton_common.records import Assigned, Serving, Share
from lepton_common.telemetry import Telemetry
from lepton_common.testing import serving, until
from lepton_common.types import ModelRef
from lepton_gateway.reporter import Reporter
from lepton_gateway.windows import SPLIT, Windows

from .lab import Lab, counted, running

INFER = "/v2/models/m/infer"
AWAY = "127.0.0.1:1"
MAX_QUEUED_BYTES = 50_000


class Heard:
    """Everything on lepton.telemetry, as it comes."""

    def __init__(self, consumer: AIOKafkaConsumer) -> None:
        self._consumer = consumer
        self.windows: list[InferenceWindow] = []

    async def until_answers(self, count: int) -> list[InferenceWindow]:
        """The windows, once they hold so many answers."""
        async with asyncio.timeout(60):
            while sum(each.requests for window in self.windows for each in window.versions) < count:
                record = await self._consumer.getone()
                headers = {name: value.decode() for name, value in record.headers}
                event = envelope.decode(headers, record.value)
                assert isinstance(event, InferenceWindow)
                assert record.key.decode() == event.subject
                self.windows.append(event)
        return self.windows


@asynccontextmanager
async def listening(kafka: str) -> AsyncIterator[Heard]:
    consumer = AIOKafkaConsumer("lepton.telemetry", bootstrap_servers=kafka, auto_offset_reset="earliest")
    await consumer.start()
    try:
        yield Heard(consumer)
    finally:
        await consumer.stop()


async def test_windows_arrive_and_add_up_to_the_answers(kafka: str, etcd: EtcdClient, telemetry: Telemetry) -> None:
    statuses = (200, 200, 200, 500, 429, 504)

    async with listening(kafka) as heard, running(etcd, telemetry, kafka=kafka) as lab:
        given: Counter[int] = Counter()

        def respond(request: Request) -> None:
            status = statuses[given.total() % len(statuses)]
            given[status] += 1
            request.respond(status, JSON + b"x-lepton-version: 1\r\n", b"{}")

        lab.mesh.handler = respond
        for _ in range(12):
            await asyncio.gather(*(lab.client.post(INFER) for _ in range(50)))
            await asyncio.sleep(0.2)
        windows = await heard.until_answers(600)
        text = await lab.metrics()

    assert counted(windows) == {
        (1, False, "ok"): given[200],
        (1, False, "server_errors"): given[500],
        (1, False, "shed"): given[429],
        (1, False, "timeouts"): given[504],
        (1, False, "latency"): 600,
    }
    assert len(windows) >= 3
    assert len({each.id for each in windows}) == len({each.second for each in windows}) == len(windows)
    assert {(each.gateway, each.tenant, each.model) for each in windows} == {("lab", "acme", "m")}
    assert len({each.epoch for each in windows}) == 1
    assert {each.pool for window in windows for each in window.versions} == {"cpu"}
    assert "lepton_gateway_windows_dropped_total 0.0" in text


async def test_the_last_second_is_told_when_the_gateway_ends(
    kafka: str, etcd: EtcdClient, telemetry: Telemetry
) -> None:
    async with listening(kafka) as heard:
        async with running(etcd, telemetry, kafka=kafka) as lab:
            for _ in range(7):
                await lab.client.post(INFER)
        assert counted(await heard.until_answers(7))[1, False, "ok"] == 7


async def test_without_kafka_no_request_fails(lab: Lab) -> None:
    for _ in range(5):
        answers = await asyncio.gather(*(lab.client.post(INFER) for _ in range(50)))
        assert {each.status_code for each in answers} == {200}
        await asyncio.sleep(0.3)
    text = await lab.metrics()
    assert "lepton_gateway_windows_sent_total 0.0" in text
    assert 'code="200",model="m",tenant="acme",version="1"} 250.0' in text


class Seconds:
    """Ten models with an answer each in every second; a test says when a second is over."""

    def __init__(self, kafka: str) -> None:
        self._now = 1_800_000_000
        self._windows = Windows(lambda: float(self._now))
        producer = Producer(Bootstrap(kafka, mock=False), "test")
        self.reporter = Reporter(self._windows, producer, "g", max_queued_bytes=MAX_QUEUED_BYTES)

    async def go_by(self, seconds: int) -> None:
        for _ in range(seconds):
            for number in range(10):
                counts = self._windows.of(ModelRef("acme", f"m{number}"))
                counts.in_flight += 1
                counts.wake()
                counts.add(SPLIT, b"1", 200, 0.01)
                counts.in_flight -= 1
            self._now += 1
            self._windows.roll()
            await self.reporter.collect()


@asynccontextmanager
async def reporting(reporter: Reporter) -> AsyncIterator[None]:
    task = asyncio.create_task(reporter.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_without_kafka_the_oldest_windows_are_dropped_and_counted_and_memory_is_bounded() -> None:
    seconds = Seconds(AWAY)
    reporter = seconds.reporter
    async with reporting(reporter):
        await seconds.go_by(100)
        assert reporter.queued_bytes <= MAX_QUEUED_BYTES
        dropped = reporter.dropped
        assert 500 < dropped < 1000
        await seconds.go_by(10)
        assert reporter.dropped == dropped + 100
    await reporter.close()
    assert (reporter.sent, reporter.dropped) == (0, 1110)  # With the empty ones after the last requests.


async def test_a_kafka_that_does_not_answer_is_no_worse_than_none() -> None:
    loop = asyncio.get_running_loop()
    async with await loop.create_server(asyncio.Protocol, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        seconds = Seconds(f"{host}:{port}")
        async with reporting(seconds.reporter):
            for _ in range(20):
                await seconds.go_by(10)
                await asyncio.sleep(0.01)
            assert seconds.reporter.queued_bytes <= MAX_QUEUED_BYTES
            assert 1500 < seconds.reporter.dropped < 2000
        await seconds.reporter.close()
        assert seconds.reporter.dropped == 2010


async def test_windows_made_while_kafka_was_away_arrive_when_it_is_back(
    tmp_path: Path, kafka_runtime: KafkaRuntime
) -> None:
    recipe = Kafka(tmp_path, kafka_runtime)
    async with serving(recipe):
        await ensure_topics(recipe.address)
    seconds = Seconds(recipe.address)
    async with reporting(seconds.reporter):
        await seconds.go_by(5)
        async with serving(recipe):
            await until(lambda: seconds.reporter.sent == 50)
            async with listening(recipe.address) as heard:
                windows = await heard.until_answers(50)
    assert {(each.model, each.second - 1_800_000_000) for each in windows} == {
        (f"m{number}", second) for number in range(10) for second in range(5)
    }
    assert seconds.reporter.dropped == 0
    await seconds.reporter.close()


# --- a gateway that stands still ---


@asynccontextmanager
async def gateway_process(mesh: tuple[str, int], etcd: str, kafka: str) -> AsyncIterator[tuple[str, int]]:
    """A gateway as a process of its own: its URL and its process id."""
    port = free_port()
    settings = {
        "LEPTON_PORT": str(port),
        "LEPTON_MESH": "{}:{}".format(*mesh),
        "LEPTON_ETCD": etcd,
        "LEPTON_KAFKA": kafka,
        "LEPTON_ROLLOUT_URL": "http://127.0.0.1:1",
        "LEPTON_KEYLESS_LOOPBACK": "true",
        "LEPTON_LOG_LEVEL": "warning",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "lepton_gateway.main", env={**os.environ, **settings}
    )
    try:
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        assert await process.wait() == 0


class Callers:
    """They ask without pause, and note when they asked and when they were answered, in Unix seconds."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.noted: list[tuple[int, int]] = []

    async def ask(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            asked = int(time.time())
            response = await self._client.post(INFER)
            assert response.status_code == 200
            self.noted.append((asked, int(time.time())))


async def test_a_gateway_that_stood_still_puts_no_answer_into_a_wrong_second(
    kafka: str, etcd: EtcdClient, etcd_server: Etcd
) -> None:
    answer = JSON + b"x-lepton-version: 1\r\n"
    mesh = Server(lambda request: request.respond(200, answer, b"{}"))
    await mesh.start("127.0.0.1", 0)
    share = (Share(version=1, percent=100),)
    version = (Assigned(version=1, sha256="ab" * 32, size_bytes=1),)
    record = Serving(tenant="default", model="m", generation=1, stable=1, split=share, versions=version)
    await etcd.put(record.key, record.model_dump_json().encode())
    stop = asyncio.Event()
    async with (
        gateway_process(mesh.address, etcd_server.address, kafka) as (url, pid),
        httpx.AsyncClient(base_url=url, timeout=30, transport=httpx.AsyncHTTPTransport(retries=100)) as client,
        listening(kafka) as heard,
    ):
        callers = Callers(client)
        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(callers.ask(stop))
            await until(lambda: len(callers.noted) > 200)
            assert freeze(psutil.Process(pid))
            frozen = int(time.time())
            await asyncio.sleep(3)
            thawed = int(time.time())
            os.kill(pid, signal.SIGCONT)
            known = len(callers.noted)
            await until(lambda: len(callers.noted) > known + 200)
            stop.set()
        windows = await heard.until_answers(len(callers.noted))
    await mesh.drain(0)

    assert counted(windows)[1, False, "ok"] == len(callers.noted)
    by_second = Counter({each.second: each.versions[0].ok for each in windows if each.versions})
    assert len([each for each in windows if each.versions]) == len(by_second)
    for second, count in by_second.items():
        assert count >= sum(asked == answered == second for asked, answered in callers.noted)
        assert count <= sum(asked <= second <= answered for asked, answered in callers.noted)
    assert not any(by_second[second] for second in range(frozen + 1, thawed))
