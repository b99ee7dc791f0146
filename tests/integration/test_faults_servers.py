"""Kafka, PostgreSQL and etcd away, frozen and restarted: inference goes on, what was acknowledged happens, once."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from uuid import uuid4

import httpx
import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRecord
from lepton import Client
from lepton.errors import LeptonError
from lepton_common.kafka_client import Bootstrap, Producer, Record
from lepton_common.topics import dead_letters

from . import onnx_models
from .faults import SETTINGS, answering_version, away, load_on, problem, push_versions, swap
from .local_platform import Platform, running_platform, until

MODEL = "checked"
MODELS_TOPIC = "lepton.models"
# etcd is away once for longer than any lease, time-out and retry in the platform.
LONG_S = 60.0


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A platform whose servers these tests break; each leaves it ready. Versions 1 and 2 of MODEL are known."""
    with running_platform(tmp_path_factory.mktemp("victim"), settings=SETTINGS) as victim:
        push_versions(victim, MODEL, 1, 2)
        yield victim


@pytest.fixture
def http(victim: Platform) -> Iterator[httpx.Client]:
    with victim.http() as http:
        yield http


@pytest.fixture
def client(victim: Platform) -> Iterator[Client]:
    with victim.client() as client:
        yield client


# --- etcd -------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
def test_etcd_frozen_for_a_minute_fails_no_request_and_loses_no_command(
    victim: Platform, http: httpx.Client, client: Client
) -> None:
    pushed = client.push(onnx_models.mlp(3), name=MODEL, deploy=False)
    with load_on(victim, MODEL) as load:
        with victim.frozen("etcd"):
            frozen_at = time.monotonic()
            _assert_commands_ask_to_try_again_later(http)
            # This one is noted down: longer ago, in the end, than workers have to load a version.
            accepted = client.deploy(MODEL, pushed.version, wait=False)
            while time.monotonic() < frozen_at + LONG_S:
                load.wait_for(100)
            _assert_commands_ask_to_try_again_later(http)
        client.wait(accepted, timeout=30)
        load.wait_for_version(pushed.version)
        client.deploy(MODEL, 1, timeout=30)
        load.wait_for_version(1)
    assert not load.failures, load.report()


def test_etcd_dead_for_longer_than_the_leases_fails_no_request(victim: Platform, http: httpx.Client) -> None:
    with load_on(victim, MODEL) as load:
        with away(victim, "etcd"):
            died_at = time.monotonic()
            _assert_commands_ask_to_try_again_later(http)
            while time.monotonic() < died_at + 12:
                load.wait_for(50)
        load.wait_for_version(swap(http, MODEL))
    assert not load.failures, load.report()


def _assert_commands_ask_to_try_again_later(http: httpx.Client) -> None:
    """Those that cannot be noted down without etcd."""
    for answer in (
        http.post("/v1/keys", json={"name": f"key-{uuid4()}"}),
        http.post(f"/v1/serving/{MODEL}/load", json={"version": 1}),
        http.get("/v1/serving"),
    ):
        assert problem(answer)


# --- Kafka ------------------------------------------------------------------------------------------------------------


def test_a_push_acknowledged_while_kafka_is_away_deploys_itself_when_kafka_is_back(
    victim: Platform, http: httpx.Client, client: Client
) -> None:
    with load_on(victim, MODEL) as load:
        with away(victim, "kafka"):
            pushed = client.push(onnx_models.mlp(1), name="patient", wait=False)
            assert pushed.version == 1
            # What needs no new fact goes on without Kafka.
            load.wait_for_version(swap(http, MODEL))
        until(lambda: http.get("/v1/serving/patient").status_code == 200, 40)
        (rollout,) = client.rollouts("patient")
        client.wait(rollout, timeout=30)
    assert answering_version(http, "patient") == "1"
    assert not load.failures, load.report()
    types = ["ModelCreated", "VersionRegistered", "RolloutStarted", "TrafficShifted", "RolloutFinished"]
    _assert_timeline(client, "patient", Counter([*types, "VersionPromoted"]))


def test_an_event_delivered_twice_takes_effect_once(victim: Platform, http: httpx.Client, client: Client) -> None:
    client.push(onnx_models.mlp(1), name="twice", timeout=60)
    asyncio.run(_deliver_again(victim, "default/twice"))
    # The next event of the same model comes after the copies, so whoever has handled it has handled them.
    client.push(onnx_models.mlp(2), name="twice", timeout=60)

    assert [each.version for each in client.rollouts("twice")] == [2, 1]
    once = Counter(["ModelCreated"])
    each_version = ["VersionRegistered", "RolloutStarted", "TrafficShifted", "RolloutFinished", "VersionPromoted"]
    _assert_timeline(client, "twice", once + Counter(2 * each_version))


def test_poisoned_messages_become_dead_letters_and_their_neighbours_flow(
    victim: Platform, http: httpx.Client, client: Client
) -> None:
    client.push(onnx_models.mlp(1), name="neighbour", timeout=60)
    poison = asyncio.run(_poison(victim, "default/neighbour"))
    client.push(onnx_models.mlp(2), name="neighbour", timeout=60)

    assert answering_version(http, "neighbour") == "2"
    letters = asyncio.run(_read(victim, dead_letters(MODELS_TOPIC), 2 * len(poison)))
    told = Counter((letter.value, _header(letter, "lepton-dlq-consumer")) for letter in letters)
    assert told == Counter((value, consumer) for value in poison for consumer in ("registry", "rollout"))


def _assert_timeline(client: Client, model: str, expected: Counter[str]) -> None:
    """In the end the model's timeline has just these facts."""

    def types() -> Counter[str]:
        return Counter(entry.type for entry in client.timeline(model))

    until(lambda: types().total() >= expected.total(), 30)
    assert types() == expected


async def _deliver_again(victim: Platform, key: str) -> None:
    """Every event so far about the model is in its topic a second time."""
    found = await _read(victim, MODELS_TOPIC, 2, key)
    about = [each for each in found if each.key == key.encode()]
    await _send(victim, [Record(each.topic, each.key, each.value, list(each.headers)) for each in about])


async def _poison(victim: Platform, key: str) -> list[bytes | None]:
    """What no service can read is among the events of that model; returns the values."""
    headers = {
        "ce_specversion": "1.0",
        "ce_id": str(uuid4()),
        "ce_source": "/stranger",
        "ce_type": "VersionRegistered",
    }
    values = [b"not JSON", b"", None, b'{"tenant": "default"}', b"\xff" * 100_000]
    await _send(
        victim,
        [
            Record(MODELS_TOPIC, key.encode(), value, [(name, text.encode()) for name, text in headers.items()])
            for value in values
        ],
    )
    await _send(victim, [Record(MODELS_TOPIC, key.encode(), b"no headers", [])])
    return [*values, b"no headers"]


async def _send(victim: Platform, records: list[Record]) -> None:
    producer = Producer(Bootstrap.parse(victim.layout.kafka), "test")
    try:
        await producer.send(records)
    finally:
        await producer.close()


async def _read(victim: Platform, topic: str, count: int, key: str | None = None) -> list[ConsumerRecord]:
    """Everything in the topic, once it has `count` messages of that key, or of any."""
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=victim.layout.kafka, auto_offset_reset="earliest")
    await consumer.start()
    try:
        found: list[ConsumerRecord] = []
        async with asyncio.timeout(30):
            while sum(key is None or each.key == key.encode() for each in found) < count:
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    found += records
        return found
    finally:
        await consumer.stop()


def _header(record: ConsumerRecord, name: str) -> str:
    value: bytes = dict(record.headers)[name]
    return value.decode()


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


def test_without_postgresql_a_push_asks_to_try_again_later_and_leaves_nothing_behind(
    victim: Platform, http: httpx.Client, client: Client
) -> None:
    sha256 = client.push(onnx_models.mlp(3), name="before", wait=False).sha256
    with load_on(victim, MODEL) as load:
        with away(victim, "postgres"):
            assert problem(http.put(f"/v1/artifacts/{sha256}", content=onnx_models.mlp(3).SerializeToString()))
            assert problem(http.post("/v1/models/after/versions", json={"sha256": sha256}))
            assert problem(http.post("/v1/rollouts", json={"model": MODEL, "version": 1}))
            load.wait_for(200)
        assert http.get("/v1/models/after").status_code == 404
        assert client.push(onnx_models.mlp(3), name="after", timeout=60).version == 1
    assert not load.failures, load.report()


def test_pushes_through_restarts_of_postgresql_make_every_version_once(victim: Platform, client: Client) -> None:
    count, pushed = 12, threading.Semaphore(0)

    def push_all() -> None:
        with victim.client() as other:
            for seed in range(1, count + 1):
                until(lambda seed=seed: _pushed(other, seed), 30)  # type: ignore[misc]  # a bound default
                pushed.release()

    pusher = threading.Thread(target=push_all)
    pusher.start()
    for _ in range(2):
        for _ in range(3):
            assert pushed.acquire(timeout=60)
        victim.kill("postgres")
    pusher.join(90)

    versions = client.versions("restless")
    assert [each.version for each in versions] == list(range(1, count + 1))
    assert len({each.sha256 for each in versions}) == count
    _assert_timeline(client, "restless", Counter({"ModelCreated": 1, "VersionRegistered": count}))


def _pushed(client: Client, seed: int) -> bool:
    try:
        client.push(onnx_models.mlp(seed), name="restless", deploy=False)
    except LeptonError as error:
        if not error.retryable:
            raise
        return False
    return True
