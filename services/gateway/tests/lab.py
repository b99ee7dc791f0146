"""The real gateway on a real etcd. Behind it stands a mesh that answers as a test tells it to."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx
import orjson
from lepton.ports import free_port
from lepton_common.auth import new_secret
from lepton_common.etcd import EtcdClient
from lepton_common.events import InferenceWindow
from lepton_common.http11 import JSON, Request, Server
from lepton_common.records import (
    KEYS,
    WORKERS,
    Assigned,
    KeyLimits,
    KeyRecord,
    Limits,
    Loaded,
    LoadState,
    Scope,
    Serving,
    Share,
    WorkerState,
)
from lepton_common.settings import Oidc
from lepton_common.telemetry import Telemetry
from lepton_gateway.main import build
from lepton_gateway.reporter import event_of
from lepton_gateway.settings import Settings
from lepton_gateway.windows import Closed, Windows

SHA256 = "ab" * 32


@dataclass
class Mesh:
    """What stands behind the gateway. It remembers every request and answers by `handler`."""

    handler: Callable[[Request], None] = lambda request: request.respond(
        200, JSON + b"x-lepton-version: 1\r\n", b'{"model_name":"m","outputs":[]}'
    )
    requests: list[Request] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, request: Request) -> None:
        self.requests.append(request)
        self.arrived.set()
        self.handler(request)


class KeptWindows(Windows):
    """The gateway's windows, of which a test reads what was closed; `shift_s` moves the clock."""

    def __init__(self) -> None:
        self.shift_s = 0.0
        self.kept: list[Closed] = []
        super().__init__(lambda: time.time() + self.shift_s)

    def close(self, now: int) -> None:
        known = len(self.closed)
        super().close(now)
        self.kept += list(self.closed)[known:]

    def told(self, model: str) -> list[InferenceWindow]:
        """Everything so far as the gateway tells it, the current second included."""
        self.close(int(self.clock()))
        return [event_of(each, "lab") for each in self.kept if each.ref.model == model]


@dataclass
class Lab:
    """A gateway and what it depends on. `key` has the scope infer for tenant `acme`."""

    client: httpx.AsyncClient
    address: tuple[str, int]
    admin: str
    grpc_address: tuple[str, int]
    mesh: Mesh
    mesh_server: Server
    etcd: EtcdClient
    windows: KeptWindows
    key: str

    async def serve(
        self, model: str, *versions: int, tenant: str = "acme", limits: Limits | None = None, **fields: Any
    ) -> Serving:
        """The versions are assigned; the first takes all traffic. `fields` are others of the record."""
        serving = Serving(
            tenant=tenant,
            model=model,
            generation=1,
            stable=versions[0] if versions else None,
            split=tuple(Share(version=version, percent=100) for version in versions[:1]),
            versions=tuple(Assigned(version=version, sha256=SHA256, size_bytes=1) for version in versions),
            limits=limits or Limits(),
            **fields,
        )
        await self.etcd.put(serving.key, serving.model_dump_json().encode())
        return serving

    async def report(self, worker: str, *loaded: tuple[str, int, LoadState, str], address: str = "h:1") -> None:
        """The worker says which models' versions it has, of tenant `acme`."""
        versions = tuple(
            Loaded(tenant="acme", model=model, version=version, sha256=SHA256, state=state, reason=reason)
            for model, version, state, reason in loaded
        )
        state = WorkerState(id=worker, pool="cpu", address=address, device="cpu", versions=versions)
        await self.etcd.put(WORKERS + worker, state.model_dump_json().encode())

    async def new_key(
        self,
        *scopes: Scope,
        tenant: str = "acme",
        expires_at: datetime | None = None,
        models: Sequence[str] = (),
        limits: KeyLimits | None = None,
    ) -> str:
        secret, digest, prefix = new_secret()
        record = KeyRecord(
            id=prefix,
            prefix=prefix,
            tenant=tenant,
            name="test",
            scopes=frozenset(scopes),
            created_at=datetime.now(UTC),
            expires_at=expires_at,
            models=tuple(models),
            limits=limits or KeyLimits(),
        )
        await self.etcd.put(KEYS + digest, record.model_dump_json().encode())
        return secret

    async def metrics(self) -> str:
        """Every metric, from the port that callers do not see."""
        # Reading the certificates of the world, which nobody needs here, takes a client most of its time.
        async with httpx.AsyncClient(base_url=self.admin, verify=False, timeout=10) as client:
            return (await client.get("/metrics")).text

    @staticmethod
    def patience() -> asyncio.Timeout:
        """How long a test waits for what must come."""
        return asyncio.timeout(30)

    async def until(self, path: str, status: int, key: str | None = None) -> httpx.Response:
        """The answer to GET, once it has that status."""
        headers = {"authorization": f"Bearer {key or self.key}"}
        async with self.patience():
            while True:
                response = await self.client.get(path, headers=headers)
                if response.status_code == status:
                    return response
                await asyncio.sleep(0.01)


@asynccontextmanager
async def running(
    etcd: EtcdClient,
    telemetry: Telemetry,
    rollout_url: str = "http://127.0.0.1:1",
    keyless: bool = True,
    kafka: str = "127.0.0.1:1",
    oidc: Oidc | None = None,
) -> AsyncIterator[Lab]:
    mesh = Mesh()
    mesh_server = Server(mesh)
    await mesh_server.start("127.0.0.1", 0)
    host, port = mesh_server.address
    settings = Settings(
        port=free_port(),
        admin_port=free_port(),
        grpc_port=free_port(),
        mesh=f"{host}:{port}",
        rollout_url=rollout_url,
        keyless_loopback=keyless,
        drain_s=1,
        max_body_bytes=1_000_000,
        max_buffered_bytes=2_500_000,
        kafka=kafka,
        gateway_id="lab",
        oidc=oidc,
    )
    windows = KeptWindows()
    service = build(settings, telemetry, etcd, windows)
    stop = asyncio.Event()
    serving = asyncio.create_task(service.run(stop))
    while not service.readiness.started:
        await asyncio.sleep(0.01)
        assert not serving.done()
    gateway = ("127.0.0.1", settings.port)
    async with httpx.AsyncClient(base_url=f"http://{gateway[0]}:{gateway[1]}", timeout=10) as client:
        admin, grpc = f"http://127.0.0.1:{settings.admin_port}", (gateway[0], settings.grpc_port)
        lab = Lab(client, gateway, admin, grpc, mesh, mesh_server, etcd, windows, "")
        lab.key = await lab.new_key(Scope.INFER)
        client.headers["authorization"] = f"Bearer {lab.key}"
        await lab.serve("m", 1)
        await lab.report("w", ("m", 1, LoadState.READY, ""))
        await lab.until("/v2/models/m/ready", 200)
        yield lab
    stop.set()
    await serving
    await mesh_server.drain(0)


def counted(windows: Iterable[InferenceWindow]) -> Counter[tuple[int, bool, str]]:
    """What the windows add up to, by version, whether it was forced, and outcome; latencies too."""
    total: Counter[tuple[int, bool, str]] = Counter()
    for window in windows:
        for each in window.versions:
            for outcome in ("ok", "client_errors", "server_errors", "timeouts", "shed"):
                total[each.version, each.forced, outcome] += getattr(each, outcome)
            total[each.version, each.forced, "latency"] += sum(each.latency.values())
    return +total


def error_of(response: httpx.Response) -> str:
    """The message of an OIP error, which every answer but 200 must be."""
    assert response.headers["content-type"] == "application/json"
    message = orjson.loads(response.content)["error"]
    assert isinstance(message, str)
    assert message
    return message
