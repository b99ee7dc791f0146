"""The relay: what transactions left in the outbox goes to the bus, in order, at least once."""

import asyncio
import json
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge

from lepton_common.bus import Bus
from lepton_common.envelope import Message

if TYPE_CHECKING:  # A process without a database never loads its client.
    from lepton_common.db import Database

BATCH = 500
POLL_S = 1.0


class Relay:
    """Sends one schema's outbox. Of any number of relays one is at work; the others wait for its session to end."""

    def __init__(self, db: "Database", bus: Bus, service: str, registry: CollectorRegistry) -> None:
        self._db = db
        self._bus = bus
        self._oldest_s = Gauge(
            f"lepton_{service}_outbox_oldest_seconds", "Age of the oldest event not sent yet.", registry=registry
        )
        self._sent = Counter(f"lepton_{service}_outbox_sent", "Events that the broker has stored.", registry=registry)

    async def run(self) -> None:
        """Sends for ever. Raises Unavailable when PostgreSQL or Kafka is away, with nothing lost: call it again.

        The lock, the wake-up and the transactions share one session. When it breaks, the lock is free for another
        relay and the rows that were being sent are back, to be sent again.
        """
        async with self._db.session() as session:
            wake = asyncio.Event()
            await session.add_listener(self._db.outbox_channel, lambda *_: wake.set())
            active = False
            while True:
                wake.clear()
                active = active or await session.fetchval(_LOCK, f"lepton.outbox.{self._db.schema}")
                self._oldest_s.set(await session.fetchval(_OLDEST))
                if active and await self._send_batch(session) == BATCH:
                    continue
                try:
                    async with asyncio.timeout(POLL_S):
                        await wake.wait()
                except TimeoutError:
                    pass  # A lost notification costs no more than this.

    async def _send_batch(self, session: Any) -> int:
        # The rows are gone only if the broker has them: a failure in here rolls back.
        async with session.transaction():
            rows = await session.fetch(_TAKE, BATCH)
            if rows:
                # RETURNING keeps no order.
                await self._bus.send([_message(row) for row in sorted(rows, key=itemgetter("seq"))])
        self._sent.inc(len(rows))
        return len(rows)


# Never `seq > last`: a transaction that commits late would be skipped. Rows are taken and gone, whatever their number.
_TAKE = """
    DELETE FROM outbox
    WHERE seq IN (SELECT seq FROM outbox ORDER BY seq LIMIT $1 FOR UPDATE SKIP LOCKED)
    RETURNING seq, topic, key, headers::text AS headers, payload
"""
_LOCK = "SELECT pg_try_advisory_lock(hashtext($1))"
_OLDEST = "SELECT COALESCE(extract(epoch FROM clock_timestamp() - min(at)), 0)::float8 FROM outbox"


def _message(row: Any) -> Message:
    return Message(row["topic"], row["key"], json.loads(row["headers"]), row["payload"])
