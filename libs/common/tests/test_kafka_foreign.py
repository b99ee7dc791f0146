"""Producers that know nothing of Lepton, on the real Kafka: they are heard, or told why not, without their secrets."""

import json
from collections.abc import Sequence
from uuid import uuid4

from cloudevents.core.bindings.kafka import to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from confluent_kafka import Producer
from lepton_common.errors import Forbidden, Invalid
from lepton_common.foreign import Message
from lepton_common.topics import LABELS

from .buses import Heard, dead_letters, running_bus

SECRET = f"lp_{'s' * 43}"
Written = tuple[Sequence[tuple[str, bytes]], bytes | None]


def write(broker: str, *written: Written) -> None:
    """As any program does it, all to one partition and in order."""
    producer = Producer({"bootstrap.servers": broker, "linger.ms": 0})
    for headers, value in written:
        producer.produce(LABELS.name, value, key=b"k", headers=list(headers))
    producer.flush(30)


async def test_cloudevents_in_both_modes_and_plain_json_are_heard_in_order(kafka: str) -> None:
    event = CloudEvent(attributes={"id": "1", "source": "/app", "type": "label"}, data={"label": 1})
    binary, structured = to_binary(event, JSONFormat()), to_structured(event, JSONFormat())
    key = ("authorization", f"Bearer {SECRET}".encode())
    write(
        kafka,
        ([*binary.headers.items(), key], binary.value),
        ([*structured.headers.items(), key], structured.value),
        ([key, ("id", b"3")], b'{"label": 1}'),
        ([key], b'{"label": 1}'),
    )
    heard = Heard()
    async with running_bus(kafka) as bus:
        bus.hear(LABELS.name, heard)
        await heard.count(4)
    messages: list[Message] = heard.events
    assert [each.id for each in messages[:3]] == ["1", "1", "3"]
    assert str(messages[3].id).startswith("lepton.labels/")
    assert {json.loads(each.data)["label"] for each in messages} == {1}
    assert {each.authorization for each in messages} == {key[1]}
    same, again, *others = [each.uuid("acme") for each in messages]
    assert same == again
    assert len({same, *others}) == 3
    assert messages[0].uuid("other") != same


async def test_what_is_unreadable_or_forbidden_is_a_dead_letter_without_its_key_and_neighbours_flow(kafka: str) -> None:
    async def check(message: Message) -> None:
        match message.id:
            case "wrong":
                raise Invalid("label: Field required")
            case "locked":
                raise Forbidden("this API key does not have the scope 'infer'")

    mark = uuid4().hex.encode()
    key = ("Authorization", f"Bearer {SECRET}".encode())
    write(
        kafka,
        ([key, ("ce_id", b"1")], b"1"),
        ([key, ("id", b"wrong"), ("note", mark + SECRET.encode())], b'{"key": "%s"}' % SECRET.encode()),
        ([key, ("id", b"locked")], None),
        ([key, ("id", b"locked")], b"2"),
        ([key, ("id", b"good")], b"3"),
    )
    heard = Heard(check)
    async with running_bus(kafka) as bus:
        bus.hear(LABELS.name, heard)
        await heard.count(1)
        letters = await dead_letters(kafka, 4, "lepton.labels.dlq")
    assert [each.id for each in heard.events] == ["good"]
    told = [dict(each.headers) for each in letters]
    reasons = [each["lepton-dlq-reason"].decode() for each in told]
    assert reasons == ["undecodable", "undecodable", "undecodable", "forbidden"]
    assert b"no source, type, specversion" in told[0]["lepton-dlq-error"]
    assert (told[1]["note"], letters[1].value) == (mark + b"[redacted]", b'{"key": "[redacted]"}')
    assert (told[1]["id"], letters[3].value) == (b"wrong", b"2")
    everything = repr([(each.headers, each.value) for each in letters])
    assert SECRET not in everything
