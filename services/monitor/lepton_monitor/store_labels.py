"""Labels as monitor keeps them: what was right for requests that were answered before."""

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from lepton_common.db import Tx
from lepton_common.types import ModelRef


@dataclass(frozen=True, slots=True)
class Label:
    """What was right for one request, or for all of one key, as far as was known `at` that time."""

    id: UUID
    at: datetime
    label: Any
    request: str | None = None
    key: str | None = None
    model: str | None = None


async def add_label(tx: Tx, tenant: str, label: Label) -> None:
    """The label is kept, in its day's partition, which is there. Adding it again changes nothing."""
    await tx.execute(
        """
        INSERT INTO labels (tenant, id, second, at, request, key, model, label)
        VALUES (:tenant, :id, :second, :at, :request, :key, :model, CAST(:label AS jsonb))
        ON CONFLICT DO NOTHING
        """,
        {
            "tenant": tenant,
            "id": label.id,
            "second": int(label.at.timestamp()),
            "at": label.at,
            "request": label.request,
            "key": label.key,
            "model": label.model,
            "label": json.dumps(label.label),
        },
    )


async def list_labels(tx: Tx, model: ModelRef, limit: int) -> list[Label]:
    """The newest labels of the model first."""
    found = await tx.execute(
        """
        SELECT id, at, label, request, key, model FROM labels
        WHERE tenant = :tenant AND model = :model ORDER BY at DESC, id LIMIT :limit
        """,
        {"tenant": model.tenant, "model": model.model, "limit": limit},
    )
    return [Label(**row) for row in found.mappings()]
