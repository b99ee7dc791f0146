"""The mesh as one Envoy that reads files: renders VirtualServices to xDS and waits until Envoy runs them.

Rules found by running Envoy 1.40: a file is replaced by rename, never rewritten; EDS comes before CDS, CDS before RDS;
Envoy has taken a file once its `version_text` is the one written; a refused file leaves the old configuration serving.
The files are the only state, so a restart of either side loses nothing, and a lock lets several processes share them.
"""

import asyncio
import fcntl
import hashlib
import json
import os
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any

import httpx
from lepton_common.errors import Conflict, Invalid, NotFound, Unavailable
from lepton_common.records import Serving, WorkerState

from lepton_rollout import xds
from lepton_rollout.istio import documents
from lepton_rollout.mesh import Edit, Stale, VirtualService, virtual_service

_CDS = "cluster_manager.cds"
_RDS = f"http.mesh.rds.{xds.ROUTES}"
_POLL_S = 0.003
# Envoy checks a worker as soon as it hears of it. Whoever else wants to move traffic waits meanwhile.
_FIRST_CHECK_S = 1.0


class EnvoyMesh:
    """The Mesh of one Envoy whose bootstrap reads `folder`/cds.json and rds.json; `admin` is its host:port.

    A call waits for an Envoy that is away until the acknowledgement is overdue; the same call later goes on from there.
    """

    def __init__(self, folder: Path, admin: str, *, ack_timeout_s: float = 5.0) -> None:
        self._folder = folder
        # Envoy is near: no proxy that the environment names for the world outside leads to it.
        self._admin = httpx.AsyncClient(base_url=f"http://{admin}", timeout=1.0, trust_env=False)
        self._ack_timeout_s = ack_timeout_s
        self._one_at_a_time = asyncio.Lock()

    async def close(self) -> None:
        await self._admin.aclose()

    async def apply(self, *services: VirtualService) -> None:
        async with self._exclusive():
            hosts = self._hosts()
            # Under the lock, so that whoever slept between reading a record and this cannot undo its successor's work.
            newer = {
                each.name: generation
                for each in services
                if each.name in hosts and (generation := xds.generation_of(hosts[each.name])) > each.generation
            }
            services = tuple(each for each in services if each.name not in newer)
            await self._ensure_clusters(_clusters(services))
            joining = {each.name: each.live_pools - xds.live_pools_of(hosts.get(each.name)) for each in services}
            healthy = await self._healthy_pools({pool for pools in joining.values() for pool in pools})
            hosts |= {each.name: xds.virtual_host(each) for each in services if joining[each.name] <= healthy}
            await self._publish("rds.json", _RDS, [xds.route_configuration(hosts.values())])
        if newer:
            raise Stale(newer)
        if held := sorted(name for name, pools in joining.items() if not pools <= healthy):
            raise Unavailable(
                f"no healthy worker for {', '.join(held)}: their routes are as they were", retry_after_s=1
            )

    async def place(self, workers: Iterable[WorkerState]) -> None:
        pools: dict[str, list[WorkerState]] = {}
        for worker in workers:
            pools.setdefault(worker.pool, []).append(worker)
        named = {xds.cluster_name(pool) for pool in pools}
        async with self._exclusive():
            for pool in {*pools, *map(xds.pool_of, self._clusters())}:
                self._write_endpoints(pool, pools.get(pool, []))
            await self._ensure_clusters(named)
            await self._drop_clusters(keep=named | xds.clusters_of(self._hosts().values()))

    async def live(self, serving: Serving) -> tuple[dict[str, Any], dict[str, Any]]:
        """Rendered from the record, once Envoy is seen to run that generation of it."""
        async with self._exclusive():
            host = self._hosts().get(str(serving.ref))
            version = json.loads((self._folder / "rds.json").read_text())["version_info"]
            stats = await self._stats(_RDS)
        if host is None:
            raise NotFound(f"the mesh has no routes of model {serving.model!r}")
        if not stats:
            raise Unavailable("the mesh does not answer", retry_after_s=1)
        if stats.get(f"{_RDS}.version_text") != version or host != xds.virtual_host(virtual_service(serving)):
            raise Unavailable(
                f"the mesh does not yet run what the record of model {serving.model!r} says", retry_after_s=1
            )
        return documents(virtual_service(serving))

    async def edits(self) -> AsyncIterator[Edit]:
        """None, ever: nobody else writes these files."""
        nothing: asyncio.Queue[Edit] = asyncio.Queue()
        while True:
            yield await nothing.get()

    async def note(self, edit: Edit) -> None:
        raise Conflict(f"nobody but rollout changes the routes of {edit.model} here")

    # --- clusters and endpoints -----------------------------------------------------------------------------------

    async def _ensure_clusters(self, names: set[str]) -> None:
        """Envoy knows these clusters, besides those it knew."""
        for pool in set(map(xds.pool_of, names)):
            if not self._endpoints_file(pool).exists():
                self._write_endpoints(pool, [])
        await self._publish_clusters(names | self._clusters())

    async def _drop_clusters(self, *, keep: set[str]) -> None:
        """Clusters without workers that no route leads to are gone. Their endpoints go last, as they came first."""
        known = self._clusters()
        if dropped := known - keep:
            await self._publish_clusters(known - dropped)
        for pool in set(map(xds.pool_of, dropped)) - set(map(xds.pool_of, keep)):
            self._endpoints_file(pool).unlink(missing_ok=True)

    async def _publish_clusters(self, names: set[str]) -> None:
        clusters = [
            xds.cluster(name, str(self._endpoints_file(xds.pool_of(name)).absolute())) for name in sorted(names)
        ]
        await self._publish("cds.json", _CDS, clusters)

    def _write_endpoints(self, pool: str, workers: Sequence[WorkerState]) -> None:
        path = self._endpoints_file(pool)
        text, _ = _document([xds.load_assignment(pool, workers)])
        if not path.exists() or path.read_text() != text:
            _replace(path, text)

    def _endpoints_file(self, pool: str) -> Path:
        return self._folder / "eds" / f"{pool}.json"

    async def _healthy_pools(self, pools: set[str]) -> set[str]:
        """Those of the pools in which Envoy's own health checks find a worker. A new pool gets a moment for it."""
        waiting = set(pools)
        deadline = asyncio.get_running_loop().time() + _FIRST_CHECK_S
        while waiting:
            for pool in tuple(waiting):
                stats = await self._stats(f"cluster.{xds.cluster_name(pool)}.membership_healthy")
                if any(int(value) > 0 for value in stats.values()):
                    waiting.remove(pool)
            if asyncio.get_running_loop().time() > deadline:
                break
            if waiting:
                await asyncio.sleep(_POLL_S)
        return pools - waiting

    # --- what is on disk ------------------------------------------------------------------------------------------

    def _resources(self, name: str) -> list[dict[str, Any]]:
        resources: list[dict[str, Any]] = json.loads((self._folder / name).read_text())["resources"]
        return resources

    def _hosts(self) -> dict[str, dict[str, Any]]:
        """The models' virtual hosts by name, as last published."""
        return xds.model_hosts(self._resources("rds.json")[0])

    def _clusters(self) -> set[str]:
        """The clusters that Envoy was told of."""
        return {cluster["name"] for cluster in self._resources("cds.json")}

    @asynccontextmanager
    async def _exclusive(self) -> AsyncIterator[None]:
        """One writer at a time, here and among the processes that share the folder. Its files are there."""
        async with self._one_at_a_time:
            (self._folder / "eds").mkdir(parents=True, exist_ok=True)
            with (self._folder / "lock").open("w") as lock:
                while not _locked(lock):  # noqa: ASYNC110 - a lock of the kernel's tells no event loop
                    await asyncio.sleep(_POLL_S)
                for name, resources in (("cds.json", []), ("rds.json", [xds.route_configuration([])])):
                    if not (self._folder / name).exists():
                        _replace(self._folder / name, _document(resources)[0])
                yield

    # --- write and acknowledge ------------------------------------------------------------------------------------

    async def _publish(self, name: str, stat: str, resources: list[dict[str, Any]]) -> None:
        """The file holds `resources` and Envoy runs them; a refused file is put back to what it was.

        Raises Invalid when Envoy refuses it, Unavailable when Envoy has not taken it in time: it will, once it is back.
        """
        path = self._folder / name
        before = path.read_text()
        text, version = _document(resources)
        stats = await self._stats(stat)
        if before == text and stats.get(f"{stat}.version_text") == version:
            return
        refusals = _refusals(stat, stats)
        # Written even when it is there already: the rename makes Envoy read it again, which shows a refusal again.
        _replace(path, text)
        deadline = asyncio.get_running_loop().time() + self._ack_timeout_s
        while asyncio.get_running_loop().time() < deadline:
            stats = await self._stats(stat)
            if stats.get(f"{stat}.version_text") == version:
                return
            if _refusals(stat, stats) > refusals:
                _replace(path, before)
                raise Invalid(f"the mesh refused {name}: its log says why; the routes are as they were")
            await asyncio.sleep(_POLL_S)
        raise Unavailable(f"the mesh did not acknowledge {name} within {self._ack_timeout_s:g} s", retry_after_s=1)

    async def _stats(self, prefix: str) -> dict[str, str]:
        """Envoy's statistics under a prefix; none while Envoy is away."""
        try:
            answer = await self._admin.get("/stats", params={"filter": f"^{re.escape(prefix)}"})
            answer.raise_for_status()
        except httpx.HTTPError:
            return {}
        lines = (line.partition(": ") for line in answer.text.splitlines())
        return {name: value.strip('"') for name, _, value in lines}


def _clusters(services: Iterable[VirtualService]) -> set[str]:
    """Every cluster that the services need."""
    return {xds.cluster_name(pool) for each in services for pool in each.pools} | {
        xds.mirror_name(pool) for each in services for pool in each.mirror_pools
    }


def _locked(file: IO[str]) -> bool:
    """Whether the file is now this process's alone; the kernel gives it back when the process dies."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _refusals(stat: str, stats: dict[str, str]) -> int:
    """How often Envoy found a file invalid (rejected) or unreadable (failure). Zero again after a restart of Envoy."""
    return sum(int(stats.get(f"{stat}.{outcome}", "0")) for outcome in ("update_rejected", "update_failure"))


def _document(resources: list[dict[str, Any]]) -> tuple[str, str]:
    """A discovery response and its version: the digest of what it says, so saying the same again changes nothing."""
    body = json.dumps(resources, sort_keys=True, separators=(",", ":"))
    version = hashlib.sha256(body.encode()).hexdigest()[:16]
    return f'{{"version_info":"{version}","resources":{body}}}', version


def _replace(path: Path, text: str) -> None:
    """The file holds `text`, or what it held, even after a power cut. Envoy only notices renames."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
