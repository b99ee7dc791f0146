"""A worker process and etcd: announced under a lease, serving on while etcd is away, drained on SIGTERM."""

import asyncio
import http.client
import json
import shutil
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from lepton.processes import http_get, running
from lepton.servers import Etcd
from lepton_common.etcd import EtcdClient
from lepton_common.mirror import Mirror
from lepton_common.records import WORKERS, LoadState, WorkerState
from lepton_common.testing import until

from .conftest import DOUBLE, WorkerRecipe, onnx_bytes, serve


class Watched:
    """The workers' records as rollout and gateway see them."""

    def __init__(self, etcd: EtcdClient) -> None:
        self._changed = asyncio.Event()
        self.mirror = Mirror(etcd, WORKERS, WorkerState.model_validate_json, lambda key, state: self._changed.set())

    async def until_ready(self) -> WorkerState:
        """The worker w1 once its version is ready and it is not draining."""
        async with asyncio.timeout(30):
            while True:
                state = self.mirror.items.get("w1")
                if state and not state.draining and [each.state for each in state.versions] == [LoadState.READY]:
                    return state
                await self._next()

    async def until_draining(self) -> None:
        async with asyncio.timeout(30):
            while not ((state := self.mirror.items.get("w1")) and state.draining):
                await self._next()

    async def until_gone(self) -> None:
        async with asyncio.timeout(30):
            while "w1" in self.mirror.items:
                await self._next()

    async def _next(self) -> None:
        self._changed.clear()
        await self._changed.wait()


@asynccontextmanager
async def watching(address: str) -> AsyncIterator[tuple[EtcdClient, Watched]]:
    client = EtcdClient(address)
    watched = Watched(client)
    task = asyncio.create_task(watched.mirror.run())
    try:
        yield client, watched
    finally:
        task.cancel()
        await asyncio.wait([task])
        await client.close()


async def test_a_worker_announces_itself_drains_and_leaves(etcd_server: Etcd, etcd: EtcdClient, tmp_path: Path) -> None:
    recipe = WorkerRecipe(tmp_path, etcd_server.address)
    await serve(etcd, recipe, "double", onnx_bytes(DOUBLE))
    async with watching(etcd_server.address) as (_, watched):
        with running(recipe) as process:
            state = await watched.until_ready()
            assert (state.pool, state.address, state.device) == ("cpu", recipe.address, "cpu")
            process.send(signal.SIGTERM)
            await watched.until_draining()
            status, body = http_get(recipe.port, "/v2/health/ready")
            assert (status, json.loads(body)) == (503, {"ready": False})
            assert http_get(recipe.port, "/v2/models/double/ready")[0] == 200
            await watched.until_gone()
            assert await asyncio.to_thread(process.wait, 20)


async def test_a_worker_serves_on_while_etcd_is_away_and_announces_itself_to_one_that_forgot_it(tmp_path: Path) -> None:
    etcd = Etcd(tmp_path / "etcd")
    recipe = WorkerRecipe(tmp_path / "worker", etcd.address)
    with running(etcd) as first:
        async with watching(etcd.address) as (client, watched):
            await serve(client, recipe, "double", onnx_bytes(DOUBLE))
            with running(recipe):
                await watched.until_ready()
                first.kill()
                assert http_get(recipe.port, "/v2/models/double/ready")[0] == 200
                assert http_get(recipe.port, "/v2/health/ready")[0] == 200
                shutil.rmtree(etcd.folder / "data")
                with running(etcd):
                    await serve(client, recipe, "double", onnx_bytes(DOUBLE))
                    await watched.until_gone()
                    await watched.until_ready()


async def test_a_body_without_room_is_an_overload_that_the_mesh_tries_on_no_other_worker(
    etcd_server: Etcd, etcd: EtcdClient, tmp_path: Path
) -> None:
    settings = {"MAX_BODY_BYTES": 1_000_000, "MAX_BUFFERED_BYTES": 1_000_000}
    recipe = WorkerRecipe(tmp_path, etcd_server.address, settings=settings)
    await serve(etcd, recipe, "double", onnx_bytes(DOUBLE))

    def told(line: bytes) -> bool:
        return b"\n%b\n" % line in http_get(recipe.port, "/metrics")[1]

    with running(recipe), socket.create_connection(("127.0.0.1", recipe.port)) as greedy:
        greedy.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\n" + bytes(800_000))
        await until(lambda: told(b"lepton_worker_free_body_bytes 200000.0"))
        caller = http.client.HTTPConnection("127.0.0.1", recipe.port, timeout=30)
        caller.request("POST", "/v2/models/double/infer", bytes(300_000))
        answer = caller.getresponse()
        assert (answer.status, answer.headers["x-envoy-ratelimited"], answer.headers["retry-after"]) == (
            503,
            "true",
            "1",
        )
        caller.close()
        assert told(b"lepton_worker_refused_bodies_total 1.0")
