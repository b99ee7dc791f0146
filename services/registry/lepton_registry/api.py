"""What a caller may ask of the registry.

Who may do what: `read` reads, `deploy` also uploads and registers, `admin` also manages the keys of its own tenant. An
admin key of the tenant `default` is the operator's: it also makes tenants and manages the keys of every tenant. What
belongs to another tenant answers 404, as if it did not exist.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, TypeVar

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from lepton import models as shapes
from lepton_common.auth import Caller, check_operator, new_secret
from lepton_common.blobs import Blobs
from lepton_common.db import Database, Tx
from lepton_common.errors import NotFound
from lepton_common.etcd import EtcdClient
from lepton_common.events import Batching, ModelCreated
from lepton_common.records import KeyRecord, Scope
from lepton_common.types import ModelRef, VersionRef
from lepton_common.web import caller
from pydantic import BaseModel

from lepton_registry import keys, store
from lepton_registry.domain import (
    Push,
    Version,
    check_new_key,
    managed_tenant,
    manages,
    next_version,
    registered,
)
from lepton_registry.inspector import Inspector
from lepton_registry.uploads import Staging

router = APIRouter(prefix="/v1")

Reader = Annotated[Caller, caller(Scope.READ)]
Deployer = Annotated[Caller, caller(Scope.DEPLOY)]
Admin = Annotated[Caller, caller(Scope.ADMIN)]

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
    inspector: Inspector


def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


WithParts = Annotated[Parts, Depends(_parts)]

# --- tenants ----------------------------------------------------------------------------------------------------------


@router.post("/tenants", status_code=201, responses={200: {"model": shapes.Tenant}}, tags=["tenants"])
async def create_tenant(new: shapes.NewTenant, by: Admin, parts: WithParts, response: Response) -> shapes.Tenant:
    """The tenant exists; 200 when it did before. Only for the operator."""
    check_operator(by)
    async with parts.db.transaction() as tx:
        if not await store.add_tenant(tx, new.name):
            response.status_code = HTTPStatus.OK
        tenant = await store.get_tenant(tx, new.name)
    return _shape(shapes.Tenant, tenant)


@router.get("/tenants", tags=["tenants"])
async def list_tenants(by: Admin, parts: WithParts) -> list[shapes.Tenant]:
    """The tenants that the caller manages: all of them for the operator, else its own."""
    async with parts.db.transaction() as tx:
        tenants = await store.list_tenants(tx)
    return [_shape(shapes.Tenant, each) for each in tenants if manages(by.tenant, each.name)]


# --- keys -------------------------------------------------------------------------------------------------------------


@router.post("/keys", status_code=201, tags=["keys"])
async def create_key(new: shapes.NewKey, by: Admin, parts: WithParts) -> shapes.CreatedKey:
    """A new key, and the only sight of its secret. It is valid everywhere within a second.

    409 when the tenant has a key of that name: repeating a request whose answer was lost leaves no unseen secret.
    """
    tenant = managed_tenant(by.tenant, new.tenant)
    secret, sha256, prefix = new_secret()
    record = KeyRecord(
        id=keys.id_of(sha256),
        prefix=prefix,
        tenant=tenant,
        name=new.name,
        scopes=frozenset(map(Scope, new.scopes)),
        created_at=datetime.now(UTC),
        expires_at=new.expires_at,
    )
    async with parts.db.transaction() as tx:
        # Keys live in etcd alone; the tenant's row makes two requests for the same name follow each other.
        await store.lock_tenant(tx, tenant)
        check_new_key(new.name, new.expires_at, await keys.list_keys(parts.etcd, tenant), record.created_at)
        await keys.add_key(parts.etcd, sha256, record)
    return shapes.CreatedKey(**_key(record).model_dump(), secret=secret)


@router.get("/keys", tags=["keys"])
async def list_keys(by: Admin, parts: WithParts, tenant: shapes.Name | None = None) -> list[shapes.Key]:
    """The keys of the caller's tenant, or of `tenant` for the operator. Secrets are never shown again."""
    return [_key(each) for each in await keys.list_keys(parts.etcd, managed_tenant(by.tenant, tenant))]


@router.delete("/keys/{key_id}", status_code=204, tags=["keys"])
async def revoke_key(key_id: Annotated[str, Path(pattern="^[0-9a-f]{16}$")], by: Admin, parts: WithParts) -> None:
    """The key is refused everywhere within a second. The bootstrap key returns when the registry starts again."""
    found = await keys.find_key(parts.etcd, key_id)
    if found is None or not manages(by.tenant, found[1].tenant):
        raise NotFound(f"no key {key_id!r}")
    await keys.remove_key(parts.etcd, found[0])


# --- models and versions ----------------------------------------------------------------------------------------------


@router.get("/models", tags=["models"])
async def list_models(
    by: Reader, parts: WithParts, after: shapes.Name | None = None, limit: Limit = 100
) -> shapes.Page[shapes.Model]:
    """The tenant's models, by name."""
    async with parts.db.transaction() as tx:
        models = await store.list_models(tx, by.tenant, after or "", limit + 1)
    return _page(shapes.Model, models, limit, lambda each: each.name)


@router.get("/models/{model}", tags=["models"])
async def get_model(model: shapes.Name, by: Reader, parts: WithParts) -> shapes.Model:
    """A model, its newest version's number and its aliases."""
    async with parts.db.transaction() as tx:
        found = await store.get_model(tx, ModelRef(by.tenant, model))
    return _shape(shapes.Model, found)


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
    )
    async with parts.db.transaction() as tx:
        version, is_new = await _register(tx, ModelRef(by.tenant, model), new.sha256, push, deploy=new.deploy)
    if not is_new:
        response.status_code = HTTPStatus.OK
    return _shape(shapes.Version, version)


async def _register(tx: Tx, ref: ModelRef, sha256: str, push: Push, *, deploy: bool) -> tuple[Version, bool]:
    artifact = await store.get_artifact(tx, ref.tenant, sha256)
    is_new_model = await store.add_model(tx, ref, push.at)
    model = await store.lock_model(tx, ref)
    if known := await store.find_version_of(tx, ref, sha256):
        return known, False
    version = next_version(model, artifact, push)
    await store.add_version(tx, version)
    if is_new_model:
        await tx.emit(ModelCreated(tenant=ref.tenant, model=ref.model, at=push.at))
    await tx.emit(registered(version, deploy=deploy))
    return version, True


@router.get("/models/{model}/versions", tags=["models"])
async def list_versions(
    model: shapes.Name, by: Reader, parts: WithParts, after: After = 0, limit: Limit = 100
) -> shapes.Page[shapes.Version]:
    """The model's versions, by number."""
    ref = ModelRef(by.tenant, model)
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
        found = await store.get_version(tx, VersionRef(ModelRef(by.tenant, model), version))
    return _shape(shapes.Version, found)


@router.get("/models/{model}/timeline", tags=["models"])
async def get_timeline(
    model: shapes.Name, by: Reader, parts: WithParts, after: After = 0, limit: Limit = 100
) -> shapes.Page[shapes.TimelineEntry]:
    """What happened to the model, in order. A fact gets here shortly after it is one: events travel over Kafka."""
    ref = ModelRef(by.tenant, model)
    async with parts.db.transaction() as tx:
        await store.get_model(tx, ref)
        entries = await store.list_entries(tx, ref, after, limit + 1)
    return _page(shapes.TimelineEntry, entries, limit, lambda each: each.seq)


# --- shapes -----------------------------------------------------------------------------------------------------------


def _shape(kind: type[S], value: object) -> S:
    return kind.model_validate(value, from_attributes=True)


def _page(kind: type[S], found: Sequence[T], limit: int, cursor: Callable[[T], object]) -> shapes.Page[S]:
    """Of `found`, read with one more than `limit`: that one tells that there is a next page."""
    items = [_shape(kind, each) for each in found[:limit]]
    return shapes.Page(items=items, next=str(cursor(found[limit - 1])) if len(found) > limit else None)


def _key(record: KeyRecord) -> shapes.Key:
    fields = record.model_dump(exclude={"scopes"})
    return shapes.Key(**fields, scopes=sorted(map(shapes.Scope, record.scopes)))
