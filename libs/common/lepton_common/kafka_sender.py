"""Records of many who wait, stored together."""

import asyncio
from collections.abc import Sequence

from aiokafka.errors import (
    InvalidTopicError,
    MessageSizeTooLargeError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)

from lepton_common.errors import Invalid, Unavailable
from lepton_common.kafka_client import Producer, Record

# At once, so that others on the loop wait no longer than for these.
_MAX_SENT = 64
# So long a batch waits for company. It is worth it: fewer produce requests, each of which costs the gateway and the
# broker about as much as ten records.
_GATHER_S = 0.005
# What no repetition stores.
_REFUSED = (
    InvalidTopicError,
    MessageSizeTooLargeError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)


class Sender:
    """Stores records for many at once: what comes while one batch is on its way is the next one.

    A batch that is not full first waits 5 ms for more: so much later is a record stored that comes alone.
    Where Kafka refuses one of a batch, its records are sent one by one: what is wrong with one costs no other.
    """

    def __init__(self, producer: Producer) -> None:
        self._producer = producer
        self._waiting: list[tuple[Record, asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None

    async def send(self, record: Record) -> None:
        """The record is stored. Raises Unavailable when it may not be: send it again. Raises Invalid when Kafka does
        not take it, however often."""
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((record, stored))
        if self._task is None:
            self._task = asyncio.create_task(self._send_all())
        await stored

    async def close(self) -> None:
        await self._producer.close()

    async def _send_all(self) -> None:
        try:
            while self._waiting:
                if len(self._waiting) < _MAX_SENT:
                    await asyncio.sleep(_GATHER_S)
                batch, self._waiting = self._waiting[:_MAX_SENT], self._waiting[_MAX_SENT:]
                error = await self._error_of([record for record, _ in batch])
                for record, stored in batch:
                    is_told = len(batch) == 1 or not isinstance(error, Invalid)
                    own = error if is_told else await self._error_of([record])
                    if stored.done():
                        continue  # Whoever waited was cancelled.
                    if own is None:
                        stored.set_result(None)
                    else:
                        stored.set_exception(own)
        finally:
            self._task = None

    async def _error_of(self, records: Sequence[Record]) -> Exception | None:
        """Why the records may not all be stored; None when they are."""
        try:
            await self._producer.send(records)
        except Unavailable as error:
            if isinstance(error.__cause__, _REFUSED):
                return Invalid(f"Kafka does not take it: {type(error.__cause__).__name__}")
            return error
        except Exception as error:  # Whatever it is, it is told to who waits.
            return error
        return None
