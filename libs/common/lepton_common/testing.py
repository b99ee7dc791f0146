"""pytest plugin: the real servers, started once a session and only when a test asks for them, clean for every test.

A test that breaks a server starts one of its own: `async with serving(Kafka(tmp_path, kafka_runtime)) as process`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
import stamina
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from aiokafka.errors import KafkaError
from lepton.kafka import Kafka, KafkaRuntime, MockKafka, find_kafka
from lepton.processes import Process, Recipe, running
from lepton.servers import Etcd, Postgres
from prometheus_client import CollectorRegistry

from lepton_common.etcd import EtcdClient
from lepton_common.kafka_client import ensure_topics
from lepton_common.settings import Settings
from lepton_common.telemetry import Telemetry, configure
from lepton_common.topics import TOPICS


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    """Logs on stdout, metrics in a registry of the test's own."""
    telemetry = configure("test", Settings(), CollectorRegistry())
    yield telemetry
    telemetry.close()


@asynccontextmanager
async def serving(recipe: Recipe) -> AsyncIterator[Process]:
    """As `running`, without holding up the event loop: what is tested goes on while the server starts and ends."""
    process = await asyncio.to_thread(Process.start, recipe)
    try:
        await asyncio.to_thread(process.wait_ready)
        yield process
    finally:
        await asyncio.to_thread(process.stop)


async def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    """The condition holds. For what tells nobody that it changed; where an event can be awaited, await that."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - see above: there is no event to await
            await asyncio.sleep(0.01)


# --- PostgreSQL -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """The session's PostgreSQL."""
    recipe = Postgres(tmp_path_factory.mktemp("postgres"))
    with running(recipe):
        yield recipe


@pytest.fixture
async def postgres_dsn(postgres_server: Postgres) -> AsyncIterator[str]:
    """A database of the test's own, empty."""
    name = f"test_{uuid4().hex}"
    await _administer(postgres_server, f"CREATE DATABASE {name}")
    yield database_dsn(postgres_server, name)
    await _administer(postgres_server, f"DROP DATABASE {name} WITH (FORCE)")


def database_dsn(server: Postgres, database: str) -> str:
    """The DSN of one database of the server."""
    return server.dsn.rsplit("/", 1)[0] + f"/{database}"


async def _administer(server: Postgres, statement: str) -> None:
    connection = await asyncpg.connect(server.dsn)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


# --- Kafka ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def kafka_runtime() -> KafkaRuntime:
    """Java and Kafka's jars. Without them the test is skipped, which the summary says."""
    runtime = find_kafka()
    if runtime is None:
        pytest.skip("Kafka's jars or Java are missing: run `make setup`")
    return runtime


@pytest.fixture(scope="session")
def kafka_server(tmp_path_factory: pytest.TempPathFactory, kafka_runtime: KafkaRuntime) -> Iterator[Kafka]:
    """The session's Kafka."""
    recipe = Kafka(tmp_path_factory.mktemp("kafka"), kafka_runtime)
    with running(recipe):
        yield recipe


@pytest.fixture
async def kafka(kafka_server: Kafka) -> str:
    """Bootstrap servers of a Kafka with every topic, all of them empty. Groups of earlier tests may be there."""
    await ensure_topics(kafka_server.address)
    async with _admin(kafka_server.address) as admin:
        everything = {
            TopicPartition(topic.name, partition): RecordsToDelete(-1)
            for topic in TOPICS
            for partition in range(topic.partitions)
        }
        # New partitions have no leader at first.
        async for attempt in stamina.retry_context(on=KafkaError, attempts=None, wait_initial=0.05, wait_max=0.5):
            with attempt:
                await admin.delete_records(everything)
    return kafka_server.address


@pytest.fixture
def mock_kafka(tmp_path: Path) -> Iterator[str]:
    """A mock broker of the test's own, as LEPTON_KAFKA names it."""
    recipe = MockKafka(tmp_path / "mock-kafka")
    with running(recipe):
        yield recipe.address


@asynccontextmanager
async def _admin(servers: str) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


# --- etcd -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def etcd_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    """The session's etcd."""
    recipe = Etcd(tmp_path_factory.mktemp("etcd"))
    with running(recipe):
        yield recipe


@pytest.fixture
async def etcd(etcd_server: Etcd) -> AsyncIterator[EtcdClient]:
    """A client of an etcd without any key of Lepton's. It has more patience than a service: the machine may be busy."""
    client = EtcdClient(etcd_server.address, timeout_s=30)
    found, _ = await client.list("/lepton/")
    await asyncio.gather(*(client.delete(each.key) for each in found))
    yield client
    await client.close()
