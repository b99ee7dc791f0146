"""Pushes by Kafka, and what came of them, as a program sees it that knows Kafka alone."""

import json
from typing import Any, NamedTuple

from confluent_kafka import OFFSET_BEGINNING, Consumer, Producer, TopicPartition

from .local_platform import Platform, until

INGEST, EVENTS, LETTERS = "lepton.ingest", "lepton.models", "lepton.ingest.dlq"
_PARTITIONS = 6


class Outcome(NamedTuple):
    """An event, by its type, or a "dead letter". `id` is the same for a repeat; `told` is the version or the reason."""

    kind: str
    id: str
    told: int | str


class Pushes:
    """`outcomes` are those of each request, repeats left out; `registered` are the ids of new versions' events."""

    def __init__(self, platform: Platform) -> None:
        servers = {"bootstrap.servers": platform.layout.kafka, "log_level": 0}  # A broker that ends is no news here.
        self.outcomes: dict[str, set[Outcome]] = {}
        self.registered: dict[str, set[str]] = {}
        self._key = f"Bearer {platform.key}"
        self._producer = Producer({**servers, "linger.ms": 0})
        self._consumer = Consumer({**servers, "group.id": "unused", "enable.auto.commit": False})
        places = [(topic, number) for topic in (EVENTS, LETTERS) for number in range(_PARTITIONS)]
        self._consumer.assign([TopicPartition(*place, OFFSET_BEGINNING) for place in places])

    def close(self) -> None:
        self._consumer.close()

    def ask(self, request: str, **push: Any) -> None:
        """Kafka has the push."""
        headers: dict[str, str | bytes | None] = {"id": request, "authorization": self._key}
        self._producer.produce(INGEST, json.dumps(push).encode(), headers=headers)
        assert self._producer.flush(30) == 0

    def wait_for(self, *requests: str) -> None:
        """Each of these requests has an outcome."""

        def are_told() -> bool:
            self._read()
            return self.outcomes.keys() >= {*requests}

        until(are_told, 60)

    def _read(self) -> None:
        for message in self._consumer.consume(100, 0.05):
            pairs: Any = message.headers()  # whose type is that of what may be written
            headers = {name: value.decode() for name, value in pairs}
            if message.topic() == LETTERS:
                place = f"{headers['lepton-dlq-partition']}/{headers['lepton-dlq-offset']}"
                self._note(headers["id"], Outcome("dead letter", place, headers["lepton-dlq-error"]))
                continue
            kind, event = headers["ce_type"], json.loads(message.value() or b"")
            if kind in ("IngestFinished", "IngestFailed"):
                told = event["version"] if kind == "IngestFinished" else event["reason"]
                self._note(event["request"], Outcome(kind, headers["ce_id"], told))
            elif kind == "VersionRegistered":
                self.registered.setdefault(event["model"], set()).add(headers["ce_id"])

    def _note(self, request: str, outcome: Outcome) -> None:
        self.outcomes.setdefault(request, set()).add(outcome)
