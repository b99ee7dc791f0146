"""The way to Kafka: where it is, which topics it must have, and a producer that keeps its word."""

import asyncio
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code

from lepton_common.errors import Unavailable
from lepton_common.topics import TOPICS

REQUEST_TIMEOUT_S = 10
SEND_TIMEOUT_S = 20
STOP_TIMEOUT_S = 2

_MOCK = "mock://"
_MAX_REQUEST_BYTES = 16 * 1024 * 1024
_MAX_REPLICAS = 3
# One record that is larger comes all the same.
_MAX_PARTITION_BYTES, _MAX_FETCH_BYTES = 128 << 10, 512 << 10

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """Where Kafka is. `mock://host:port` is librdkafka's mock broker: in memory, without an admin API."""

    servers: str
    mock: bool

    @classmethod
    def parse(cls, text: str) -> "Bootstrap":
        return cls(text.removeprefix(_MOCK), text.startswith(_MOCK))


@dataclass(frozen=True, slots=True)
class Record:
    """A message in Kafka's own terms. `partition` goes before the key, where the topic has it."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]
    partition: int | None = None


def new_consumer(bootstrap: Bootstrap, group: str, instance: str) -> AIOKafkaConsumer:
    """A consumer, not started, that commits when it is told to. `instance`: this replica's own name, the same after a
    restart, or empty."""
    return AIOKafkaConsumer(
        bootstrap_servers=bootstrap.servers,
        client_id=group,
        group_id=group,
        group_instance_id=None if bootstrap.mock or not instance else instance,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        # The mock broker holds an empty fetch for the whole time. Kafka does so only for a partition that is
        # resumed while a fetch without it is on its way; and each idle consumer asks so often.
        fetch_max_wait_ms=10 if bootstrap.mock else 200,
        isolation_level="read_uncommitted" if bootstrap.mock else "read_committed",
        # What comes at once is read at once, and nothing else meanwhile: 12 MiB would take longer than a caller waits.
        max_partition_fetch_bytes=_MAX_PARTITION_BYTES,
        fetch_max_bytes=_MAX_FETCH_BYTES,
        # The mock broker waits nearly this long at every change of a group.
        session_timeout_ms=3_000 if bootstrap.mock else 10_000,
        heartbeat_interval_ms=1_000,
        max_poll_interval_ms=300_000,
        request_timeout_ms=REQUEST_TIMEOUT_S * 1000,
    )


async def stop_consumer(consumer: AIOKafkaConsumer) -> None:
    """Nothing of it is left. With Kafka away aiokafka's stop() may wait for ever; without its client it ends."""
    with suppress(KafkaError, OSError, TimeoutError):
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await consumer.stop()
    await consumer._client.close()


class Stalled(Exception):
    """There are records to read, and for too long none has come."""


async def is_behind(consumer: AIOKafkaConsumer, partitions: Collection[TopicPartition], timeout_s: float) -> bool:
    """Whether there is something to read in these partitions; also when the answer does not come."""
    with suppress(KafkaError, OSError, TimeoutError):
        async with asyncio.timeout(timeout_s):
            ends = await consumer.end_offsets(partitions)
            return any([ends[each] > await consumer.position(each) for each in partitions])
    return True


class Producer:
    """Stores records, one `send` at a time. Connects when first needed, and anew after a failure."""

    def __init__(self, bootstrap: Bootstrap, client_id: str) -> None:
        self._bootstrap = bootstrap
        self._client_id = client_id
        self._turn = asyncio.Lock()
        self._producer: AIOKafkaProducer | None = None

    async def send(self, records: Sequence[Record]) -> None:
        """Every record is stored, those of one key in order. Raises Unavailable when some may not be; send all again.

        A producer that failed is given up with what it still holds: otherwise it could store an earlier record
        behind a later one that is sent in its place.
        """
        async with self._turn:
            producer = await self._connected()
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    stored = [await _begun(producer, each) for each in records]
                    await asyncio.gather(*stored)
            except (KafkaError, OSError, TimeoutError) as error:
                await self._give_up(producer)
                raise Unavailable("the event bus is not available", retry_after_s=1) from error

    async def close(self) -> None:
        """No connection is left open, within seconds even if Kafka is away."""
        if self._producer is not None:
            await self._give_up(self._producer)

    async def _connected(self) -> AIOKafkaProducer:
        if self._producer is None:
            producer = AIOKafkaProducer(
                bootstrap_servers=self._bootstrap.servers,
                client_id=self._client_id,
                acks="all",
                enable_idempotence=True,
                max_request_size=_MAX_REQUEST_BYTES,
                request_timeout_ms=REQUEST_TIMEOUT_S * 1000,
            )
            try:
                await producer.start()
            except (KafkaError, OSError) as error:
                await producer.stop()
                raise Unavailable("the event bus is not available", retry_after_s=1) from error
            except asyncio.CancelledError:
                await producer.stop()
                raise
            self._producer = producer
        return self._producer

    async def _give_up(self, producer: AIOKafkaProducer) -> None:
        self._producer = None
        # An idempotent producer never gives up a batch, so while Kafka is away its stop() does not end by itself.
        with suppress(KafkaError, OSError, TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await producer.stop()
        await producer._sender.close()
        await producer.client.close()


async def _begun(producer: AIOKafkaProducer, record: Record) -> asyncio.Future[object]:
    """The record is on its way; done once it is stored."""
    partition = record.partition
    if partition is not None and partition not in await producer.partitions_for(record.topic):
        partition = None
    stored: asyncio.Future[object] = await producer.send(
        record.topic, record.value, key=record.key, headers=record.headers, partition=partition
    )
    return stored


async def ensure_topics(bootstrap: str) -> None:
    """Every topic of `topics.py` exists; those that did are left as they are. Raises Unavailable when Kafka is away."""
    where = Bootstrap.parse(bootstrap)
    if where.mock:
        _log.warning("events are in the memory of a mock broker: they are lost when it ends")
        return
    admin = AIOKafkaAdminClient(bootstrap_servers=where.servers, request_timeout_ms=REQUEST_TIMEOUT_S * 1000)
    try:
        await admin.start()
        existing = set(await admin.list_topics())
        missing = [topic for topic in TOPICS if topic.name not in existing]
        if missing:
            replicas = min(_MAX_REPLICAS, len((await admin.describe_cluster())["brokers"]))
            made = await admin.create_topics(
                [NewTopic(each.name, each.partitions, replicas, topic_configs=each.config) for each in missing]
            )
            for name, code, *_ in made.topic_errors:
                error = for_code(code)
                # Another service may have made it in between.
                if code and error is not TopicAlreadyExistsError:
                    raise error(name)
            _log.info("topics made", topics=[each.name for each in missing])
    except (KafkaError, OSError, TimeoutError) as error:
        raise Unavailable("the event bus is not available", retry_after_s=1) from error
    finally:
        await admin.close()
