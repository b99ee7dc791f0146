"""From a transaction to its effect in another service: nothing lost, nothing doubled, one subject's story in order."""

import asyncio
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from lepton.kafka import Kafka, KafkaRuntime
from lepton.servers import Postgres
from lepton_common.db import Database, Tx, create_shared_tables
from lepton_common.envelope import Message, decode
from lepton_common.errors import Unavailable
from lepton_common.events import Event, VersionPromoted
from lepton_common.foreign import Message as ForeignMessage
from lepton_common.outbox import BATCH, Relay
from lepton_common.service import Service
from lepton_common.settings import Settings
from lepton_common.telemetry import Telemetry
from lepton_common.testing import serving
from prometheus_client import CollectorRegistry

# A service of its own process: a relay, and a handler whose table shows every effect, doubled ones too.
SERVICE = """
import sys
from functools import partial
from lepton_common.db import Database
from lepton_common.events import VersionPromoted
from lepton_common.kafka import KafkaBus
from lepton_common.kafka_client import ensure_topics
from lepton_common.service import Service, run
from lepton_common.settings import Settings
from lepton_common.telemetry import configure

async def on_promoted(event, tx):
    effect = {"model": event.model, "version": event.version}
    await tx.execute("INSERT INTO effects (model, version) VALUES (:model, :version)", effect)

dsn, kafka, group = sys.argv[1:]
settings = Settings()
telemetry = configure(group, settings)
service = Service(group, settings, telemetry, db=Database(dsn, "test"), bus=KafkaBus(kafka, group, telemetry))
service.prepare(partial(ensure_topics, kafka))
service.decide(VersionPromoted, on_promoted)
run(service)
"""


class Statements(list[str]):
    """What a migration would execute."""

    def execute(self, sqltext: str) -> None:
        self.append(sqltext)


async def make_tables(db: Database) -> None:
    statements = Statements()
    create_shared_tables(statements)
    statements.append("CREATE TABLE models (name text PRIMARY KEY, version int NOT NULL)")
    statements.append("CREATE TABLE effects (seq bigserial PRIMARY KEY, model text, version int)")
    async with db.transaction() as tx:
        await tx.execute("CREATE SCHEMA test")
        for each in statements:
            await tx.execute(each)


@pytest.fixture
async def db(postgres_dsn: str) -> AsyncIterator[Database]:
    db = Database(postgres_dsn, "test")
    await make_tables(db)
    yield db
    await db.close()


@dataclass
class Listener:
    """A bus that keeps what it is sent, after `failures` refusals."""

    failures: int = 0
    deliver: Callable[[Any], Awaitable[None]] = field(init=False)
    sent: list[Event] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def send(self, messages: Sequence[Message]) -> None:
        if self.failures:
            self.failures -= 1
            raise Unavailable("the event bus is not available")
        self.sent.extend(decode(each.headers, each.value) for each in messages)
        self.arrived.set()

    def subscribe(self, kind: type[Any], handler: Callable[[Any], Awaitable[None]]) -> None:
        self.deliver = handler

    def hear(self, topic: str, handler: Callable[[ForeignMessage], Awaitable[None]]) -> None: ...

    async def run(self) -> None: ...

    async def close(self) -> None: ...

    async def count(self, count: int) -> None:
        async with asyncio.timeout(30):
            while len(self.sent) < count:
                self.arrived.clear()
                await self.arrived.wait()


@asynccontextmanager
async def relaying(db: Database, bus: Listener) -> AsyncIterator[CollectorRegistry]:
    registry = CollectorRegistry()
    task = asyncio.create_task(Relay(db, bus, "test", registry).run())
    yield registry
    task.cancel()
    await asyncio.wait({task})


def promoted(model: str, version: int) -> VersionPromoted:
    return VersionPromoted(tenant="acme", model=model, version=version)


async def left(db: Database) -> int:
    async with db.transaction() as tx:
        return int((await tx.execute("SELECT count(*) FROM outbox")).scalar_one())


async def test_events_leave_in_the_order_of_the_outbox(db: Database) -> None:
    bus, count = Listener(), BATCH + 100
    async with db.transaction() as tx:
        for version in range(count):
            await tx.emit(promoted("m", version))
    async with relaying(db, bus) as registry:
        await bus.count(count)
        await emptied(db)
        assert registry.get_sample_value("lepton_test_outbox_sent_total") == count
    assert bus.sent == sorted(bus.sent, key=lambda each: each.version)  # type: ignore[attr-defined]  # of these events only


async def emptied(db: Database) -> None:
    """The last batch is committed."""
    async with asyncio.timeout(30):
        while await left(db):  # noqa: ASYNC110 - a table tells nobody that it changed
            await asyncio.sleep(0.01)


async def test_an_event_leaves_as_soon_as_its_transaction_commits(db: Database) -> None:
    bus = Listener()
    async with relaying(db, bus):
        for version in range(20):
            async with db.transaction() as tx:
                await tx.emit(promoted("m", version))
            # Twenty polls of a second each would run into this time-out: it is the notification that wakes.
            async with asyncio.timeout(10):
                await bus.count(version + 1)
    assert [each.version for each in bus.sent if isinstance(each, VersionPromoted)] == list(range(20))


async def test_what_the_bus_refused_stays_and_is_sent_again(db: Database) -> None:
    bus = Listener(failures=1)
    async with db.transaction() as tx:
        await tx.emit(promoted("m", 1))
    registry = CollectorRegistry()
    relay = Relay(db, bus, "test", registry)
    with pytest.raises(Unavailable):
        await relay.run()
    assert await left(db) == 1
    assert (registry.get_sample_value("lepton_test_outbox_oldest_seconds") or 0) > 0
    async with relaying(db, bus):
        await bus.count(1)
        await emptied(db)


async def test_one_relay_is_at_work_and_another_takes_over(db: Database) -> None:
    first, second = Listener(), Listener()
    async with relaying(db, first):
        async with db.transaction() as tx:
            await tx.emit(promoted("m", 0))
        await first.count(1)
        async with relaying(db, second):
            for version in range(1, 20):
                async with db.transaction() as tx:
                    await tx.emit(promoted("m", version))
            await first.count(20)
            assert not second.sent
    async with relaying(db, second):
        async with db.transaction() as tx:
            await tx.emit(promoted("m", 20))
        await second.count(1)


async def test_a_transaction_that_commits_late_is_not_passed_over(db: Database) -> None:
    bus = Listener()
    async with relaying(db, bus):
        async with db.transaction() as late:
            await late.emit(promoted("late", 1))
            async with db.transaction() as tx:
                await tx.emit(promoted("early", 1))
            await bus.count(1)
        await bus.count(2)
    assert [str(each.subject) for each in bus.sent] == ["acme/early", "acme/late"]


async def test_a_failed_decision_is_made_again_and_a_made_one_is_not(db: Database, telemetry: Telemetry) -> None:
    bus, calls = Listener(), 0
    service = Service("test", Settings(), telemetry, db=db, bus=bus)

    async def on_promoted(event: VersionPromoted, tx: Tx) -> None:
        nonlocal calls
        calls += 1
        await tx.execute("INSERT INTO effects (model, version) VALUES (:m, :v)", {"m": event.model, "v": event.version})
        await tx.emit(promoted(event.model, event.version + 1))
        if calls == 1:
            raise Unavailable("later")

    service.decide(VersionPromoted, on_promoted)
    event = promoted("m", 1)
    with pytest.raises(Unavailable):
        await bus.deliver(event)
    await bus.deliver(event)
    await bus.deliver(event)
    await bus.deliver(promoted("m", 2))
    assert calls == 3
    assert await left(db) == 2
    async with db.transaction() as tx:
        assert (await tx.execute("SELECT version FROM effects ORDER BY seq")).scalars().all() == [1, 2]


async def write(db: Database, chance: random.Random, models: Sequence[str], count: int) -> None:
    """`count` transactions, each of which takes a model's next version and tells it."""
    for _ in range(count):
        model = chance.choice(models)
        while True:
            try:
                async with db.transaction() as tx:
                    taken = await tx.execute(
                        "UPDATE models SET version = version + 1 WHERE name = :name RETURNING version", {"name": model}
                    )
                    await tx.emit(promoted(model, taken.scalar_one()))
                    await asyncio.sleep(chance.uniform(0, 0.02))
                break
            except Unavailable:
                await asyncio.sleep(0.1)


async def check_effects(db: Database, models: Sequence[str]) -> None:
    """Every version that was told took effect once, in order; waits for the last."""
    query = "SELECT count(*) FROM effects"
    async with db.transaction() as tx:
        told = {name: version for name, version in await tx.execute("SELECT name, version FROM models")}  # noqa: C416 - rows, not pairs
    async with asyncio.timeout(60):
        while True:
            async with db.transaction() as tx:
                if (await tx.execute(query)).scalar_one() >= sum(told.values()):
                    break
            await asyncio.sleep(0.1)
    async with db.transaction() as tx:
        effects = (await tx.execute("SELECT model, version FROM effects ORDER BY seq")).all()
    for model in models:
        assert [version for name, version in effects if name == model] == list(range(1, told[model] + 1))


@asynccontextmanager
async def service(dsn: str, kafka: str, group: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVICE, dsn, kafka, group, stdout=asyncio.subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


async def start_models(db: Database, models: Sequence[str]) -> None:
    async with db.transaction() as tx:
        await tx.execute("INSERT INTO models VALUES (:name, 0)", [{"name": each} for each in models])


async def test_kill_9_loses_nothing_doubles_nothing_and_keeps_order(
    db: Database, postgres_dsn: str, kafka: str
) -> None:
    chance = random.Random(7)
    models, group = [f"m{index}" for index in range(5)], f"g{uuid4().hex[:8]}"
    await start_models(db, models)
    writers = asyncio.gather(*(write(db, random.Random(seed), models, 150) for seed in range(4)))
    for _ in range(5):
        async with service(postgres_dsn, kafka, group) as process:
            await asyncio.sleep(chance.uniform(0.8, 2.5))  # the point of the test: at any instant
            process.kill()
            await process.wait()
    async with service(postgres_dsn, kafka, group) as process:
        await writers
        await check_effects(db, models)
        process.terminate()
        assert await process.wait() == 0


async def test_kafka_and_postgresql_restarting_lose_nothing(tmp_path: Path, kafka_runtime: KafkaRuntime) -> None:
    (tmp_path / "postgres").mkdir()
    broker, server = Kafka(tmp_path / "kafka", kafka_runtime), Postgres(tmp_path / "postgres")
    db, models = Database(server.dsn, "test"), ["a", "b", "c"]
    async with service(server.dsn, broker.address, "effects"):
        async with serving(server) as postgres_process:
            await make_tables(db)
            await start_models(db, models)
            async with serving(broker) as kafka_process:
                writers = asyncio.gather(*(write(db, random.Random(seed), models, 100) for seed in range(3)))
                await asyncio.sleep(0.5)
                kafka_process.kill()
                postgres_process.kill()
        async with serving(server), serving(broker):
            await writers
            await check_effects(db, models)
    await db.close()
