"""monitor's HTTP API of labels: what was told of a model, to look at."""

from typing import Annotated

from fastapi import APIRouter, Query
from lepton.models import Label, Name
from lepton_common.db import Database

from lepton_monitor import store_labels
from lepton_monitor.api import Reader


def router(db: Database) -> APIRouter:
    """The routes under /v1/labels."""
    routes = APIRouter(prefix="/v1/labels")

    @routes.get("")
    async def list_labels(by: Reader, model: Name, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> list[Label]:
        """The newest labels that name the model first. They come over Kafka, on `lepton.labels`."""
        ref = by.ref(model)
        async with db.transaction() as tx:
            found = await store_labels.list_labels(tx, ref, limit)
        return [Label.model_validate(each, from_attributes=True) for each in found]

    return routes
