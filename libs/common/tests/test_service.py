"""A service's life: live at once, ready when it can work, gone in order."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from lepton.ports import free_port
from lepton_common import service as service_module
from lepton_common.errors import Unavailable
from lepton_common.events import ModelCreated
from lepton_common.service import Service
from lepton_common.settings import Settings
from lepton_common.telemetry import Telemetry
from lepton_common.testing import until

# A whole process: an app whose one route takes its time.
PROCESS = """
import asyncio
from lepton_common.auth import Keys
from lepton_common.etcd import EtcdClient
from lepton_common.service import Service, run
from lepton_common.settings import Settings
from lepton_common.telemetry import configure
from lepton_common.web import create_app

settings = Settings.read()
service = Service("slow", settings, configure("slow", settings))
etcd = EtcdClient("127.0.0.1:1")
service.on_close(etcd.close)
app = create_app(service, Keys(etcd))

@app.get("/v1/slow")
async def slow() -> str:
    await asyncio.sleep(0.5)
    return "done"

service.web(app)
run(service)
"""


@dataclass
class Stub:
    """A server that only remembers what it was told."""

    told: list[str] = field(default_factory=list)
    address: tuple[str, int] = ("127.0.0.1", 1)

    async def start(self, host: str, port: int) -> None:
        self.told.append("start")

    async def drain(self, grace_s: float) -> None:
        self.told.append(f"drain {grace_s}")


@pytest.fixture
def service(telemetry: Telemetry) -> Service:
    return Service("test", Settings(drain_s=0.5), telemetry)


@asynccontextmanager
async def running(service: Service) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(service.run(stop))
    try:
        yield
    finally:
        stop.set()
        await task


async def ready(service: Service) -> None:
    await until(lambda: not service.readiness.reasons())


async def test_start_up_work_is_done_in_order_and_waits_for_what_is_away(service: Service) -> None:
    done: list[str] = []
    away = True

    async def connect() -> None:
        if away:
            raise Unavailable("the database is not available")
        done.append("connect")

    async def migrate() -> None:
        done.append("migrate")

    service.prepare(connect)
    service.prepare(migrate)
    async with running(service):
        await until(lambda: "the database is not available" in service.readiness.reasons().values())
        assert service.readiness.answer()[0] == 503
        assert done == []
        away = False
        await ready(service)
        assert done == ["connect", "migrate"]
        assert service.readiness.answer() == (200, b'{"status": "ready"}')
    assert service.readiness.reasons() == {"service": "draining"}


async def test_a_service_that_still_waits_can_be_ended(service: Service) -> None:
    async def connect() -> None:
        raise Unavailable("the database is not available")

    service.prepare(connect)
    async with running(service), asyncio.timeout(10):
        await until(lambda: len(service.readiness.reasons()) == 2)
    assert not service.readiness.started


async def test_a_mistake_at_start_ends_the_service_after_closing_it(service: Service) -> None:
    closed = asyncio.Event()

    async def fail() -> None:
        raise ValueError("a bug")

    async def close() -> None:
        closed.set()

    service.prepare(fail)
    service.on_close(close)
    with pytest.raises(ExceptionGroup) as raised:
        await service.run(asyncio.Event())
    assert raised.group_contains(ValueError, match="a bug")
    assert closed.is_set()


async def test_preparation_that_a_library_cancels_is_told_and_everything_is_closed(service: Service) -> None:
    closed = asyncio.Event()

    async def cancelled() -> None:
        raise asyncio.CancelledError

    async def close() -> None:
        closed.set()

    service.prepare(cancelled)
    service.on_close(close)
    service.on_close(cancelled)
    with pytest.raises(RuntimeError, match="cancelled from inside"):
        await service.run(asyncio.Event())
    assert closed.is_set()


@pytest.mark.parametrize("error", [RuntimeError("lost"), asyncio.CancelledError()])
async def test_background_work_that_fails_is_started_again_and_counted(
    service: Service, telemetry: Telemetry, error: BaseException
) -> None:
    starts = 0
    third = asyncio.Event()

    async def mirror() -> None:
        nonlocal starts
        starts += 1
        if starts < 3:
            raise error
        third.set()
        await asyncio.Event().wait()

    service.background(mirror)
    async with running(service), asyncio.timeout(30):
        await third.wait()
    assert failures(telemetry, mirror) == 2


@pytest.mark.parametrize("error", [RuntimeError("a bad day"), asyncio.CancelledError()])
async def test_periodic_work_goes_on_after_a_failure(
    service: Service, telemetry: Telemetry, error: BaseException
) -> None:
    runs = 0
    third = asyncio.Event()

    async def sweep() -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise error
        if runs == 3:
            third.set()

    service.every(0.01, sweep)
    async with running(service), asyncio.timeout(30):
        await third.wait()
    assert failures(telemetry, sweep) == 1


def failures(telemetry: Telemetry, work: Any) -> float | None:
    return telemetry.registry.get_sample_value("lepton_test_task_failures_total", {"task": work.__qualname__})


async def test_the_end_is_in_reverse_and_one_failure_does_not_stop_it(service: Service) -> None:
    server, told = Stub(), []

    async def first() -> None:
        told.append("first")

    async def second() -> None:
        told.append("second")
        raise RuntimeError("cannot close")

    async def work() -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        told.append(f"work ended after {server.told[-1]}")

    service.serve(server)
    service.background(work)
    service.on_close(first)
    service.on_close(second)
    async with running(service):
        await ready(service)
    assert server.told == ["start", "drain 0.5"]
    assert told == ["work ended after drain 0.5", "second", "first"]


async def test_work_that_does_not_end_is_left_behind(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "_CLOSE_S", 0.1)
    released = asyncio.Event()

    async def hang() -> None:
        while not released.is_set():
            with suppress(asyncio.CancelledError):
                await released.wait()

    service.background(hang)
    async with running(service):  # It ends without an error all the same.
        await ready(service)
    assert service.readiness.draining
    released.set()


async def test_a_check_decides_whether_the_service_is_ready(service: Service) -> None:
    reason: str | None = "no worker"
    service.ready("workers", lambda: reason)
    async with running(service):
        await until(lambda: "service" not in service.readiness.reasons())
        assert service.readiness.reasons() == {"workers": "no worker"}
        reason = None
        assert service.readiness.reasons() == {}


def test_a_service_without_database_or_bus_cannot_hear(service: Service) -> None:
    async def decide(event: ModelCreated, tx: Any) -> None: ...

    with pytest.raises(ValueError, match="no database or no bus"):
        service.decide(ModelCreated, decide)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_running_requests_and_ends_with_0(number: signal.Signals) -> None:
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROCESS, env={"LEPTON_PORT": str(port)}, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            await answers(client, "/health/ready")
            slow = asyncio.create_task(client.get("/v1/slow"))
            await answers(client, "/health/live")
            process.send_signal(number)
            assert (await slow).json() == "done"
        async with asyncio.timeout(30):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def answers(client: httpx.AsyncClient, path: str) -> None:
    async with asyncio.timeout(30):
        while True:
            with suppress(httpx.TransportError):
                if (await client.get(path)).status_code == 200:
                    return
            await asyncio.sleep(0.05)
