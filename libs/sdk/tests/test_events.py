"""`lepton events` on the real Kafka: what it shows, what it puts back, and that it shows no secret."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, Producer, TopicPartition
from lepton import render
from lepton.cli import app
from lepton.events import Record, by_time
from lepton_common import dead_letters, envelope
from lepton_common.dead_letters import Failure, Origin, Reason
from lepton_common.errors import Invalid
from lepton_common.events import ModelCreated, VersionPromoted
from typer.testing import CliRunner, Result

SECRET = f"lp_{'s' * 43}"
OTHER = f"lp_{'o' * 43}"

Run = Callable[..., Result]


@pytest.fixture
def lepton(kafka: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line, in this process, with its output wide and plain."""
    monkeypatch.setenv("LEPTON_KAFKA", kafka)
    monkeypatch.delenv("LEPTON_API_KEY", raising=False)
    monkeypatch.setattr(render.console, "width", 400)

    def run(*arguments: str, **environment: str) -> Result:
        return CliRunner().invoke(app, ["events", *arguments], env=environment)

    return run


def write(broker: str, topic: str, headers: list[tuple[str, Any]], value: bytes, key: str = "") -> None:
    producer = Producer({"bootstrap.servers": broker})
    producer.produce(topic, value, key=key, headers=headers)
    assert producer.flush(30) == 0


def bury(broker: str, topic: str, offset: int, headers: list[tuple[str, bytes]], value: bytes) -> None:
    """As the bus does it."""
    failure = Failure(Reason.UNDECODABLE, Invalid("label: Field required"), 1, datetime(2026, 11, 27, tzinfo=UTC))
    told = dead_letters.headers(headers, Origin(topic, 0, offset, "monitor"), failure)
    write(broker, f"{topic}.dlq", told, dead_letters.without_keys(value), "k")


def read(broker: str, topic: str, count: int) -> list[tuple[dict[str, bytes], bytes]]:
    consumer = Consumer({"bootstrap.servers": broker, "group.id": "unused"})
    consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in range(6)])
    found: list[Any] = []
    while len(found) < count:
        found += consumer.consume(count - len(found), 0.2)
    consumer.close()
    return [(dict(each.headers()), each.value()) for each in found]


def test_events_are_told_from_the_beginning_by_type_and_model(kafka: str, lepton: Run) -> None:
    told = [
        ModelCreated(tenant="default", model="digits"),
        VersionPromoted(tenant="default", model="digits", version=1),
        VersionPromoted(tenant="default", model="other", version=7),
    ]
    for event in told:
        message = envelope.encode(event, "registry")
        write(kafka, message.topic, list(message.headers.items()), message.value, message.key)
    headers = [("authorization", f"Bearer {SECRET}"), ("id", "l1")]
    write(kafka, "lepton.labels", headers, b'{"note": "%s"}' % SECRET.encode())

    everything = lepton("tail", "--from-beginning", "-n", "4", "--json")
    assert everything.exit_code == 0, everything.output
    shown = [json.loads(line) for line in everything.stdout.splitlines()]
    assert {each["topic"] for each in shown} == {"lepton.models", "lepton.labels"}
    assert SECRET not in everything.output
    (label,) = [each for each in shown if each["topic"] == "lepton.labels"]
    assert (label["headers"], label["data"]) == ({"id": "l1"}, {"note": "[redacted]"})

    digits = lepton("tail", "--from-beginning", "-n", "1", "--type", "VersionPromoted", "--model", "digits")
    assert "VersionPromoted" in digits.stdout
    assert "default/digits version=1" in digits.stdout


def test_the_past_is_told_by_time_and_each_partition_in_its_own_order() -> None:
    def record(partition: int, offset: int, second: int) -> Record:
        at = datetime(2026, 11, 27, 0, 0, second, tzinfo=UTC)
        return Record("lepton.models", partition, offset, at, None, [], b"{}")

    first = [record(0, 0, 2), record(0, 1, 7), record(0, 2, 5)]  # The last one's producer has a clock that is behind.
    second = [record(1, 0, 1), record(1, 1, 6), record(1, 2, 8)]
    told = [(each.partition, each.offset) for each in by_time([*first, *second])]
    assert told == [(1, 0), (0, 0), (1, 1), (0, 1), (0, 2), (1, 2)]


@pytest.mark.parametrize("is_watched", [False, True])
def test_whoever_watches_is_told_that_events_are_waited_for(kafka: str, lepton: Run, is_watched: bool) -> None:
    write(kafka, "lepton.labels", [], b"{}")
    told = lepton("tail", "--from-beginning", "-n", "1", TTY_COMPATIBLE=str(int(is_watched))).stderr
    assert ("waiting for events …, Ctrl-C ends" in told) == is_watched


def test_a_dead_letter_is_listed_and_put_back_once_as_it_was(kafka: str, lepton: Run) -> None:
    headers = [("ce_id", b"7"), ("ce_type", b"label"), ("Authorization", f"Bearer {SECRET}".encode())]
    bury(kafka, "lepton.labels", 41, headers, b'{"labl": 1}')
    bury(kafka, "lepton.models", 3, [], b"{")

    first, second, *_ = lepton("dlq", "list").stdout.splitlines()
    assert first.startswith("7  lepton.labels, undecodable, ")
    assert second == "    label: Field required"
    listed = json.loads(lepton("dlq", "list", "--topic", "lepton.models", "--json").stdout)
    assert [(each["id"], each["reason"], each["replayed_at"]) for each in listed] == [
        ("lepton.models/0/3", "undecodable", None)
    ]

    for locked in (lepton("dlq", "replay", "--id", "7"), lepton("dlq", "replay", "--id", "7", "--dry-run")):
        assert (locked.exit_code, "came with an API key" in locked.output) == (1, True)
    would = lepton("dlq", "replay", "--id", "7", "--dry-run", LEPTON_API_KEY=OTHER)
    assert "Would replay 1 dead letter." in would.output
    assert lepton("dlq", "replay", "--id", "7", LEPTON_API_KEY=OTHER).exit_code == 0
    ((put_back, value),) = read(kafka, "lepton.labels", 1)
    assert value == b'{"labl": 1}'
    assert put_back.pop("lepton-replay")
    assert put_back == {"ce_id": b"7", "ce_type": b"label", "authorization": f"Bearer {OTHER}".encode()}

    again = lepton("dlq", "replay", "--topic", "lepton.labels", LEPTON_API_KEY=OTHER)
    assert (again.exit_code, "It was replayed before." in again.output) == (1, True)
    assert lepton("dlq", "replay", "--id", "7", "--force", LEPTON_API_KEY=OTHER).exit_code == 0
    assert len(read(kafka, "lepton.labels", 2)) == 2
    assert json.loads(lepton("dlq", "list", "--topic", "lepton.labels", "--json").stdout)[0]["replayed_at"]


def test_what_is_wrong_is_said_with_what_to_do_next(lepton: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, code, told in (
        (("tail", "--topic", "lepton.model"), 4, "lepton.ingest, lepton.ingest.dlq, lepton.labels"),
        (("dlq", "list", "--topic", "nothing"), 4, "There is no topic 'nothing'."),
        (("dlq", "replay"), 2, "say which: --topic, or --id"),
        (("dlq", "replay", "--id", "9"), 4, "There is no dead letter '9'."),
    ):
        ended = lepton(*arguments)
        assert (ended.exit_code, told in " ".join(ended.output.split())) == (code, True), ended.output
    monkeypatch.setenv("LEPTON_KAFKA", "127.0.0.1:1")
    monkeypatch.setattr("lepton.events._TIMEOUT_S", 0.5)
    away = lepton("dlq", "list")
    assert (away.exit_code, "No Kafka answers at 127.0.0.1:1." in away.output) == (3, True)
