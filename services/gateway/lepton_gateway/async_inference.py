"""Inference over Kafka: each message goes the way of an HTTP request, as work that yields to those who wait.

A message is done once its outcome, or a dead letter, is stored. What the platform has no room for now is asked again
until its deadline.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import UTC, datetime
from weakref import WeakValueDictionary

import structlog
from lepton_common import dead_letters, foreign
from lepton_common.dead_letters import Failure, Origin, Reason
from lepton_common.errors import Forbidden, Invalid, LeptonError, NotFound, Unavailable
from lepton_common.http11 import error_body
from lepton_common.kafka_client import Record
from lepton_common.kafka_intake import Asked
from lepton_common.topics import REQUESTS, RESULTS
from lepton_common.topics import dead_letters as dead_letter_topic
from prometheus_client import CollectorRegistry, Counter, Gauge

from lepton_gateway.answers import Answer, Handle, request
from lepton_gateway.async_requests import MAX_KEY_BYTES, AsyncRequest, outcome_of, request_of
from lepton_gateway.async_room import Room

GROUP = "lepton-inference"

# 504: the model had its time, more than once. The others speak of the platform, not of the request.
_NO_ROOM = frozenset({429, 502, 503})
_TOO_LATE = 504
_TRIES_IN_TIME = 3
_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 0.05, 5.0

_OWN_TOPICS = frozenset((RESULTS.name, dead_letter_topic(REQUESTS.name)))

Send = Callable[[Record], Awaitable[None]]
_log: structlog.stdlib.BoundLogger = structlog.get_logger()


class AsyncInference:
    """`handle` is an intake's: it returns once the message's outcome is stored."""

    def __init__(
        self,
        handle: Handle,
        send: Send,
        send_elsewhere: Send,
        room: Room,
        registry: CollectorRegistry,
        *,
        tenant_of: Callable[[bytes], str],
        timeout_s: float,
        reply_topics: Sequence[str],
    ) -> None:
        """`send` stores outcomes and dead letters, `send_elsewhere` outcomes on topics that callers name: one that does
        not exist, which takes a while to find out, holds up no others. `tenant_of` says whose an authorization is, ""
        for one that opens nothing. `timeout_s`: how long a message is tried that says nothing of it, from when it was
        written."""
        self._tenant_of = tenant_of
        self._ask = handle
        self._send = send
        self._send_elsewhere = send_elsewhere
        self._room = room
        self._timeout_s = timeout_s
        self._reply_topics = reply_topics
        self._chains: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()
        self._outcomes = Counter(
            "lepton_gateway_async_requests",
            "Requests over Kafka by what became of them.",
            ["outcome"],
            registry=registry,
        )
        told = "Requests over Kafka that are worked on at a time."
        Gauge("lepton_gateway_async_room", told, registry=registry).set_function(room.size)

    async def handle(self, asked: Asked) -> None:
        """See above. Nothing that a producer wrote raises: a message that nobody can answer is a dead letter."""
        try:
            message = foreign.read(asked.headers, asked.value, max_value_bytes=REQUESTS.max_message_bytes)
            tenant = self._tenant_of(message.authorization or b"")
            wanted = request_of(message, asked, tenant, self._timeout_s, self._reply_topics)
        except (Invalid, NotFound) as error:
            await self._bury(asked, Failure(Reason.UNDECODABLE, error, 1, datetime.now(UTC)))
            return
        try:
            await self._work(asked, wanted)
        except Exception as error:  # Whatever it is, the other messages flow on.
            await self._bury(asked, Failure(Reason.FAILED, error, 1, datetime.now(UTC)))

    async def _work(self, asked: Asked, wanted: AsyncRequest) -> None:
        """The outcome is stored, or a dead letter. Raises Invalid where Kafka does not take the outcome."""
        async with self._turn(wanted):
            began = time.time()
            answer = await self._answer(wanted)
            if answer.status in (401, 403):
                refused = Failure(Reason.FORBIDDEN, Forbidden(answer.error), 1, datetime.now(UTC))
                await self._bury(asked, refused)
                return
            record = outcome_of(wanted, asked, answer, began, time.time())
            await self._store(record)
        self._outcomes.labels("answered" if answer.status == 200 else "failed").inc()

    def _turn(self, wanted: AsyncRequest) -> AbstractAsyncContextManager[object]:
        """Messages of one key that want to stay in order wait for each other. Locks are handed on as they were asked
        for, and every message asks for its own before anything is awaited."""
        if wanted.key is None:
            return nullcontext()
        return self._chains.setdefault(wanted.key, asyncio.Lock())

    async def _answer(self, wanted: AsyncRequest) -> Answer:
        """The last word on the request."""
        in_time = 0
        backoff_s = _FIRST_BACKOFF_S
        while True:
            left_s = wanted.deadline - time.time()
            if left_s <= 0:
                return _failed(_TOO_LATE, "the deadline passed before there was an answer")
            answer = await self._asked(wanted, left_s)
            in_time += answer.status == _TOO_LATE
            if answer.status not in _NO_ROOM and (answer.status != _TOO_LATE or in_time >= _TRIES_IN_TIME):
                self._room.went_well()
                break
            self._room.was_short()
            # Spread, or all that were refused together come back together.
            await asyncio.sleep(min(backoff_s * random.uniform(0.5, 1.5), max(0.0, left_s)))  # noqa: S311 - no secret
            backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
        if len(answer.body) > RESULTS.max_message_bytes - 2 * MAX_KEY_BYTES:
            return _failed(413, f"the answer has {len(answer.body)} bytes: more than a message may have")
        return answer

    async def _asked(self, wanted: AsyncRequest, left_s: float) -> Answer:
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def then(answer: Answer) -> None:
            if not answered.done():
                answered.set_result(answer)

        headers = {**wanted.headers, b"x-request-timeout-ms": b"%d" % min(max(1, round(left_s * 1e3)), 10**11)}
        asked = request("POST", wanted.target, headers, wanted.body, then)
        asked.background = True
        try:
            self._ask(asked)
            return await answered
        except asyncio.CancelledError:
            if asked.on_disconnect is not None:
                asked.on_disconnect()
            raise
        except LeptonError as error:
            return _failed(503, error.message)

    async def _bury(self, asked: Asked, failure: Failure) -> None:
        origin = Origin(asked.topic, asked.partition, asked.offset, GROUP)
        headers = dead_letters.headers(asked.headers, origin, failure)
        value = asked.value and dead_letters.without_keys(asked.value)
        _log.warning("dead letter", reason=failure.reason.value, origin=str(origin), error=str(failure.error))
        await self._store(Record(dead_letter_topic(asked.topic), asked.key, value, headers))
        self._outcomes.labels("dead").inc()

    async def _store(self, record: Record) -> None:
        """Kafka has the record. While it is away nothing is lost: the message is not done."""
        send = self._send if record.topic in _OWN_TOPICS else self._send_elsewhere
        backoff_s = _FIRST_BACKOFF_S
        while True:
            try:
                await send(record)
                return
            except Unavailable:
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)


def _failed(status: int, message: str) -> Answer:
    answer = Answer("", lambda answer: None)
    answer.status, answer.body = status, error_body(message)
    return answer
