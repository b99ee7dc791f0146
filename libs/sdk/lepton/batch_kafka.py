"""A batch job's way to Kafka: requests out, the job's own answers in, from where it stopped reading."""

import logging
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TypeAlias

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from lepton.batch_state import Answer, Positions
from lepton.errors import DeadlineExceeded, Forbidden, LeptonError, NotFound, TooLarge, Unreachable
from lepton.tensors import HEADER_LENGTH

_REQUESTS, _RESULTS = "lepton.inference.requests", "lepton.inference.results"
_DEAD = f"{_REQUESTS}.dlq"
_MOCK = "mock://"
_MAX_BYTES = 8 * 1024 * 1024 - 64 * 1024
_PATIENCE_S = 10.0
_AT_ONCE = 200

Place: TypeAlias = tuple[str, int]  # a topic's partition

# librdkafka's own log would otherwise go to the terminal, between the bars.
_log = logging.getLogger("lepton.batch")
_log.addHandler(logging.NullHandler())


class Wire:
    """Kafka, as one job uses it. Requests are named JOB.ATTEMPT.PIECE, and so are their answers."""

    def __init__(self, servers: str) -> None:
        """`servers` are host:port,… or the stand-in broker's address. Raises Unreachable, NotFound."""
        self._servers = servers.removeprefix(_MOCK)
        common = {"bootstrap.servers": self._servers, "logger": _log}
        self._producer = Producer({**common, "enable.idempotence": True, "message.max.bytes": 8 * 1024 * 1024})
        own = {"group.id": "lepton-batch", "enable.auto.commit": False, "enable.partition.eof": True}
        isolation = "read_uncommitted" if servers.startswith(_MOCK) else "read_committed"
        # What was not read for longer than the topic keeps it is asked again.
        self._consumer = Consumer({**common, **own, "isolation.level": isolation, "auto.offset.reset": "earliest"})
        self._refused: list[str] = []
        try:
            found = self._producer.list_topics(timeout=_PATIENCE_S)
        except KafkaException as error:
            self._close()
            hint = "`lepton status` shows the local platform's; --kafka or LEPTON_KAFKA names another."
            raise Unreachable(f"Kafka does not answer at {self._servers}.", hint=hint) from error
        self.cluster: str = found.cluster_id or ""
        self._parts = [(topic, part) for topic in (_RESULTS, _DEAD) if topic in found.topics
                       for part in found.topics[topic].partitions]  # fmt: skip
        if _REQUESTS not in found.topics or _RESULTS not in found.topics:
            self._close()
            hint = "The platform's gateway makes it: is this its Kafka, and is it of this version?"
            raise NotFound(f"Kafka at {self._servers} has no topic {_REQUESTS}.", hint=hint)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        self._consumer.close()
        self._producer.purge()

    def ends(self) -> dict[Place, int]:
        """Where the topics of answers end now."""
        marks = {}
        for topic, part in self._parts:
            _, marks[topic, part] = self._consumer.get_watermark_offsets(TopicPartition(topic, part), _PATIENCE_S)
        return marks

    def read_from(self, positions: Positions) -> None:
        """Answers are read from there on."""
        places = [TopicPartition(topic, part, positions.get((topic, part), 0)) for topic, part in self._parts]
        self._consumer.assign(places)

    def catch_up(self, job: str, within_s: float) -> tuple[list[Answer], dict[Place, int]]:
        """What is there already, and where reading goes on. Raises DeadlineExceeded, Forbidden."""
        answers: list[Answer] = []
        positions: dict[Place, int] = {}
        behind = set(self._parts)
        end = time.monotonic() + within_s
        while behind:
            if time.monotonic() > end:
                raise DeadlineExceeded(f"The answers at {self._servers} could not be read in {within_s:g} s.")
            found, moved, ended = self._read(job, 0.5)
            answers += found
            positions |= moved
            behind -= ended
        return answers, positions

    def ask(self, name: str, headers: Mapping[str, str], body: bytes) -> None:
        """The request is on its way. Raises TooLarge."""
        if len(body) > _MAX_BYTES:
            hint = "Put fewer into one with --rows."
            raise TooLarge(f"A request has {len(body)} bytes, a message may have {_MAX_BYTES}.", hint=hint)
        told = {"id": name, **headers}
        self._producer.produce(
            _REQUESTS, body, headers=[(key, text.encode()) for key, text in told.items()], on_delivery=self._delivered
        )

    def answers(self, job: str, within_s: float) -> tuple[list[Answer], dict[Place, int]]:
        """The job's answers that come within that time, and where reading goes on after them.

        Raises Unreachable when a request could not be written, Forbidden when one became a dead letter.
        """
        self._producer.poll(0)
        if self._refused:
            raise Unreachable(f"Kafka at {self._servers} does not take requests: {self._refused[0]}.")
        found, positions, _ = self._read(job, within_s)
        return found, positions

    def _read(self, job: str, within_s: float) -> tuple[list[Answer], dict[Place, int], set[Place]]:
        """Answers, where reading goes on, and the partitions that were read to their end."""
        answers: list[Answer] = []
        positions: dict[Place, int] = {}
        ended: set[Place] = set()
        message: Any
        for message in self._consumer.consume(_AT_ONCE, within_s):
            place = (message.topic(), message.partition())
            if (error := message.error()) is not None:
                if error.code() == KafkaError._PARTITION_EOF:
                    ended.add(place)
                elif error.fatal():
                    raise LeptonError(f"Kafka at {self._servers}: {error.str()}.")
                continue
            positions[place] = message.offset() + 1
            ended.discard(place)
            headers: dict[str, bytes] = dict(message.headers() or [])
            dead = message.topic() == _DEAD
            name = headers.get("id" if dead else "ce_correlationid", b"").decode("utf-8", "replace")
            if name.rpartition(".")[0] != job:
                continue
            if dead:
                reason = headers.get("lepton-dlq-error", b"no reason given").decode("utf-8", "replace")
                raise Forbidden(f"The gateway refused a request: {reason}.", hint="Mend that, and run it again.")
            answers.append(_answer(name, headers, message.value() or b""))
        return answers, positions, ended

    def _delivered(self, error: Any, message: Any) -> None:
        if error is not None:
            self._refused.append(error.str())


def _answer(name: str, headers: Mapping[str, bytes], body: bytes) -> Answer:
    piece = int(name.rpartition(".")[2])
    return Answer(piece, int(headers.get("lepton-status", b"500")), int(headers.get(HEADER_LENGTH, b"0")), body)
