"""The bus's contract, on the real Kafka and on librdkafka's mock broker. Where the mock differs the test says so."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRecord
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from lepton.servers import Kafka, KafkaRuntime
from lepton_common import envelope
from lepton_common.errors import Invalid, Unavailable
from lepton_common.events import Event, ModelCreated, VersionPromoted
from lepton_common.kafka import TRIES, KafkaBus
from lepton_common.kafka_client import Bootstrap, Producer, Record, ensure_topics
from lepton_common.settings import Settings
from lepton_common.telemetry import Telemetry, configure
from lepton_common.testing import serving, until
from prometheus_client import CollectorRegistry

DEAD = "lepton.models.dlq"


@pytest.fixture(params=["kafka", "mock_kafka"])
def broker(request: pytest.FixtureRequest) -> str:
    address: str = request.getfixturevalue(request.param)
    return address


def a_group() -> str:
    return f"g{uuid4().hex[:8]}"


def promoted(model: str, version: int) -> VersionPromoted:
    return VersionPromoted(tenant="acme", model=model, version=version)


async def send(bus: KafkaBus, *events: Event) -> None:
    """The events are stored, however long Kafka is away."""
    messages = [envelope.encode(each, "tests") for each in events]
    while True:
        try:
            return await bus.send(messages)
        except Unavailable:
            await asyncio.sleep(0.1)


class Heard:
    """A handler that remembers, and can be waited for."""

    def __init__(self, also: Callable[[Any], Awaitable[None]] | None = None) -> None:
        self.events: list[Any] = []
        self._also = also
        self._more = asyncio.Condition()

    async def __call__(self, event: Any) -> None:
        if self._also:
            await self._also(event)
        self.events.append(event)
        async with self._more:
            self._more.notify_all()

    async def count(self, count: int) -> None:
        """That many events were handled."""
        async with asyncio.timeout(60), self._more:
            await self._more.wait_for(lambda: len(self.events) >= count)

    def versions(self, model: str) -> list[int]:
        return [each.version for each in self.events if each.model == model]


@asynccontextmanager
async def running_bus(
    broker: str | KafkaBus, *handlers: tuple[type[Event], Callable[[Any], Awaitable[None]]], group: str = ""
) -> AsyncIterator[KafkaBus]:
    """A bus of a process of its own, as it were. Its end is being cancelled, whatever it is doing."""
    telemetry = configure("bus", Settings(), CollectorRegistry())
    bus = broker if isinstance(broker, KafkaBus) else KafkaBus(broker, group or a_group(), telemetry)
    for kind, handler in handlers:
        bus.subscribe(kind, handler)
    task = asyncio.create_task(bus.run())
    try:
        yield bus
    finally:
        task.cancel()
        await asyncio.wait({task})
        await bus.close()
        telemetry.close()


async def dead_letters(broker: str, count: int) -> list[ConsumerRecord]:
    """The first `count` dead letters."""
    consumer = AIOKafkaConsumer(
        DEAD, bootstrap_servers=Bootstrap.parse(broker).servers, auto_offset_reset="earliest", fetch_max_wait_ms=10
    )
    await consumer.start()
    try:
        async with asyncio.timeout(60):
            return [await consumer.getone() for _ in range(count)]
    finally:
        await consumer.stop()


async def put(broker: str, *records: Record) -> None:
    producer = Producer(Bootstrap.parse(broker), "tests")
    await producer.send(records)
    await producer.close()


def poison(value: bytes | None = b"{", **headers: str) -> Record:
    all_headers = {"ce_id": str(uuid4()), "ce_source": "/x", "ce_type": "VersionPromoted", "ce_specversion": "1.0"}
    return Record(
        "lepton.models",
        b"acme/poison",
        value,
        [(name, value.encode()) for name, value in {**all_headers, **headers}.items() if value],
    )


async def test_one_subjects_events_arrive_in_order(broker: str) -> None:
    heard = Heard()
    models = [f"m{index}" for index in range(8)]
    async with running_bus(broker, (VersionPromoted, heard)) as bus:
        for version in range(25):
            await send(bus, *(promoted(model, version) for model in models))
        await heard.count(200)
    for model in models:
        assert heard.versions(model) == list(range(25))


async def test_what_was_not_handled_comes_again_to_the_next_member(broker: str) -> None:
    group, begun = a_group(), asyncio.Event()

    async def hang(_: Event) -> None:
        begun.set()
        await asyncio.Event().wait()

    async with running_bus(broker, (VersionPromoted, hang), group=group) as bus:
        await send(bus, promoted("m", 1), promoted("m", 2))
        await begun.wait()
    heard = Heard()
    async with running_bus(broker, (VersionPromoted, heard), group=group):
        await heard.count(2)
    assert heard.versions("m") == [1, 2]


async def test_what_was_handled_does_not_come_again(broker: str) -> None:
    group, heard, later = a_group(), Heard(), Heard()
    async with running_bus(broker, (VersionPromoted, heard), group=group) as bus:
        await send(bus, *(promoted("m", version) for version in range(20)))
        await heard.count(20)
    async with running_bus(broker, (VersionPromoted, later), group=group) as bus:
        await send(bus, promoted("m", 20))
        await later.count(1)
    assert later.versions("m") == [20]


POISON = {
    "not JSON": poison(),
    "no value": poison(None),
    "empty": poison(b""),
    "not this type": poison(b'{"tenant": "acme"}'),
    "no id": poison(b"{}", ce_id=""),
    "no type": poison(b"{}", ce_type=""),
    "another version": poison(b"{}", ce_specversion="2.0"),
    "bytes": poison(b"\xff\xfe\x00" * 1000),
}


@pytest.mark.parametrize("name", POISON)
async def test_poison_becomes_a_dead_letter_and_its_neighbours_flow(kafka: str, name: str) -> None:
    await check_poison(kafka, POISON[name])


async def test_poison_becomes_a_dead_letter_on_the_mock_broker_too(mock_kafka: str) -> None:
    await check_poison(mock_kafka, POISON["not JSON"])


async def check_poison(broker: str, record: Record) -> None:
    heard = Heard()
    async with running_bus(broker, (VersionPromoted, heard), group="watcher") as bus:
        await send(bus, promoted("poison", 1))
        await heard.count(1)
        await put(broker, record)
        await send(bus, promoted("poison", 2), promoted("m", 1))
        await heard.count(3)
        (letter,) = await dead_letters(broker, 1)
    assert heard.versions("poison") == [1, 2]
    story = {name: value.decode() for name, value in letter.headers if name.startswith("lepton-dlq-")}
    assert story["lepton-dlq-reason"] == "undecodable"
    assert story["lepton-dlq-topic"] == "lepton.models"
    assert story["lepton-dlq-consumer"] == "watcher"
    assert (letter.key, letter.value) == (record.key, record.value)
    assert letter.headers[: len(record.headers)] == tuple(record.headers)


async def test_headers_without_a_value_or_without_sense_harm_nothing(kafka: str) -> None:
    heard = Heard()
    message = envelope.encode(promoted("m", 1), "tests")
    headers: list[Any] = [(name, value.encode()) for name, value in message.headers.items()]
    odd: list[Any] = [("traceparent", None), ("tracestate", b"\xff"), ("", b""), ("note", None)]
    async with running_bus(kafka, (VersionPromoted, heard)):
        await put(
            kafka, Record(message.topic, None, message.value, [*headers, *odd]), Record(message.topic, None, b"", odd)
        )
        await heard.count(1)
        (letter,) = await dead_letters(kafka, 1)
    assert letter.value == b""
    assert letter.headers[: len(odd)] == tuple(odd)


async def test_other_types_pass_by(broker: str) -> None:
    heard = Heard()
    async with running_bus(broker, (VersionPromoted, heard)) as bus:
        await send(bus, ModelCreated(tenant="acme", model="m"))
        await put(broker, poison(b"{}", ce_type="NotInventedYet"))
        await send(bus, promoted("m", 1), promoted("poison", 1))
        await heard.count(2)
    assert {type(each) for each in heard.events} == {VersionPromoted}


async def test_a_failure_for_good_is_a_dead_letter_at_once(broker: str) -> None:
    async def refuse(event: VersionPromoted) -> None:
        if event.version == 1:
            raise Invalid("Authorization: Bearer lp_secret at postgresql://user:secret@host/db")

    heard = Heard(refuse)
    async with running_bus(broker, (VersionPromoted, heard)) as bus:
        await send(bus, promoted("m", 1), promoted("m", 2))
        await heard.count(1)
        (letter,) = await dead_letters(broker, 1)
    story = {name: value.decode() for name, value in letter.headers}
    assert (story["lepton-dlq-reason"], story["lepton-dlq-attempts"]) == ("failed", "1")
    assert "Invalid" in story["lepton-dlq-error"]
    assert "secret" not in story["lepton-dlq-error"]
    assert heard.versions("m") == [2]


async def test_a_passing_failure_is_tried_again(broker: str) -> None:
    failures = iter([Unavailable("later"), Unavailable("later")])

    async def stumble(_: Event) -> None:
        if error := next(failures, None):
            raise error

    heard = Heard(stumble)
    async with running_bus(broker, (VersionPromoted, heard)) as bus:
        await send(bus, promoted("m", 1), promoted("m", 2))
        await heard.count(2)
    assert heard.versions("m") == [1, 2]


async def test_an_event_that_fails_while_others_succeed_is_given_up(kafka: str) -> None:
    tried: asyncio.Queue[None] = asyncio.Queue()

    async def fail(event: VersionPromoted) -> None:
        if event.model == "bad":
            tried.put_nowait(None)
            raise Unavailable("never")

    heard = Heard(fail)

    async def others(bus: KafkaBus) -> None:
        for version in itertools.count(1):
            await tried.get()
            # In several partitions, so that not all wait behind the bad one.
            await send(bus, *(promoted(f"m{index}", version) for index in range(12)))

    async with running_bus(kafka, (VersionPromoted, heard)) as bus:
        await send(bus, promoted("bad", 1))
        sending = asyncio.create_task(others(bus))
        (letter,) = await dead_letters(kafka, 1)
        sending.cancel()
        await asyncio.wait({sending})
    story = {name: value.decode() for name, value in letter.headers}
    assert story["lepton-dlq-reason"] == "exhausted"
    assert int(story["lepton-dlq-attempts"]) >= TRIES


async def test_an_outage_that_one_other_event_escaped_gives_up_nothing(kafka: str) -> None:
    failures = itertools.count(1)
    failing = asyncio.Event()

    async def fail(event: VersionPromoted) -> None:
        if event.model == "late" and next(failures) <= TRIES:
            failing.set()
            raise Unavailable("the database is not available")

    heard = Heard(fail)
    async with running_bus(kafka, (VersionPromoted, heard)) as bus:
        await send(bus, promoted("late", 1))
        await failing.wait()
        # In several partitions, so that not all wait behind the other.
        await send(bus, *(promoted(f"m{index}", 1) for index in range(12)))
        await heard.count(13)
    assert heard.versions("late") == [1]


async def test_nothing_is_given_up_while_nothing_works(kafka: str) -> None:
    attempts = 0

    async def fail(_: Event) -> None:
        nonlocal attempts
        attempts += 1
        if attempts <= 5:
            raise Unavailable("the database is not available")

    heard = Heard(fail)
    async with running_bus(kafka, (VersionPromoted, heard)) as bus:
        await send(bus, promoted("m", 1), promoted("m", 2))
        await heard.count(2)
    assert heard.versions("m") == [1, 2]


async def test_members_of_a_group_share_the_events(kafka: str) -> None:
    # The mock broker's groups have one member: a second one's SyncGroup is refused.
    group, first, second = a_group(), Heard(), Heard()
    async with running_bus(kafka, (VersionPromoted, first), group=group) as bus:
        await send(bus, promoted("m", 0))
        await first.count(1)
        async with running_bus(kafka, (VersionPromoted, second), group=group):
            version = 0
            async with asyncio.timeout(60):
                while not second.events:
                    version += 1
                    await send(bus, *(promoted(f"m{index}", version) for index in range(12)))
                    await asyncio.sleep(0.05)
        await send(bus, *(promoted(f"m{index}", version + 1) for index in range(12)))
        await first.count(12 * (version + 1) + 1 - len(second.events))
    for index in range(12):
        both = first.versions(f"m{index}") + second.versions(f"m{index}")
        assert sorted(set(both)) == list(range(1, version + 2))


class WatchedBus(KafkaBus):
    """A bus that shows its consumers."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.made: list[AIOKafkaConsumer] = []

    def _new_consumer(self) -> AIOKafkaConsumer:
        self.made.append(super()._new_consumer())
        return self.made[-1]


async def test_a_stuck_consumer_is_replaced(kafka: str, telemetry: Telemetry) -> None:
    heard = Heard()
    bus = WatchedBus(kafka, a_group(), telemetry, stall_s=1.0)
    async with running_bus(bus, (VersionPromoted, heard)):
        await send(bus, promoted("m", 1))
        await heard.count(1)
        # As when aiokafka loses a fetch: the partitions are ours and nothing is asked for.
        await until(lambda: not bus.made[0].paused())
        bus.made[0].pause(*bus.made[0].assignment())
        await send(bus, promoted("m", 2))
        await heard.count(2)
    assert len(bus.made) == 2
    assert heard.versions("m") == [1, 2]


async def test_nothing_is_read_while_dead_letters_cannot_be_written(kafka: str, telemetry: Telemetry) -> None:
    heard = Heard()
    bus = KafkaBus(kafka, "blocked", telemetry)
    async with running_bus(bus, (VersionPromoted, heard)):
        await send(bus, promoted("m", 1))
        await heard.count(1)
        await limit_messages(kafka, 1)
        await put(kafka, poison())
        await until(lambda: telemetry.registry.get_sample_value("lepton_blocked_dead_letters_blocked") == 1.0)
        await send(bus, *(promoted(f"m{index}", 1) for index in range(12)))
        await limit_messages(kafka, 2 * 1024 * 1024)
        (letter,) = await dead_letters(kafka, 1)
        await heard.count(13)
    assert letter.value == b"{"
    assert telemetry.registry.get_sample_value("lepton_blocked_dead_letters_blocked") == 0.0


async def limit_messages(broker: str, limit_bytes: int) -> None:
    """The dead letters' topic takes messages of that size only."""
    admin = AIOKafkaAdminClient(bootstrap_servers=broker)
    await admin.start()
    configs = {"max.message.bytes": str(limit_bytes)}
    await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, DEAD, configs=configs)])
    await admin.close()


async def test_kafka_may_come_late_and_go_and_come_again(tmp_path: Path, kafka_runtime: KafkaRuntime) -> None:
    recipe = Kafka(tmp_path / "kafka", kafka_runtime)
    heard = Heard()
    async with running_bus(recipe.address, (VersionPromoted, heard)) as bus:
        with pytest.raises(Unavailable):
            await bus.send([envelope.encode(promoted("m", 0), "tests")])
        with pytest.raises(Unavailable):
            await ensure_topics(recipe.address)
        async with serving(recipe) as process:
            await ensure_topics(recipe.address)
            await send(bus, promoted("m", 1))
            await heard.count(1)
            process.kill()
            sending = asyncio.create_task(send(bus, promoted("m", 2), promoted("m", 3)))
            async with serving(recipe):
                await sending
                await heard.count(3)
    assert sorted(set(heard.versions("m"))) == [1, 2, 3]


async def test_the_bus_ends_soon_when_kafka_is_away(tmp_path: Path, kafka_runtime: KafkaRuntime) -> None:
    recipe = Kafka(tmp_path / "kafka", kafka_runtime)
    heard = Heard()
    async with serving(recipe) as process:
        await ensure_topics(recipe.address)
        async with running_bus(recipe.address, (VersionPromoted, heard)) as bus:
            await send(bus, promoted("m", 1))
            await heard.count(1)
            process.kill()
            began = time.monotonic()
        assert time.monotonic() - began < 30
