"""The process itself, with real Kafka in front of it."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from lepton.ports import free_port
from lepton_common import envelope
from lepton_common.events import VersionRegistered
from lepton_common.kafka import KafkaBus
from lepton_common.telemetry import Telemetry
from lepton_common.types import ModelRef

from .lab import Lab, ready
from .stand_ins import assigned, infer


@asynccontextmanager
async def process(lab: Lab, kafka: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, httpx.AsyncClient]]:
    """rollout as the platform runs it, ready; killed at the end if it is still there."""
    settings, port = lab.settings, free_port()
    environment = {
        "LEPTON_PORT": str(port),
        "LEPTON_KAFKA": kafka,
        "LEPTON_INSTANCE": "rollout",
        "LEPTON_POSTGRES_DSN": settings.postgres_dsn,
        "LEPTON_ETCD": settings.etcd,
        "LEPTON_MESH_DIR": str(settings.mesh_dir),
        "LEPTON_ENVOY_ADMIN": settings.envoy_admin,
    }
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "lepton_rollout.main", env={**os.environ, **environment}
    )
    headers = {"Authorization": f"Bearer {await lab.key()}"}
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30) as client:
            await ready(client)
            yield child, client
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


@pytest.fixture
async def bus(kafka: str, telemetry: Telemetry) -> AsyncIterator[KafkaBus]:
    bus = KafkaBus(kafka, "test", telemetry)
    yield bus
    await bus.close()


async def registered(bus: KafkaBus, model: ModelRef, version: int) -> None:
    event = VersionRegistered(
        tenant=model.tenant,
        model=model.model,
        version=version,
        sha256=assigned(version).sha256,
        size_bytes=1000,
        actor="ann",
    )
    await bus.send([envelope.encode(event, "registry")])


async def test_a_version_heard_of_on_kafka_is_deployed_through_a_kill_of_the_process(
    lab: Lab, kafka: str, bus: KafkaBus, client: httpx.AsyncClient, model: ModelRef
) -> None:
    worker = await lab.worker("a")
    worker.slow.add(1)
    async with process(lab, kafka) as (child, rollout):
        await registered(bus, model, 1)
        while not (known := (await rollout.get("/v1/rollouts")).json()):
            pass
        child.kill()
        await child.wait()
    worker.slow.clear()
    worker.look_again()
    async with process(lab, kafka) as (child, rollout):
        done = await lab.ended(rollout, known[0])
        child.terminate()
        assert await child.wait() == 0

    assert (done["version"], done["state"]) == (1, "promoted")
    assert (await infer(client, model)).headers["x-lepton-version"] == "1"


async def test_rollouts_go_on_while_kafka_is_away(lab: Lab, client: httpx.AsyncClient, model: ModelRef) -> None:
    await lab.worker("a")
    async with lab.service() as rollout:
        await lab.register(model, 1, 2)
        await lab.deploy(rollout, model, 1)
    nowhere = f"127.0.0.1:{free_port()}"
    async with process(lab, nowhere) as (_, rollout):
        done = await lab.deploy(rollout, model, 2)

    assert done["state"] == "promoted"
    assert (await infer(client, model)).headers["x-lepton-version"] == "2"
