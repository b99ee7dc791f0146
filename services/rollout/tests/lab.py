"""The whole service on real PostgreSQL, etcd and Envoy. Only Kafka and the workers are stood in for."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import httpx
from lepton.ports import free_port
from lepton_common.auth import new_secret
from lepton_common.db import Database
from lepton_common.etcd import EtcdClient
from lepton_common.events import VersionRegistered
from lepton_common.records import KEYS, SERVING, KeyRecord, Scope, Serving
from lepton_common.telemetry import configure
from lepton_common.types import ModelRef
from lepton_rollout.main import build
from lepton_rollout.mesh_envoy import EnvoyMesh
from lepton_rollout.mesh_istio import IstioMesh
from lepton_rollout.settings import Settings

from .seconds import Clock, Seconds
from .stand_ins import PoolWorker, RecordingBus, StartWorker, assigned


class Lab:
    """Replicas of the service, their callers, workers and the facts they hear."""

    def __init__(self, settings: Settings, etcd: EtcdClient, start_worker: StartWorker) -> None:
        self.etcd = etcd
        self.bus = RecordingBus()
        self.clock = Clock()
        self.settings = settings
        self._start_worker = start_worker
        self._tasks: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def service(self, other_mesh: IstioMesh | None = None, **changes: object) -> AsyncIterator[httpx.AsyncClient]:
        """A replica that is ready, and a client of it. It moves traffic in the lab's Envoy, or in another mesh."""
        settings = self.settings.model_copy(update={"port": free_port(), **changes})
        mesh = other_mesh or EnvoyMesh(settings.mesh_dir, settings.envoy_admin)
        telemetry = configure("rollout", settings)
        logging.getLogger("httpx").setLevel(logging.WARNING)
        service = build(
            settings,
            telemetry,
            Database(settings.postgres_dsn, "rollout"),
            EtcdClient(settings.etcd),
            self.bus,
            mesh,
            self.clock,
        )
        stop = asyncio.Event()
        running = asyncio.create_task(service.run(stop))
        try:
            url, headers = f"http://127.0.0.1:{settings.port}", {"Authorization": f"Bearer {await self.key()}"}
            async with httpx.AsyncClient(base_url=url, headers=headers, timeout=30) as client:
                await ready(client)
                yield client
        finally:
            stop.set()
            await running
            telemetry.close()

    async def key(self, *scopes: Scope, tenant: str = "default") -> str:
        """A key with these scopes, or with all."""
        secret, digest, prefix = new_secret()
        record = KeyRecord(
            id=prefix,
            prefix=prefix,
            tenant=tenant,
            name="ann",
            scopes=frozenset(scopes or {Scope.ADMIN}),
            created_at=datetime.now(UTC),
        )
        await self.etcd.put(f"{KEYS}{digest}", record.model_dump_json().encode())
        return secret

    async def worker(self, name: str, pool: str = "cpu") -> PoolWorker:
        worker = PoolWorker(self.etcd, await self._start_worker(name, pool))
        self._tasks.append(asyncio.create_task(worker.run()))
        return worker

    async def register(self, model: ModelRef, *versions: int, deploy: bool = False) -> None:
        """The registry's facts, as Kafka delivers them."""
        for version in versions:
            await self.bus.tell(
                VersionRegistered(
                    tenant=model.tenant,
                    model=model.model,
                    version=version,
                    sha256=assigned(version).sha256,
                    size_bytes=1000,
                    deploy=deploy,
                    actor="ann",
                )
            )

    async def ended(self, client: httpx.AsyncClient, rollout: dict[str, Any]) -> dict[str, Any]:
        """The rollout once it is over."""
        try:
            async with asyncio.timeout(60):
                while rollout["finished_at"] is None:
                    answer = await client.get(f"/v1/rollouts/{rollout['id']}")
                    rollout = answer.raise_for_status().json()
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"not over after 60 s: {rollout}") from None
        return rollout

    async def deploy(self, client: httpx.AsyncClient, model: ModelRef, version: int) -> dict[str, Any]:
        """The finished rollout of the version."""
        answer = await client.post(
            "/v1/rollouts", json={"model": model.model, "version": version, "policy": "immediate"}
        )
        return await self.ended(client, answer.raise_for_status().json())

    @asynccontextmanager
    async def measured(self, model: ModelRef, **behaviour: object) -> AsyncIterator[Seconds]:
        """During the block the model has traffic, one window after the other: see `Seconds`."""
        seconds = Seconds(self.etcd, self.bus, self.clock, model)
        for name, value in behaviour.items():
            setattr(seconds, name, value)
        running = asyncio.create_task(seconds.run())
        try:
            yield seconds
        finally:
            running.cancel()
            (end,) = await asyncio.gather(running, return_exceptions=True)
            if not isinstance(end, asyncio.CancelledError):
                raise AssertionError(f"the traffic stopped: {end!r}")

    async def serving(self, model: ModelRef) -> Serving:
        found = await self.etcd.get(f"{SERVING}{model}")
        assert found is not None
        return Serving.model_validate_json(found.value)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def ready(client: httpx.AsyncClient) -> None:
    """The service that the client calls is ready."""
    while True:
        try:
            if (await client.get("/health/ready")).status_code == 200:
                return
        except httpx.TransportError:
            await asyncio.sleep(0.02)
