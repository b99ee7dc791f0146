"""The process itself on real Kafka, killed in the middle of windows and compared with one that was left alone."""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from lepton.ports import free_port
from lepton_common import envelope
from lepton_common.events import InferenceWindow, WindowClosed
from lepton_common.kafka import KafkaBus
from lepton_common.telemetry import Telemetry
from lepton_monitor.settings import Settings

from .stand_ins import told, version, window

SECONDS, GATEWAYS, MODELS = 20, "abc", ("digits", "sentiment")


@asynccontextmanager
async def process(settings: Settings, kafka: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """monitor as the platform runs it, ready; killed at the end if it is still there."""
    port = free_port()
    environment = {
        "LEPTON_PORT": str(port),
        "LEPTON_KAFKA": kafka,
        "LEPTON_POSTGRES_DSN": settings.postgres_dsn,
        "LEPTON_ETCD": settings.etcd,
    }
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "lepton_monitor.main", env={**os.environ, **environment}
    )
    try:
        async with asyncio.timeout(60), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            while not await is_ready(client):
                assert child.returncode is None
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def is_ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health/ready")).is_success
    except httpx.TransportError:
        await asyncio.sleep(0.02)
        return False


class Listener:
    """Hears every closed window."""

    def __init__(self, bus: KafkaBus) -> None:
        self.closed: dict[str, dict[int, WindowClosed]] = {}
        self._came = asyncio.Condition()
        bus.subscribe(WindowClosed, self._hear)

    async def _hear(self, event: WindowClosed) -> None:
        async with self._came:
            self.closed.setdefault(event.model, {})[event.second] = event
            self._came.notify_all()

    async def until(self, model: str, count: int) -> None:
        async with self._came:
            await self._came.wait_for(lambda: len(self.closed.get(model, {})) >= count)


def story(first: int, model: str) -> list[list[InferenceWindow]]:
    """What three gateways tell of a model, second by second; the last one dies half way."""
    return [
        [
            window(first + second, gateway, version(1, ok=second + 1), version(2, server_errors=1)).model_copy(
                update={"model": model}
            )
            for gateway in (GATEWAYS if second < SECONDS // 2 else GATEWAYS[:2])
        ]
        for second in range(SECONDS)
    ]


@pytest.mark.timeout(300)
async def test_kills_in_the_middle_of_windows_change_no_closed_window(
    settings: Settings, kafka: str, telemetry: Telemetry
) -> None:
    bus = KafkaBus(kafka, "test", telemetry)
    listener = Listener(bus)
    listening = asyncio.create_task(bus.run())
    first = int(time.time()) - 600
    undisturbed, killed = (story(first, model) for model in MODELS)

    async def send(*events: InferenceWindow) -> None:
        await bus.send([envelope.encode(event, "gateway") for event in events])

    async with process(settings, kafka):
        for events in undisturbed:
            await send(*events)
        await listener.until(MODELS[0], SECONDS)
    # Each time some of a second was told, and some not yet; what is told again meanwhile was told before.
    for begin in range(0, SECONDS, 10):
        async with process(settings, kafka) as child:
            for events in killed[begin : begin + 9]:
                await send(*events)
            await listener.until(MODELS[1], begin + 1)
            # Just before: had the others been silent for longer, their second would rightly be closed without them.
            await send(killed[begin + 9][0])
            child.kill()
            await child.wait()
        await send(*killed[begin + 9][1:], *killed[begin + 9][:1])
    async with process(settings, kafka) as child:
        await listener.until(MODELS[1], SECONDS)
        child.terminate()
        assert await child.wait() == 0

    plain, disturbed = (plainly(listener.closed[model]) for model in MODELS)
    assert disturbed == plain
    assert [each["sequence"] for each in plain] == list(range(1, SECONDS + 1))
    assert [each["gateways"] for each in plain] == [3] * (SECONDS // 2) + [2] * (SECONDS // 2)
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    await bus.close()


def plainly(closed: dict[int, WindowClosed]) -> list[dict[str, Any]]:
    """The closed windows in order, without what tells models apart."""
    return [{**each, "id": None, "model": None} for each in told(closed[second] for second in sorted(closed))]
