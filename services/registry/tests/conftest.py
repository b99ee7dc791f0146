"""The registry as it runs, on a real PostgreSQL and etcd, with a bus that only records."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import httpx
import onnx
import pytest
from lepton.ports import free_port
from lepton.servers import Etcd
from lepton_common.auth import digest, new_secret
from lepton_common.bus import Bus, E
from lepton_common.db import Database
from lepton_common.envelope import Message
from lepton_common.etcd import EtcdClient
from lepton_common.events import AccessEvent, Event, decode
from lepton_common.foreign import Message as ForeignMessage
from lepton_common.service import Service
from lepton_common.telemetry import configure
from lepton_registry.main import build
from lepton_registry.settings import Settings

OPERATOR = new_secret()[0]


class RecordingBus:
    """Takes every message the outbox brings, and brings none. What is for the audit is kept apart."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.audit: list[AccessEvent] = []
        self.came = asyncio.Condition()

    def subscribe(self, kind: type[E], handler: Callable[[E], Awaitable[None]]) -> None: ...

    def hear(self, topic: str, handler: Callable[[ForeignMessage], Awaitable[None]]) -> None: ...

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def send(self, messages: Sequence[Message]) -> None:
        async with self.came:
            for event in [decode(each.headers["ce_type"], each.value) for each in messages]:
                if isinstance(event, AccessEvent):
                    self.audit.append(event)
                else:
                    self.events.append(event)
            self.came.notify_all()

    async def close(self) -> None: ...

    async def told(self, holds: Callable[[list[AccessEvent]], bool]) -> list[AccessEvent]:
        """What the audit was told, as soon as that holds."""
        async with asyncio.timeout(30), self.came:
            await self.came.wait_for(lambda: holds(self.audit))
        return list(self.audit)

    async def first(self, count: int) -> list[Event]:
        """The first events, as soon as there are so many."""
        async with self.came:
            await self.came.wait_for(lambda: len(self.events) >= count)
        return self.events[:count]


@dataclass
class Registry:
    """A running registry and what stands around it."""

    url: str
    settings: Settings
    bus: RecordingBus
    clients: contextlib.AsyncExitStack = field(repr=False)

    async def client(self, secret: str = OPERATOR) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {secret}"}
        return await self.clients.enter_async_context(httpx.AsyncClient(base_url=self.url, headers=headers, timeout=30))

    async def tenant(self, name: str, *scopes: str) -> httpx.AsyncClient:
        """A client with a key of that tenant, which exists, as soon as the key counts."""
        operator = await self.client()
        await accepted(lambda: operator.post("/v1/tenants", json={"name": name}))

        def new_key() -> Awaitable[httpx.Response]:
            # Another name every time: a key whose answer was lost may be there.
            body = {"name": f"key {uuid4()}", "tenant": name, "scopes": scopes or ["read", "deploy"]}
            return operator.post("/v1/keys", json=body)

        client = await self.client((await accepted(new_key)).json()["secret"])
        await until_known(client)
        return client


async def accepted(ask: Callable[[], Awaitable[httpx.Response]]) -> httpx.Response:
    """The answer of success. Asks again while it is 503, as callers should: on a busy machine a part may be slow."""
    async with asyncio.timeout(60):
        while (answer := await ask()).status_code == httpx.codes.SERVICE_UNAVAILABLE:  # noqa: ASYNC110 - an answer is polled
            await asyncio.sleep(0.05)
    return answer.raise_for_status()


async def until(holds: Callable[[], Awaitable[bool]], within_s: float = 60) -> None:
    """Returns as soon as it holds. For what is only seen by asking again. The limit is there so that a test ends."""
    async with asyncio.timeout(within_s):
        while not await holds():  # noqa: ASYNC110 - over HTTP there is nothing to await
            await asyncio.sleep(0.005)


async def until_known(client: httpx.AsyncClient) -> None:
    """The client's key counts: the service has heard of it from etcd."""
    unknown = {httpx.codes.UNAUTHORIZED, httpx.codes.SERVICE_UNAVAILABLE}

    async def known() -> bool:
        return (await client.get("/v1/models/nobody-has-this")).status_code not in unknown

    await until(known)


@contextlib.asynccontextmanager
async def serving(settings: Settings, bus: Bus) -> AsyncIterator[Service]:
    """The registry runs, ready, for as long as the block."""
    telemetry = configure("registry", settings)
    db = Database(settings.postgres_dsn, "registry")
    service = build(settings, telemetry, db, EtcdClient(settings.etcd), bus)
    stop = asyncio.Event()
    running = asyncio.create_task(service.run(stop))
    try:
        async with asyncio.timeout(30), httpx.AsyncClient(base_url=url_of(settings)) as client:
            while not service.readiness.started:
                await asyncio.wait({running}, timeout=0.01)
                assert not running.done()
            (await client.get("/health/ready")).raise_for_status()
        yield service
    finally:
        stop.set()
        await running
        telemetry.close()


def url_of(settings: Settings) -> str:
    return f"http://{settings.host}:{settings.port}"


@pytest.fixture
def settings(postgres_dsn: str, etcd_server: Etcd, etcd: EtcdClient, tmp_path: Path) -> Settings:
    return Settings(
        port=free_port(),
        postgres_dsn=postgres_dsn,
        etcd=etcd_server.address,
        blobs=str(tmp_path / "blobs"),
        staging=tmp_path / "staging",
        max_artifact_bytes=4 << 20,
        bootstrap_key_sha256=digest(OPERATOR),
        drain_s=1,
    )


@pytest.fixture
async def registry(settings: Settings) -> AsyncIterator[Registry]:
    bus = RecordingBus()
    async with serving(settings, bus), contextlib.AsyncExitStack() as clients:
        yield Registry(url_of(settings), settings, bus, clients)


def model_bytes(scale: float = 1.0, padding: int = 0) -> bytes:
    """A small model that Lepton serves, another one for every scale, and so many bytes larger."""
    text = f"""
        <ir_version: 10, opset_import: ["": 21]>
        scaled (float[n, 4] x) => (float[n, 4] y) <float scale = {{{scale:f}}}> {{ y = Mul(x, scale) }}
    """
    model = onnx.parser.parse_model(text)
    model.doc_string = "." * padding
    return bytes(model.SerializeToString())
