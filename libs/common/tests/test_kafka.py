"""The bus's contract, on the real Kafka and on librdkafka's mock broker. Where the mock differs the test says so."""

import asyncio
import itertools
from typing import Any

import pytest
from lepton_common import envelope
from lepton_common.errors import Invalid, Unavailable
from lepton_common.events import Event, ModelCreated, VersionPromoted
from lepton_common.kafka import TRIES, KafkaBus
from lepton_common.kafka_client import Record
from lepton_common.telemetry import Telemetry

from .buses import Heard, a_group, dead_letters, poison, promoted, put, running_bus, send


@pytest.fixture(params=["kafka", "mock_kafka"])
def broker(request: pytest.FixtureRequest) -> str:
    address: str = request.getfixturevalue(request.param)
    return address


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


async def test_an_event_whose_handling_a_library_cancels_ends_the_bus_and_comes_again(
    kafka: str, telemetry: Telemetry
) -> None:
    async def cancelled(event: VersionPromoted) -> None:
        raise asyncio.CancelledError

    group, heard = a_group(), Heard()
    bus = KafkaBus(kafka, group, telemetry)
    bus.subscribe(VersionPromoted, cancelled)
    await send(bus, promoted("m", 1))
    with pytest.raises(RuntimeError, match="cancelled from inside"):
        async with asyncio.timeout(60):
            await bus.run()
    await bus.close()
    async with running_bus(kafka, (VersionPromoted, heard), group=group):
        await heard.count(1)
    assert heard.versions("m") == [1]


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
