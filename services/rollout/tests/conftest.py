"""What rollout's tests stand on: real servers, and stand-ins for workers."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from lepton.envoy import Envoy
from lepton.processes import Process, running
from lepton.servers import Etcd
from lepton_common.etcd import EtcdClient
from lepton_common.types import ModelRef
from lepton_rollout.mesh_envoy import EnvoyMesh
from lepton_rollout.serving import ServingTable
from lepton_rollout.settings import Settings

from .canaries import QUICK, Start
from .lab import Lab
from .scripted_mesh import ScriptedMesh
from .stand_ins import StandIn, StartWorker


@pytest.fixture
def model() -> ModelRef:
    return ModelRef("default", "digits")


@pytest.fixture
def envoy_recipe(tmp_path: Path) -> Envoy:
    return Envoy(tmp_path / "envoy", tmp_path / "mesh")


@pytest.fixture
def envoy(envoy_recipe: Envoy) -> Iterator[Process]:
    with running(envoy_recipe) as process:
        yield process


@pytest.fixture
async def mesh(envoy_recipe: Envoy) -> AsyncIterator[EnvoyMesh]:
    mesh = EnvoyMesh(envoy_recipe.mesh_dir, envoy_recipe.admin)
    yield mesh
    await mesh.close()


@pytest.fixture
async def client(envoy_recipe: Envoy) -> AsyncIterator[httpx.AsyncClient]:
    """The gateway's place: a client of the mesh."""
    async with httpx.AsyncClient(base_url=f"http://{envoy_recipe.mesh}", timeout=30) as client:
        yield client


@pytest.fixture
async def start_worker() -> AsyncIterator[StartWorker]:
    async with AsyncExitStack() as stack:

        async def start(name: str, pool: str = "cpu") -> StandIn:
            return await stack.enter_async_context(StandIn(name, pool))

        yield start


@pytest.fixture
async def lab(
    etcd: EtcdClient,
    etcd_server: Etcd,
    postgres_dsn: str,
    envoy: Process,
    envoy_recipe: Envoy,
    start_worker: StartWorker,
) -> AsyncIterator[Lab]:
    settings = Settings(
        postgres_dsn=postgres_dsn,
        etcd=etcd_server.address,
        mesh_dir=envoy_recipe.mesh_dir,
        envoy_admin=envoy_recipe.admin,
        drain_s=1,
    )
    lab = Lab(settings, etcd, start_worker)
    yield lab
    await lab.close()


@pytest.fixture
def scripted_mesh() -> ScriptedMesh:
    return ScriptedMesh()


@pytest.fixture
def table(etcd: EtcdClient, scripted_mesh: ScriptedMesh) -> ServingTable:
    return ServingTable(etcd, scripted_mesh)


@pytest.fixture
async def rollout(lab: Lab, model: ModelRef) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service with one worker, where version 1 of the model serves."""
    await lab.worker("a")
    async with lab.service() as client:
        await lab.register(model, 1, 2, 3)
        await lab.deploy(client, model, 1)
        yield client


@pytest.fixture
def start(rollout: httpx.AsyncClient, model: ModelRef) -> Start:
    async def start(version: int = 2, *, more: dict[str, Any] | None = None, **policy: Any) -> dict[str, Any]:
        body = {"model": model.model, "version": version, "policy": {**QUICK, **policy}, **(more or {})}
        answer = await rollout.post("/v1/rollouts", json=body)
        assert answer.status_code == 202, answer.text
        started: dict[str, Any] = answer.json()
        return started

    return start
