"""What monitor's tests stand on: real PostgreSQL and etcd, a clock that is set, and a bus that loops."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import httpx
import pytest
from lepton.ports import free_port
from lepton.servers import Etcd
from lepton_common.auth import new_secret
from lepton_common.bus import Bus
from lepton_common.db import Database, migrate
from lepton_common.etcd import EtcdClient
from lepton_common.records import KEYS, KeyRecord, Scope
from lepton_common.telemetry import configure
from lepton_monitor.main import build
from lepton_monitor.settings import Settings

from .lab import Lab
from .stand_ins import START, Clock


@pytest.fixture
async def db(postgres_dsn: str) -> AsyncIterator[Database]:
    db = Database(postgres_dsn, "monitor")
    await migrate(db, "lepton_monitor")
    yield db
    await db.close()


@pytest.fixture
async def lab(db: Database) -> Lab:
    return Lab(db, Clock(START + 1.05))


@pytest.fixture
def settings(postgres_dsn: str, etcd_server: Etcd) -> Settings:
    return Settings(port=free_port(), postgres_dsn=postgres_dsn, etcd=etcd_server.address, drain_s=1)


async def key(etcd: EtcdClient, *scopes: Scope, tenant: str = "default") -> str:
    """A key with these scopes."""
    secret, digest, prefix = new_secret()
    record = KeyRecord(
        id=prefix, prefix=prefix, tenant=tenant, name="ann", scopes=frozenset(scopes), created_at=datetime.now(UTC)
    )
    await etcd.put(f"{KEYS}{digest}", record.model_dump_json().encode())
    return secret


@asynccontextmanager
async def serving(settings: Settings, bus: Bus) -> AsyncIterator[None]:
    """A replica of the service runs, ready, for as long as the block."""
    telemetry = configure("monitor", settings)
    db, etcd = Database(settings.postgres_dsn, "monitor"), EtcdClient(settings.etcd)
    service = build(settings, telemetry, db, etcd, bus)
    stop = asyncio.Event()
    running = asyncio.create_task(service.run(stop))
    try:
        async with asyncio.timeout(30):
            while not service.readiness.started:
                await asyncio.wait({running}, timeout=0.01)
                assert not running.done()
        yield
    finally:
        stop.set()
        await running
        telemetry.close()


@asynccontextmanager
async def client(settings: Settings, secret: str) -> AsyncIterator[httpx.AsyncClient]:
    """A caller whose key counts."""
    headers = {"authorization": f"Bearer {secret}"}
    url = f"http://{settings.host}:{settings.port}"
    async with asyncio.timeout(30), httpx.AsyncClient(base_url=url, headers=headers, timeout=30) as client:
        while (await client.get("/v1/windows")).status_code == httpx.codes.UNAUTHORIZED:
            pass
        yield client
