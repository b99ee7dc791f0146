"""Which pushes by Kafka wait, and who is carrying them out."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from lepton_common.asked import Ingest
from lepton_common.db import Tx
from lepton_common.errors import Conflict
from lepton_common.types import ModelRef


@dataclass(frozen=True, slots=True)
class Waiting:
    """A push that was asked for by message `request` from `source`, at the `attempts`-th try."""

    id: UUID
    tenant: str
    request: str
    source: str
    asked: Ingest
    actor: str
    traceparent: str | None
    at: datetime
    attempts: int = 0

    @property
    def ref(self) -> ModelRef:
        return ModelRef(self.tenant, self.asked.model)


async def add_ingest(tx: Tx, ingest: Waiting) -> None:
    """The push waits to be carried out. Adding it again changes nothing."""
    await tx.execute(
        """
        INSERT INTO ingests (id, tenant, request, source, asked, actor, traceparent, at)
        VALUES (:id, :tenant, :request, :source, CAST(:asked AS jsonb), :actor, :traceparent, :at)
        ON CONFLICT (id) DO NOTHING
        """,
        {
            "id": ingest.id,
            "tenant": ingest.tenant,
            "request": ingest.request,
            "source": ingest.source,
            "asked": ingest.asked.model_dump_json(),
            "actor": ingest.actor,
            "traceparent": ingest.traceparent,
            "at": ingest.at,
        },
    )


async def count_ingests(tx: Tx, tenant: str) -> int:
    """How many of the tenant's pushes wait or are being carried out."""
    counted = await tx.execute("SELECT count(*) FROM ingests WHERE tenant = :tenant", {"tenant": tenant})
    return int(counted.scalar_one())


async def claim_ingest(tx: Tx, lease_s: float, most_of_a_tenant: int) -> Waiting | None:
    """The next push that is due, of a tenant with the fewest at work and no more than so many; its lease has begun."""
    found = await tx.execute(
        """
        UPDATE ingests SET attempts = attempts + 1, leased_until = now() + make_interval(secs => :lease_s)
        WHERE id = (
            SELECT waiting.id FROM ingests AS waiting
            CROSS JOIN LATERAL (
                SELECT count(*) AS at_work FROM ingests AS other
                WHERE other.tenant = waiting.tenant AND other.leased_until >= now()
            ) AS tenant
            WHERE waiting.due_at <= now() AND (waiting.leased_until IS NULL OR waiting.leased_until < now())
                AND at_work < :most
            ORDER BY at_work, waiting.at LIMIT 1
            FOR UPDATE OF waiting SKIP LOCKED
        )
        RETURNING id, tenant, request, source, asked, actor, traceparent, at, attempts
        """,
        {"lease_s": lease_s, "most": most_of_a_tenant},
    )
    row = found.mappings().one_or_none()
    return Waiting(**{**row, "asked": Ingest.model_validate(row["asked"])}) if row else None


async def renew_lease(tx: Tx, ingest: Waiting, lease_s: float) -> bool:
    """Whether the push is still this holder's; then for so long again."""
    renewed = await tx.execute(
        """
        UPDATE ingests SET leased_until = now() + make_interval(secs => :lease_s)
        WHERE id = :id AND attempts = :attempts
        """,
        {**_held(ingest), "lease_s": lease_s},
    )
    return renewed.rowcount == 1


async def put_back(tx: Tx, ingest: Waiting, after: timedelta) -> None:
    """The push is due again after that time, if it was this holder's."""
    await tx.execute(
        "UPDATE ingests SET leased_until = NULL, due_at = now() + :after WHERE id = :id AND attempts = :attempts",
        {**_held(ingest), "after": after},
    )


async def remove_ingest(tx: Tx, ingest: Waiting) -> None:
    """The push is over. Raises Conflict when it is not this holder's any more: somebody else has it, or had."""
    removed = await tx.execute("DELETE FROM ingests WHERE id = :id AND attempts = :attempts", _held(ingest))
    if removed.rowcount != 1:
        raise Conflict(f"ingest {ingest.id} was taken over")


def _held(ingest: Waiting) -> dict[str, Any]:
    return {"id": ingest.id, "attempts": ingest.attempts}
