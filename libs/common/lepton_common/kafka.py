"""The event bus on Kafka: at least once, one subject's events in order, poison set aside, never stuck for long."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import stamina
import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRecord
from aiokafka.errors import KafkaError
from opentelemetry.trace import SpanKind
from prometheus_client import Counter, Gauge

from lepton_common import dead_letters, envelope, foreign
from lepton_common.bus import E
from lepton_common.dead_letters import Failure, Origin, Reason
from lepton_common.envelope import Message
from lepton_common.errors import Forbidden, Invalid, LeptonError, Unauthenticated, Unavailable
from lepton_common.events import Event
from lepton_common.foreign import Message as ForeignMessage
from lepton_common.kafka_client import Bootstrap, Producer, Record, Stalled, is_behind, new_consumer, stop_consumer
from lepton_common.kafka_lanes import Lanes
from lepton_common.telemetry import Telemetry, extract_kafka
from lepton_common.topics import dead_letters as dead_letter_topic

# A failed try speaks against the event only if other events were handled since the try before; after so many of those
# it is given up. When nothing works, the events are not to blame and wait, in order, for up to GIVE_UP_S. One success
# of another event is no proof: at the begin and the end of an outage some get through while others do not.
TRIES = 5
GIVE_UP_S = 3600.0
STALL_S = 30.0

_POLL_MS = 200
_MAX_RECORDS = 500
_START_TIMEOUT_S = 60

Handler = Callable[[Any], Awaitable[None]]
_log: structlog.stdlib.BoundLogger = structlog.get_logger()


class KafkaBus:
    """A `Bus`. All who run with the same `group` (a service's name) share its events among them."""

    def __init__(
        self, bootstrap: str, group: str, telemetry: Telemetry, *, instance: str = "", stall_s: float = STALL_S
    ) -> None:
        """`instance` is this replica's own name, the same after a restart: without one, the events of a member that
        was killed wait until its session is over, ten seconds."""
        self._bootstrap = Bootstrap.parse(bootstrap)
        self._instance = instance
        self._group = group
        self._telemetry = telemetry
        self._stall_s = stall_s
        # Two, so that a dead letter that cannot be written holds up no event.
        self._producer = Producer(self._bootstrap, f"lepton-{group}")
        self._undertaker = Producer(self._bootstrap, f"lepton-{group}-dead-letters")
        self._handlers: dict[str, tuple[type[Event], Handler]] = {}
        self._foreign: dict[str, Handler] = {}
        self._handled = 0
        self._undeliverable = 0
        self._deliverable = asyncio.Event()
        self._deliverable.set()
        metric, registry = f"lepton_{group}_", telemetry.registry
        self._outcomes = Counter(
            f"{metric}events", "Events by what became of them.", ["type", "outcome"], registry=registry
        )
        self._rebuilds = Counter(
            f"{metric}consumer_rebuilds", "Consumers given up as stuck or broken.", registry=registry
        )
        self._blocked = Gauge(
            f"{metric}dead_letters_blocked", "Dead letters that wait to be written.", registry=registry
        )

    def subscribe(self, kind: type[E], handler: Callable[[E], Awaitable[None]]) -> None:
        """See `Bus`. What other types its topics carry is counted and let pass."""
        if kind.__name__ in self._handlers:
            raise ValueError(f"{kind.__name__} has a handler already")
        self._handlers[kind.__name__] = (kind, handler)

    def hear(self, topic: str, handler: Callable[[ForeignMessage], Awaitable[None]]) -> None:
        """See `Bus`."""
        if topic in self._foreign:
            raise ValueError(f"{topic} has a handler already")
        self._foreign[topic] = handler

    async def send(self, messages: Sequence[Message]) -> None:
        """See `Bus`."""
        await self._producer.send([_record(each) for each in messages])

    async def close(self) -> None:
        """See `Bus`."""
        await asyncio.gather(self._producer.close(), self._undertaker.close())

    async def run(self) -> None:
        """See `Bus`. Kafka may be away, now or later: the bus waits for it."""
        while True:
            try:
                await self._consume()
            except (KafkaError, OSError, TimeoutError, Stalled) as error:
                self._rebuilds.inc()
                _log.warning("consumer given up, making a new one", error=repr(error))
            await asyncio.sleep(random.uniform(0.5, 1.5))  # noqa: S311 - spreads, guards nothing

    async def _consume(self) -> None:
        """One consumer's life. Ends by raising."""
        consumer = self._new_consumer()
        lanes = Lanes(consumer, self._handle)
        topics = {kind.topic for kind, _ in self._handlers.values()} | self._foreign.keys()
        consumer.subscribe(sorted(topics), listener=lanes)
        tasks: set[asyncio.Task[None]] = set()
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await consumer.start()
            tasks = {asyncio.create_task(each) for each in (self._fetch(consumer, lanes), self._watch(consumer, lanes))}
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            ended.pop().result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await lanes.stop(list(lanes.open), grace_s=0)
            await stop_consumer(consumer)

    def _new_consumer(self) -> AIOKafkaConsumer:
        return new_consumer(self._bootstrap, f"lepton-{self._group}", self._instance)

    async def _fetch(self, consumer: AIOKafkaConsumer, lanes: "Lanes") -> None:
        while True:
            await self._deliverable.wait()
            batches = await consumer.getmany(timeout_ms=_POLL_MS, max_records=_MAX_RECORDS)
            for partition, records in batches.items():
                lanes.start(partition, records)
            lanes.check()

    async def _watch(self, consumer: AIOKafkaConsumer, lanes: "Lanes") -> None:
        passed, quiet_since = lanes.passed, time.monotonic()
        while True:
            await asyncio.sleep(self._stall_s / 6)
            # A lane at work is its handler's business: only what nobody reads counts as stuck.
            idle = consumer.assignment() - set(lanes.open)
            moving = lanes.passed != passed or not self._deliverable.is_set()
            if moving or not await is_behind(consumer, idle, self._stall_s / 6):
                passed, quiet_since = lanes.passed, time.monotonic()
            elif time.monotonic() - quiet_since > self._stall_s:
                raise Stalled(f"no progress for {self._stall_s} s")

    async def _handle(self, record: ConsumerRecord) -> None:
        """The event took effect, or is a dead letter, or is none of ours."""
        # Kafka allows a header without a value.
        pairs = [(name, value or b"") for name, value in record.headers]
        if record.topic in self._foreign:
            await self._handle_foreign(record, pairs)
            return
        headers = {name: value.decode(errors="replace") for name, value in pairs}
        kind, handler = "unknown", None
        try:
            kind = envelope.type_name(headers)
            if kind not in self._handlers:
                self._outcomes.labels("other", "ignored").inc()
                return
            _, handler = self._handlers[kind]
            event = envelope.decode(headers, record.value)
        except Invalid as error:
            await self._bury(record, kind if handler else "unknown", _at_once(error))
            return
        context = extract_kafka(pairs)
        with (
            structlog.contextvars.bound_contextvars(event_type=kind, event_id=str(event.id)),
            self._telemetry.tracer.start_as_current_span(f"handle {kind}", context, kind=SpanKind.CONSUMER),
        ):
            await self._deliver(record, kind, event, handler)

    async def _handle_foreign(self, record: ConsumerRecord, headers: Sequence[tuple[str, bytes]]) -> None:
        place = f"{record.topic}/{record.partition}/{record.offset}"
        try:
            message = foreign.read(headers, record.value)
        except Invalid as error:
            await self._bury(record, record.topic, _at_once(error))
            return
        stored_at = datetime.fromtimestamp(record.timestamp / 1000, UTC)
        message = replace(message, id=message.id or place, at=message.at or stored_at)
        context = extract_kafka([("traceparent", (message.traceparent or "").encode())])
        with (
            structlog.contextvars.bound_contextvars(message_id=message.id, place=place),
            self._telemetry.tracer.start_as_current_span(f"handle {record.topic}", context, kind=SpanKind.CONSUMER),
        ):
            await self._deliver(record, record.topic, message, self._foreign[record.topic])

    async def _deliver(
        self, record: ConsumerRecord, kind: str, event: Event | ForeignMessage, handler: Handler
    ) -> None:
        began, first_failure = time.monotonic(), None
        handled, tries, against = self._handled, 0, 0

        def again(error: Exception) -> bool:
            nonlocal first_failure
            first_failure = first_failure or datetime.now(UTC)
            return _retryable(error) and against < TRIES and time.monotonic() - began < GIVE_UP_S

        try:
            async for attempt in stamina.retry_context(
                again, attempts=None, timeout=None, wait_max=10.0, wait_jitter=0.5
            ):
                tries = attempt.num
                against += self._handled != handled
                handled = self._handled
                with attempt:
                    await handler(event)
        except Exception as error:  # Whatever it is, its neighbours flow on.
            failure = Failure(_reason(error, event), error, tries, first_failure or datetime.now(UTC))
            await self._bury(record, kind, failure)
        else:
            self._handled += 1
            self._outcomes.labels(kind, "handled").inc()

    async def _bury(self, record: ConsumerRecord, kind: str, failure: Failure) -> None:
        """The record is among the dead letters. Until it is, nothing more is read: better late than lost."""
        origin = Origin(record.topic, record.partition, record.offset, self._group)
        headers = dead_letters.headers(record.headers, origin, failure)
        value = record.value and dead_letters.without_keys(record.value)
        letter = Record(dead_letter_topic(record.topic), record.key, value, headers)
        _log.error("dead letter", type=kind, reason=failure.reason.value, origin=str(origin), exc_info=failure.error)
        self._undeliverable += 1
        try:
            async for attempt in stamina.retry_context(on=Unavailable, attempts=None, timeout=None):
                if attempt.num > 1:
                    self._deliverable.clear()
                    self._blocked.set(self._undeliverable)
                with attempt:
                    await self._undertaker.send([letter])
        finally:
            self._undeliverable -= 1
            self._blocked.set(self._undeliverable)
            if not self._undeliverable:
                self._deliverable.set()
        self._outcomes.labels(kind, failure.reason.value).inc()


def _retryable(error: Exception) -> bool:
    return isinstance(error, LeptonError) and error.retryable


def _at_once(error: Exception) -> Failure:
    return Failure(Reason.UNDECODABLE, error, 1, datetime.now(UTC))


def _reason(error: Exception, event: Event | ForeignMessage) -> Reason:
    match error:
        case _ if _retryable(error):
            return Reason.EXHAUSTED
        case Unauthenticated() | Forbidden():
            return Reason.FORBIDDEN
        case Invalid() if isinstance(event, ForeignMessage):
            return Reason.UNDECODABLE
        case _:
            return Reason.FAILED


def _record(message: Message) -> Record:
    headers = [(name, value.encode()) for name, value in message.headers.items()]
    return Record(message.topic, message.key.encode(), message.value, headers)
