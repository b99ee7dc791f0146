"""Events as they are on Kafka, for whoever runs the platform. Needs Kafka's client: the extra `lepton[local]`."""

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from lepton import endpoint
from lepton.errors import LeptonError, NotFound, Unreachable
from lepton.home import Home

if TYPE_CHECKING:
    from confluent_kafka import Consumer, Producer

DEAD = ".dlq"
# They speak all the time.
LOUD = frozenset({"lepton.telemetry", "lepton.windows", "lepton.inference.requests", "lepton.inference.results"})
_SECRET_HEADERS = frozenset({"authorization", "ce_authorization", "proxy-authorization", "x-api-key", "cookie"})
_KEYS = re.compile(r"lp_[A-Za-z0-9_-]{20,}")
_TIMEOUT_S = 10.0
# Of the past, what is held to be put in order; and how long nothing may come meanwhile.
_MOST_HELD_BYTES = 64 << 20
_QUIET_S = 1.0
_SEND_S = 30.0

Header = tuple[str, str | bytes | None]


@dataclass(frozen=True, slots=True)
class Record:
    """A message on Kafka. No secret of it is ever shown."""

    topic: str
    partition: int
    offset: int
    at: datetime
    key: bytes | None = field(repr=False)
    headers: Sequence[tuple[str, bytes]] = field(repr=False)
    value: bytes | None = field(repr=False)

    @property
    def place(self) -> str:
        return f"{self.topic}/{self.partition}/{self.offset}"

    def header(self, *names: str) -> str:
        """The last header with the first of these names that there is; empty when there is none."""
        told = {name.lower(): value for name, value in self.headers}
        return next((_clean(told[name]) for name in names if name in told), "")

    @property
    def id(self) -> str:
        return self.header("ce_id", "id", "x-request-id") or self.place

    @property
    def type(self) -> str:
        return self.header("ce_type") or "-"

    @property
    def data(self) -> Any:
        """The value's JSON; its text when it is none."""
        text = _clean(self.value or b"")
        try:
            return json.loads(text)
        except ValueError:
            return text

    @property
    def model(self) -> str | None:
        data = self.data
        found = data.get("model") if isinstance(data, dict) else None
        return found if isinstance(found, str) else None

    def shown(self) -> dict[str, Any]:
        """All of it, for programs."""
        shown = {name: _clean(value) for name, value in self.headers if name.lower() not in _SECRET_HEADERS}
        return {
            "topic": self.topic,
            "partition": self.partition,
            "offset": self.offset,
            "at": self.at.isoformat(),
            "key": _clean(self.key or b""),
            "headers": shown,
            "data": self.data,
        }


class Kafka:
    """The platform's Kafka."""

    def __init__(self, servers: str) -> None:
        """Raises LeptonError where Kafka's client is not installed."""
        self._servers = servers.removeprefix("mock://")
        try:
            import confluent_kafka
        except ImportError:
            raise LeptonError(
                "This needs Kafka's client, which is not installed.", hint="pip install 'lepton[local]' installs it."
            ) from None
        self._client = confluent_kafka
        self._producer: Producer | None = None

    def topics(self) -> list[str]:
        """The topics of the platform. Raises Unreachable."""
        with self._consumer() as consumer:
            return self._topics(consumer)

    def read(self, topics: Sequence[str], *, follow: bool, from_beginning: bool) -> Iterator[Record]:
        """What is on the topics, the oldest first, or what is written to them from now on; with `follow` for ever. Of a
        very long past not all is in order. Raises Unreachable."""
        with self._consumer() as consumer:
            known = consumer.list_topics(timeout=_TIMEOUT_S).topics
            start = self._client.OFFSET_BEGINNING if from_beginning else self._client.OFFSET_END
            partitions = [(topic, number) for topic in topics for number in known[topic].partitions]
            consumer.assign([self._client.TopicPartition(*each, start) for each in partitions])
            unread = set(partitions)
            past: list[Record] = []
            held_bytes, came_at = 0, time.monotonic()
            while follow or unread:
                for message in consumer.consume(500, 0.2):
                    error = message.error()
                    if error is None:
                        past.append(_record(message))
                        held_bytes += len(message)
                        came_at = time.monotonic()
                    elif error.code() == self._client.KafkaError._PARTITION_EOF:
                        unread.discard((message.topic(), message.partition()))
                    else:
                        raise Unreachable(f"Kafka at {self._servers} says: {error.str()}")
                is_quiet = time.monotonic() - came_at > _QUIET_S
                if not unread or not from_beginning or is_quiet or held_bytes > _MOST_HELD_BYTES:
                    yield from by_time(past)
                    past.clear()
                    held_bytes = 0

    def send(self, topic: str, key: bytes | None, value: bytes | None, headers: Sequence[Header]) -> None:
        """The message is stored. Raises Unreachable when it may not be."""
        failures: list[str] = []

        def stored(error: Any, _: object) -> None:
            if error is not None:
                failures.append(error.str())

        if self._producer is None:
            settings = {"bootstrap.servers": self._servers, "acks": "all", "log_level": 0, "linger.ms": 0}
            self._producer = self._client.Producer(settings)
        self._producer.produce(topic, value, key=key, headers=list(headers), on_delivery=stored)
        if self._producer.flush(_SEND_S) or failures:
            raise Unreachable(f"Kafka at {self._servers} did not store it: {', '.join(failures) or 'no answer'}.")

    def _topics(self, consumer: "Consumer") -> list[str]:
        return sorted(name for name in consumer.list_topics(timeout=_TIMEOUT_S).topics if name.startswith("lepton."))

    @contextmanager
    def _consumer(self) -> Iterator["Consumer"]:
        consumer = self._client.Consumer(
            {
                "bootstrap.servers": self._servers,
                "group.id": "lepton-cli",  # not used: partitions are assigned by hand, and nothing is committed
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "log_level": 0,
            }
        )
        try:
            yield consumer
        except self._client.KafkaException as error:
            raise Unreachable(
                f"No Kafka answers at {self._servers}.", hint="`lepton status` shows whether it runs; see LEPTON_KAFKA."
            ) from error
        finally:
            consumer.close()


def address() -> str:
    """Where Kafka is: LEPTON_KAFKA, else the local platform's. Raises Unreachable without one."""
    if named := os.environ.get("LEPTON_KAFKA"):
        return named
    layout = Home.at(endpoint.home()).layout()
    if layout is None:
        raise Unreachable(
            "There is no platform here.", hint="`lepton up` starts one; or set LEPTON_KAFKA to its Kafka."
        )
    return layout.kafka


def unknown_topic(topic: str, known: Sequence[str]) -> NotFound:
    return NotFound(f"There is no topic {topic!r}.", hint=f"There are {', '.join(known)}.")


def _record(message: Any) -> Record:
    headers: Sequence[tuple[str, bytes | None]] = message.headers() or []
    _, at_ms = message.timestamp()
    return Record(
        message.topic(),
        message.partition(),
        message.offset(),
        datetime.fromtimestamp(at_ms / 1000, UTC),
        message.key(),
        [(name, value or b"") for name, value in headers],
        message.value(),
    )


def by_time(records: Sequence[Record]) -> list[Record]:
    """The oldest first; those of one partition as they are in it, whatever clocks their producers have."""
    latest: dict[tuple[str, int], datetime] = {}
    times = []
    for each in records:
        place = each.topic, each.partition
        latest[place] = max(each.at, latest.get(place, each.at))
        times.append(latest[place])
    return [record for _, record in sorted(zip(times, records, strict=True), key=lambda each: each[0])]


def _clean(value: bytes) -> str:
    return _KEYS.sub("[redacted]", value.decode(errors="replace"))


def fields(data: Mapping[str, Any]) -> str:
    """What an event says beside who and when, in one line."""
    who_and_when = ("id", "at", "tenant", "model")
    rest = {name: value for name, value in data.items() if name not in who_and_when and value not in (None, "")}
    return " ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in rest.items())


def local_time(at: datetime) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at.timestamp()))
