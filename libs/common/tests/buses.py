"""Buses as processes of their own have them, what they hear, and what Kafka holds."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

from aiokafka import AIOKafkaConsumer, ConsumerRecord
from lepton_common import envelope
from lepton_common.errors import Unavailable
from lepton_common.events import Event, VersionPromoted
from lepton_common.kafka import KafkaBus
from lepton_common.kafka_client import Bootstrap, Producer, Record
from lepton_common.settings import Settings
from lepton_common.telemetry import configure
from prometheus_client import CollectorRegistry

DEAD = "lepton.models.dlq"


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


async def dead_letters(broker: str, count: int, topic: str = DEAD) -> list[ConsumerRecord]:
    """The first `count` dead letters."""
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=Bootstrap.parse(broker).servers, auto_offset_reset="earliest", fetch_max_wait_ms=10
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
