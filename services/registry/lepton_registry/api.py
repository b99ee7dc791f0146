"""What a caller may ask of the registry.

Who may do what: `read` reads, `deploy` also uploads and registers, `admin` also manages the keys of its own tenant
(`api_keys.py`). What belongs to another tenant answers 404, as if it did not exist; a model that the key is not for
answers 403, whether it exists or not, and is in no list.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, TypeVar

from fastapi import APIRouter, Depends, Query, Request, Response
from lepton import models as shapes
from lepton_common.auth import Caller
from lepton_common.blobs import Blobs
from lepton_common.db import Database
from lepton_common.etcd import EtcdClient
from lepton_common.events import Batching
from lepton_common.records import Scope
from lepton_common.types import VersionRef
from lepton_common.web import caller
from pydantic import BaseModel

from lepton_registry import store
from lepton_registry.domain import Push
from lepton_registry.pushes import Intake, register
from lepton_registry.uploads import Staging

router = APIRouter(prefix="/v1")

Reader = Annotated[Caller, caller(Scope.READ)]
Deployer = Annotated[Caller, caller(Scope.DEPLOY)]

Limit = Annotated[int, Query(ge=1, le=1000)]
After = Annotated[int, Query(ge=0, le=2**31 - 1, description="`next` of the page before")]

S = TypeVar("S", bound=BaseModel)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Parts:
    """What the routes work with; `main.build` puts it into the app's state."""

    db: Database
    etcd: EtcdClient
    blobs: Blobs
    staging: Staging
    intake: Intake


def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


WithParts = Annotated[Parts, Depends(_parts)]

# --- models and versions ----------------------------------------------------------------------------------------------


@router.get("/models", tags=["models"])
async def list_models(
    by: Reader, parts: WithParts, after: shapes.Name | None = None, limit: Limit = 100
) -> shapes.Page[shapes.Model]:
    """The tenant's models, by name."""
    async with parts.db.transaction() as tx:
        models = await store.list_models(tx, by.tenant, after or "", limit + 1, by.models)
    return _page(shapes.Model, models, limit, lambda each: each.name)


@router.get("/models/{model}", tags=["models"])
async def get_model(model: shapes.Name, by: Reader, parts: WithParts) -> shapes.Model:
    """A model, its newest version's number and its aliases."""
    async with parts.db.transaction() as tx:
        found = await store.get_model(tx, by.ref(model))
    return shaped(shapes.Model, found)


@router.post("/models/{model}/versions", status_code=201, responses={200: {"model": shapes.Version}}, tags=["models"])
async def register_version(
    model: shapes.Name, new: shapes.NewVersion, by: Deployer, parts: WithParts, response: Response
) -> shapes.Version:
    """An uploaded artifact is a version of the model, which is created by its first one.

    200 and the version there is when these bytes were registered before, whatever the settings sent now.
    """
    push = Push(
        batching=Batching(**new.batching.model_dump()),
        metrics=new.metrics,
        labels=new.labels,
        actor=by.name,
        at=datetime.now(UTC),
        deploy=new.deploy,
    )
    async with parts.db.transaction() as tx:
        version, is_new = await register(tx, by.ref(model), new.sha256, push)
    if not is_new:
        response.status_code = HTTPStatus.OK
    return shaped(shapes.Version, version)


@router.get("/models/{model}/versions", tags=["models"])
async def list_versions(
    model: shapes.Name, by: Reader, parts: WithParts, after: After = 0, limit: Limit = 100
) -> shapes.Page[shapes.Version]:
    """The model's versions, by number."""
    ref = by.ref(model)
    async with parts.db.transaction() as tx:
        await store.get_model(tx, ref)
        versions = await store.list_versions(tx, ref, after, limit + 1)
    return _page(shapes.Version, versions, limit, lambda each: each.version)


@router.get("/models/{model}/versions/{version}", tags=["models"])
async def get_version(
    model: shapes.Name, version: shapes.VersionNumber, by: Reader, parts: WithParts
) -> shapes.Version:
    """One version of a model."""
    async with parts.db.transaction() as tx:
        found = await store.get_version(tx, VersionRef(by.ref(model), version))
    return shaped(shapes.Version, found)


@router.get("/models/{model}/timeline", tags=["models"])
async def get_timeline(
    model: shapes.Name, by: Reader, parts: WithParts, after: After = 0, limit: Limit = 100
) -> shapes.Page[shapes.TimelineEntry]:
    """What happened to the model, in order. A fact gets here shortly after it is one: events travel over Kafka."""
    ref = by.ref(model)
    async with parts.db.transaction() as tx:
        await store.get_model(tx, ref)
        entries = await store.list_entries(tx, ref, after, limit + 1)
    return _page(shapes.TimelineEntry, entries, limit, lambda each: each.seq)


# --- shapes -----------------------------------------------------------------------------------------------------------


def shaped(kind: type[S], value: object) -> S:
    return kind.model_validate(value, from_attributes=True)


def _page(kind: type[S], found: Sequence[T], limit: int, cursor: Callable[[T], object]) -> shapes.Page[S]:
    """Of `found`, read with one more than `limit`: that one tells that there is a next page."""
    items = [shaped(kind, each) for each in found[:limit]]
    return shapes.Page(items=items, next=str(cursor(found[limit - 1])) if len(found) > limit else None)
