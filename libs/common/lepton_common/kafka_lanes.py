"""Handling fetched records: in order within a partition, side by side between partitions, committed when done."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Sequence

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

_COMMIT_EVERY_S = 1.0
_COMMIT_TIMEOUT_S = 5.0
_DRAIN_S = 5.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Lanes(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no types
    """A lane is a task that works through what was fetched of one partition, which is paused for so long.

    `passed` counts the records that were handled. When a partition is taken away its lane finishes the record at
    hand and commits, so that the next owner does not get it again; if that takes too long it is cancelled.
    """

    def __init__(self, consumer: AIOKafkaConsumer, handle: Callable[[ConsumerRecord], Awaitable[None]]) -> None:
        self.passed = 0
        self._consumer = consumer
        self._handle = handle
        self._open: dict[TopicPartition, asyncio.Task[None]] = {}
        self._stopping: set[TopicPartition] = set()
        self._failure: BaseException | None = None

    @property
    def open(self) -> Collection[TopicPartition]:
        """The partitions with records at hand."""
        return self._open.keys()

    def start(self, partition: TopicPartition, records: Sequence[ConsumerRecord]) -> None:
        """The records are being handled. The partition must have no open lane."""
        self._consumer.pause(partition)
        task = asyncio.create_task(self._work(partition, records))
        self._open[partition] = task
        task.add_done_callback(lambda task: self._ended(partition, task))

    def check(self) -> None:
        """Raises what ended a lane before its time."""
        if self._failure is not None:
            raise self._failure

    async def stop(self, partitions: Collection[TopicPartition], *, grace_s: float) -> None:
        """No lane is open in these partitions. After `grace_s` seconds handlers still at work are cancelled."""
        tasks = [self._open[each] for each in partitions if each in self._open]
        self._stopping.update(partitions)
        if tasks:
            await asyncio.wait(tasks, timeout=grace_s)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        self._stopping.difference_update(partitions)

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        await self.stop(revoked, grace_s=_DRAIN_S)

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        _log.info("partitions assigned", count=len(assigned))

    async def _work(self, partition: TopicPartition, records: Sequence[ConsumerRecord]) -> None:
        next_offset, committed_at = None, time.monotonic()
        try:
            for record in records:
                if partition in self._stopping:
                    return
                await self._handle(record)
                next_offset = record.offset + 1
                self.passed += 1
                if time.monotonic() - committed_at > _COMMIT_EVERY_S:
                    await self._commit(partition, next_offset)
                    next_offset, committed_at = None, time.monotonic()
        finally:
            if next_offset is not None:
                await self._commit(partition, next_offset)
        if partition not in self._stopping:
            self._consumer.resume(partition)

    async def _commit(self, partition: TopicPartition, offset: int) -> None:
        try:
            async with asyncio.timeout(_COMMIT_TIMEOUT_S):
                await self._consumer.commit({partition: offset})
        except (KafkaError, TimeoutError) as error:
            # Whoever reads the partition next gets these events again, to whom a repeat is harmless.
            _log.warning("offset not committed", partition=str(partition), error=repr(error))

    def _ended(self, partition: TopicPartition, task: asyncio.Task[None]) -> None:
        if self._open.get(partition) is task:
            del self._open[partition]
        if task.cancelled():
            if partition not in self._stopping:  # Then a library did it: see `Service._attempted`.
                self._failure = RuntimeError(f"the handling of {partition} was cancelled from inside")
        elif error := task.exception():
            self._failure = error
