"""An intake works on many records at once, and passes over none."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lepton_common.errors import Invalid, Unavailable
from lepton_common.kafka_client import Bootstrap, Producer, Record
from lepton_common.kafka_intake import Asked, Intake, Progress
from lepton_common.kafka_sender import Sender
from lepton_common.testing import until
from lepton_common.topics import REQUESTS

from .buses import a_group


@given(st.permutations(range(8)), st.integers(0, 8))
def test_what_is_committed_passes_nothing_that_is_not_done(order: list[int], done: int) -> None:
    progress = Progress()
    for offset in range(8):
        progress.begin(10 + offset)
    for offset in order[:done]:
        progress.end(10 + offset)
        if (commit := progress.to_commit()) is not None:
            progress.committed(commit)
    left = set(range(8)) - set(order[:done])
    expected = 10 + min(left, default=8)
    assert progress.to_commit() is None or expected == 10
    assert progress._committed in (expected, -1)


def test_nothing_is_committed_before_anything_came() -> None:
    assert Progress().to_commit() is None


def record(number: int) -> Record:
    return Record(REQUESTS.name, b"%d" % number, b"%d" % number, [])


async def write(kafka: str, *numbers: int) -> None:
    producer = Producer(Bootstrap.parse(kafka), "test")
    await producer.send([record(each) for each in numbers])
    await producer.close()


@asynccontextmanager
async def running(
    kafka: str, group: str, handle: Callable[[Asked], Awaitable[None]], room: int = 100
) -> AsyncIterator[Intake]:
    intake = Intake(Bootstrap.parse(kafka), REQUESTS.name, group, handle, lambda: room)
    task = asyncio.create_task(intake.run())
    try:
        yield intake
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Seen:
    """Keeps what was handled, of what this test wrote."""

    def __init__(self, *numbers: int) -> None:
        self.wanted = {b"%d" % each for each in numbers}
        self.done: list[bytes] = []

    async def handle(self, asked: Asked) -> None:
        if asked.value in self.wanted:
            self.done.append(asked.value)


@pytest.fixture
def numbers() -> list[int]:
    # No other test's: the topic is shared.
    return [hash(a_group()) % 10**12 + each for each in range(20)]


async def test_records_that_were_not_done_come_again(kafka: str, numbers: list[int]) -> None:
    group = a_group()
    await write(kafka, *numbers)
    stuck, first = b"%d" % numbers[3], Seen(*numbers)

    async def handle(asked: Asked) -> None:
        if asked.value == stuck:
            await asyncio.Event().wait()
        await first.handle(asked)

    async with running(kafka, group, handle):
        await until(lambda: len(first.done) == len(numbers) - 1)
    second = Seen(*numbers)
    async with running(kafka, group, second.handle):
        await until(lambda: stuck in second.done)
    third, later = Seen(*numbers), numbers[0] - 1
    await write(kafka, later)
    third.wanted.add(b"%d" % later)
    async with running(kafka, group, third.handle):
        await until(lambda: bool(third.done))
    assert third.done == [b"%d" % later], "what was done was committed"


async def test_a_handler_that_raises_loses_nothing(kafka: str, numbers: list[int]) -> None:
    await write(kafka, *numbers)
    seen, failures = Seen(*numbers), 0

    async def handle(asked: Asked) -> None:
        nonlocal failures
        if asked.value == b"%d" % numbers[0] and failures < 2:
            failures += 1
            raise Unavailable("not now")
        await seen.handle(asked)

    async with running(kafka, a_group(), handle):
        await until(lambda: set(seen.done) == seen.wanted)
    assert failures == 2


async def test_no_more_are_taken_than_there_is_room_for(kafka: str, numbers: list[int]) -> None:
    await write(kafka, *numbers)
    seen, at_once, most = Seen(*numbers), 0, 0

    async def handle(asked: Asked) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.005)
        at_once -= 1
        await seen.handle(asked)

    async with running(kafka, a_group(), handle, room=3):
        await until(lambda: set(seen.done) == seen.wanted)
    assert most <= 3


async def test_a_stuck_consumer_is_replaced(kafka: str, numbers: list[int]) -> None:
    seen = Seen(*numbers)
    intake = Intake(Bootstrap.parse(kafka), REQUESTS.name, a_group(), seen.handle, lambda: 100, stall_s=1.0)
    task = asyncio.create_task(intake.run())
    await write(kafka, *numbers[:1])
    await until(lambda: bool(seen.done))
    stuck = intake._consumer
    # As when aiokafka loses a fetch: the partitions are ours and nothing comes of them.
    stuck.getmany = lambda **options: asyncio.sleep(0.05, {})
    await write(kafka, *numbers[1:])
    await until(lambda: set(seen.done) == seen.wanted)
    assert intake._consumer is not stuck
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_two_intakes_share_the_partitions_and_one_takes_over(kafka: str, numbers: list[int]) -> None:
    group, first, second = a_group(), Seen(*numbers), Seen(*numbers)
    async with running(kafka, group, second.handle):
        async with running(kafka, group, first.handle):
            await asyncio.sleep(0.5)
            await write(kafka, *numbers[:10])
            await until(lambda: len({*first.done, *second.done}) == 10)
        await write(kafka, *numbers[10:])
        await until(lambda: {*first.done, *second.done} == first.wanted)
        assert set(second.done) >= {b"%d" % each for each in numbers[10:]}, "who is left has all of the rest"


async def test_a_partition_goes_before_the_key_where_the_topic_has_it(kafka: str, numbers: list[int]) -> None:
    found: dict[bytes | None, int] = {}
    wanted = [b"%d" % each for each in numbers[:3]]

    async def handle(asked: Asked) -> None:
        if asked.value in wanted:
            found[asked.value] = asked.partition

    sent = [Record(REQUESTS.name, b"key", value, [], where) for value, where in zip(wanted, (3, 7, 99), strict=True)]
    async with running(kafka, a_group(), handle):
        producer = Producer(Bootstrap.parse(kafka), "test")
        await producer.send([*sent, Record(REQUESTS.name, b"key", b"other", [])])
        await producer.close()
        await until(lambda: len(found) == 3)
    assert (found[wanted[0]], found[wanted[1]]) == (3, 7)
    assert found[wanted[2]] < REQUESTS.partitions


async def test_a_record_that_kafka_does_not_take_costs_no_other(kafka: str) -> None:
    producer = Producer(Bootstrap.parse(kafka), "test")
    sender = Sender(producer)
    large = Record(REQUESTS.name, None, b"x" * (REQUESTS.max_message_bytes + 1), [])
    async with asyncio.timeout(60):
        outcomes = await asyncio.gather(*map(sender.send, (record(1), large, record(2))), return_exceptions=True)
    await sender.close()
    assert [type(each) for each in outcomes] == [type(None), Invalid, type(None)]


async def test_records_of_many_are_stored_together_and_a_failure_is_told_to_each() -> None:
    class Broken(Producer):
        def __init__(self) -> None:
            super().__init__(Bootstrap.parse("127.0.0.1:1"), "test")
            self.batches: list[int] = []

        async def send(self, records: object) -> None:
            assert isinstance(records, list)
            self.batches.append(len(records))
            await asyncio.sleep(0)
            if len(self.batches) == 2:
                raise Unavailable("not now")

    producer = Broken()
    sender = Sender(producer)
    assert await asyncio.gather(*[sender.send(record(each)) for each in range(3)]) == [None] * 3
    failed = await asyncio.gather(*[sender.send(record(each)) for each in range(2)], return_exceptions=True)
    assert [type(each) for each in failed] == [Unavailable] * 2
    await sender.send(record(9))
    assert producer.batches == [3, 2, 1]


async def test_what_comes_while_a_batch_is_on_its_way_is_the_next_batch() -> None:
    class Slow(Producer):
        def __init__(self) -> None:
            super().__init__(Bootstrap.parse("127.0.0.1:1"), "test")
            self.batches: list[Sequence[Record]] = []
            self.began, self.go_on = asyncio.Event(), asyncio.Event()

        async def send(self, records: Sequence[Record]) -> None:
            self.batches.append(records)
            self.began.set()
            await self.go_on.wait()

    producer = Slow()
    sender = Sender(producer)
    async with asyncio.TaskGroup() as senders:
        senders.create_task(sender.send(record(0)))
        await producer.began.wait()
        others = [senders.create_task(sender.send(record(each))) for each in (1, 2, 3)]
        await asyncio.sleep(0)  # They have begun.
        assert len(producer.batches) == 1
        assert not any(each.done() for each in others)
        producer.go_on.set()
    assert producer.batches == [[record(0)], [record(1), record(2), record(3)]]
