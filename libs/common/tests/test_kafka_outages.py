"""What becomes of events while Kafka, or all that handles them, is away."""

import asyncio
import itertools
import time
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from lepton.kafka import Kafka, KafkaRuntime
from lepton_common import envelope
from lepton_common.errors import Unavailable
from lepton_common.events import Event, VersionPromoted
from lepton_common.kafka import TRIES, KafkaBus
from lepton_common.kafka_client import ensure_topics
from lepton_common.telemetry import Telemetry
from lepton_common.testing import serving, until

from .buses import DEAD, Heard, a_group, dead_letters, poison, promoted, put, running_bus, send


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
