"""Work that others ask for on a topic: many records at once, each done once its outcome is stored, none passed over.

`KafkaBus` hears facts, one after the other in each partition. An intake takes as many records as it has room for, in
any order, and commits only up to the oldest that is not done. Who dies in between does the rest again: outcomes carry
ids that tell a repeat.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from math import inf

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from lepton_common.errors import Unavailable
from lepton_common.kafka_client import Bootstrap, Stalled, is_behind, new_consumer, stop_consumer

_POLL_MS = 200
_START_TIMEOUT_S = 60
_COMMIT_EVERY_S = 0.5
_COMMIT_TIMEOUT_S = 5.0
_DRAIN_S = 5.0
STALL_S = 30.0
_PAUSE_AFTER_S = 60.0
_GATHER_S = 0.002
# In one turn of the loop, so that others on it wait no longer than for these.
_MAX_AT_ONCE = 8

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Asked:
    """One record of the topic, as it came. `at_ms` is Unix time, by the producer or the broker."""

    topic: str
    partition: int
    offset: int
    at_ms: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]


class Progress:
    """What is done of one partition. The offset to commit passes nothing that is not."""

    def __init__(self) -> None:
        self._open: dict[int, None] = {}  # in the order they came, which is that of their offsets
        self._next = -1
        self._committed = -1

    def begin(self, offset: int) -> None:
        self._open[offset] = None
        self._next = offset + 1

    def end(self, offset: int) -> None:
        self._open.pop(offset, None)

    def to_commit(self) -> int | None:
        """The offset of the first record that is not done, if that is news."""
        offset = next(iter(self._open), self._next)
        return offset if offset > self._committed else None

    def committed(self, offset: int) -> None:
        self._committed = max(self._committed, offset)


class Intake(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no types
    """Hands the records of `topic` to `handle`, at most `room()` of them at a time over all partitions.

    All who run with the same `group` share the partitions. `handle` returns when the record's outcome is stored; what
    it raises ends this consumer's life, and the records that were not done come again.
    """

    def __init__(
        self,
        bootstrap: Bootstrap,
        topic: str,
        group: str,
        handle: Callable[[Asked], Awaitable[None]],
        room: Callable[[], int],
        *,
        instance: str = "",
        stall_s: float = STALL_S,
    ) -> None:
        self._stall_s = stall_s
        self._bootstrap = bootstrap
        self._topic = topic
        self._group = group
        self._handle = handle
        self._room = room
        self._instance = instance
        self._consumer: AIOKafkaConsumer
        self._partitions: dict[TopicPartition, Progress] = {}
        self._tasks: dict[asyncio.Task[None], TopicPartition] = {}
        self._given_up: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._freed = asyncio.Event()
        self._moved = 0  # records begun and done

    async def run(self) -> None:
        """Works for ever. Kafka may be away, now or later: the intake waits for it."""
        while True:
            try:
                await self._consume()
            except (KafkaError, OSError, TimeoutError, Unavailable, Stalled) as error:
                _log.warning("consumer given up, making a new one", topic=self._topic, error=repr(error))
            await asyncio.sleep(random.uniform(0.5, 1.5))  # noqa: S311 - spreads, guards nothing

    async def _consume(self) -> None:
        """One consumer's life. Ends by raising."""
        self._consumer = consumer = new_consumer(self._bootstrap, self._group, self._instance)
        self._failure = None
        self._partitions.clear()
        consumer.subscribe([self._topic], listener=self)
        tasks: set[asyncio.Task[None]] = set()
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await consumer.start()
            work = (self._fetch(consumer), self._watch(consumer), self._commit_now_and_then())
            tasks = {asyncio.create_task(each) for each in work}
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            ended.pop().result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._give_up(list(self._tasks))
            await self._commit(list(self._partitions))
            await stop_consumer(consumer)

    async def _fetch(self, consumer: AIOKafkaConsumer) -> None:
        full_since, is_paused = inf, False
        while True:
            room = self._room() - len(self._tasks)
            if room > 0:
                full_since = inf
                if is_paused:
                    consumer.resume(*(consumer.paused() & consumer.assignment()))
                    is_paused = False
            elif (now := time.monotonic()) - min(full_since, now) > _PAUSE_AFTER_S:
                # Asked nevertheless, or the group would take us for dead. Not sooner: what was fetched is dropped.
                consumer.pause(*consumer.assignment())
                is_paused = True
            else:
                full_since = min(full_since, now)
                await self._wait_for_room()
                if self._failure is not None:
                    raise self._failure
                continue
            batches = await consumer.getmany(
                timeout_ms=_POLL_MS if room > 0 else 0, max_records=min(max(1, room), _MAX_AT_ONCE)
            )
            for partition, records in batches.items():
                self._begin(partition, records)
            if self._failure is not None:
                raise self._failure
            if room <= 0 and not batches:
                await self._wait_for_room()

    async def _watch(self, consumer: AIOKafkaConsumer) -> None:
        moved, quiet_since = self._moved, time.monotonic()
        while True:
            await asyncio.sleep(self._stall_s / 6)
            # What is under way is its handler's business: only what nobody reads counts as stuck.
            moving = self._moved != moved or self._tasks
            if moving or not await is_behind(consumer, consumer.assignment(), self._stall_s / 6):
                moved, quiet_since = self._moved, time.monotonic()
            elif time.monotonic() - quiet_since > self._stall_s:
                raise Stalled(f"no progress for {self._stall_s} s")

    async def _wait_for_room(self) -> None:
        self._freed.clear()
        try:
            async with asyncio.timeout(_POLL_MS / 1e3):
                await self._freed.wait()
            # Records are soon done in numbers, and asking for each one alone costs as much as for all of them.
            await asyncio.sleep(_GATHER_S)
        except TimeoutError:
            return

    def _begin(self, partition: TopicPartition, records: Sequence[ConsumerRecord]) -> None:
        progress = self._partitions.setdefault(partition, Progress())
        for record in records:
            progress.begin(record.offset)
            self._moved += 1
            # Kafka allows a header without a value.
            headers = [(name, value or b"") for name, value in record.headers]
            asked = Asked(
                record.topic, record.partition, record.offset, record.timestamp, record.key, record.value, headers
            )
            task = asyncio.create_task(self._work(progress, asked))
            self._tasks[task] = partition
            task.add_done_callback(self._ended)

    async def _work(self, progress: Progress, asked: Asked) -> None:
        await self._handle(asked)
        progress.end(asked.offset)
        self._moved += 1

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        self._freed.set()
        if task.cancelled():
            if task not in self._given_up:  # Then a library did it: see `Service._attempted`.
                self._failure = RuntimeError("the handling of a record was cancelled from inside")
        elif error := task.exception():
            self._failure = error

    # --- commits ---

    async def _commit_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(_COMMIT_EVERY_S)
            await self._commit(list(self._partitions))

    async def _commit(self, partitions: Collection[TopicPartition]) -> None:
        offsets = {
            each: offset
            for each in partitions
            if (progress := self._partitions.get(each)) and (offset := progress.to_commit()) is not None
        }
        if not offsets:
            return
        try:
            async with asyncio.timeout(_COMMIT_TIMEOUT_S):
                await self._consumer.commit(offsets)
        except (KafkaError, OSError, TimeoutError) as error:
            # Whoever reads the partition next does these again, and the ids of the outcomes tell.
            _log.warning("offsets not committed", error=repr(error))
            return
        for each, offset in offsets.items():
            if each in self._partitions:
                self._partitions[each].committed(offset)

    # --- changes of the group ---

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """What is under way gets a little time; then only these partitions are committed and forgotten."""
        tasks = [task for task, partition in self._tasks.items() if partition in revoked]
        if tasks:
            await asyncio.wait(tasks, timeout=_DRAIN_S)
        await self._give_up([task for task in tasks if not task.done()])
        await self._commit(revoked)
        for each in revoked:
            self._partitions.pop(each, None)

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        _log.info("partitions assigned", topic=self._topic, count=len(assigned))

    async def _give_up(self, tasks: Collection[asyncio.Task[None]]) -> None:
        if not tasks:
            return
        self._given_up.update(tasks)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        self._given_up.difference_update(tasks)
