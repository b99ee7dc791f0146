"""What a caller may ask of the registry about tenants and keys.

An admin manages the keys of its own tenant. An admin key of the tenant `default` is the operator's: it also makes
tenants, and manages the keys of all of them. Every change is told on `lepton.audit`: written first and committed once
etcd has the key. Where PostgreSQL fails in that very moment the change holds, its caller hears 503, and it is not told.
"""

from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Response
from lepton import models as shapes
from lepton_common.auth import Caller, authorise, check_operator, new_secret
from lepton_common.errors import NotFound
from lepton_common.etcd import EtcdClient
from lepton_common.events import KeyCreated, KeyRevoked, KeyRotated, TenantCreated
from lepton_common.records import KeyLimits, KeyRecord, Scope
from lepton_common.web import caller, peer_of

from lepton_registry import keys, store
from lepton_registry.api import WithParts, shaped
from lepton_registry.domain import check_new_key, replaced, successor

router = APIRouter(prefix="/v1")

Admin = Annotated[Caller, caller(Scope.ADMIN)]


async def _operator(by: Admin) -> Caller:
    check_operator(by)
    return by


Operator = Annotated[Caller, Depends(_operator)]
Peer = Annotated[str, Depends(peer_of)]
KeyId = Annotated[str, Path(pattern="^[0-9a-f]{16}$")]

# --- tenants ----------------------------------------------------------------------------------------------------------


@router.post("/tenants", status_code=201, responses={200: {"model": shapes.Tenant}}, tags=["tenants"])
async def create_tenant(
    new: shapes.NewTenant, by: Operator, peer: Peer, parts: WithParts, response: Response
) -> shapes.Tenant:
    """The tenant exists; 200 when it did before. Only for the operator."""
    async with parts.db.transaction() as tx:
        if await store.add_tenant(tx, new.name):
            await tx.emit(TenantCreated(tenant=new.name, actor=by.name, by=by.key_id, peer=peer))
        else:
            response.status_code = HTTPStatus.OK
        tenant = await store.get_tenant(tx, new.name)
    return shaped(shapes.Tenant, tenant)


@router.get("/tenants", tags=["tenants"])
async def list_tenants(by: Admin, parts: WithParts) -> list[shapes.Tenant]:
    """The tenants that the caller manages: all of them for the operator, else its own."""
    async with parts.db.transaction() as tx:
        tenants = await store.list_tenants(tx)
    return [shaped(shapes.Tenant, each) for each in tenants if by.manages(each.name)]


# --- keys -------------------------------------------------------------------------------------------------------------


@router.post("/keys", status_code=201, tags=["keys"])
async def create_key(new: shapes.NewKey, by: Admin, peer: Peer, parts: WithParts) -> shapes.CreatedKey:
    """A new key, and the only sight of its secret. It is valid everywhere within a second.

    409 when the tenant has a key of that name: repeating a request whose answer was lost leaves no unseen secret.
    """
    authorise(by, Scope.ADMIN, tenant=new.tenant)
    secret, sha256, prefix = new_secret()
    record = KeyRecord(
        id=keys.id_of(sha256),
        prefix=prefix,
        tenant=new.tenant or by.tenant,
        name=new.name,
        scopes=frozenset(map(Scope, new.scopes)),
        created_at=datetime.now(UTC),
        expires_at=new.expires_at,
        models=tuple(new.models),
        limits=KeyLimits(**new.limits.model_dump()),
    )
    told = KeyCreated(
        tenant=record.tenant,
        actor=by.name,
        by=by.key_id,
        peer=peer,
        key=record.id,
        name=record.name,
        scopes=tuple(sorted(record.scopes)),
        models=record.models,
        limits=record.limits.model_dump(exclude_none=True),
        expires_at=record.expires_at,
    )
    async with parts.db.transaction() as tx:
        # Keys live in etcd alone; the tenant's row makes two requests for the same name follow each other.
        await store.lock_tenant(tx, record.tenant)
        check_new_key(record, await keys.list_keys(parts.etcd, record.tenant))
        # Told first: should etcd refuse it, neither is.
        await tx.emit(told)
        await keys.add_key(parts.etcd, sha256, record)
    return _created(record, secret)


@router.get("/keys", tags=["keys"])
async def list_keys(by: Admin, parts: WithParts, tenant: shapes.Name | None = None) -> list[shapes.Key]:
    """The keys of the caller's tenant, or of `tenant` for the operator. Secrets are never shown again."""
    authorise(by, Scope.ADMIN, tenant=tenant)
    found = await keys.list_keys(parts.etcd, tenant or by.tenant)
    async with parts.db.transaction() as tx:
        used = await store.list_key_uses(tx, [each.id for each in found])
    return [_key(each, used.get(each.id)) for each in found]


@router.post("/keys/{key_id}/rotate", status_code=201, tags=["keys"])
async def rotate_key(
    key_id: KeyId, rotation: shapes.KeyRotation, by: Admin, peer: Peer, parts: WithParts
) -> shapes.CreatedKey:
    """A new key with the rights of this one, which ends after the overlap. Both happen at once, or neither.

    409 when it was rotated before: repeating a request whose answer was lost leaves no unseen secret.
    """
    secret, sha256, prefix = new_secret()
    old = await _managed(parts.etcd, by, key_id)
    now = datetime.now(UTC)
    new = successor(old.record, keys.id_of(sha256), prefix, now)
    ending = replaced(old.record, new.id, now + timedelta(seconds=rotation.overlap_s))
    told = KeyRotated(
        tenant=new.tenant,
        actor=by.name,
        by=by.key_id,
        peer=peer,
        key=key_id,
        name=new.name,
        replaced_by=new.id,
        ends_at=ending.expires_at or now,
    )
    async with parts.db.transaction() as tx:
        await tx.emit(told)
        await keys.replace_key(parts.etcd, old, ending, sha256, new)
    return _created(new, secret)


@router.delete("/keys/{key_id}", status_code=204, tags=["keys"])
async def revoke_key(key_id: KeyId, by: Admin, peer: Peer, parts: WithParts) -> None:
    """The key is refused everywhere within a second. The bootstrap key returns when the registry starts again."""
    key = await _managed(parts.etcd, by, key_id)
    record = key.record
    async with parts.db.transaction() as tx:
        await tx.emit(
            KeyRevoked(tenant=record.tenant, actor=by.name, by=by.key_id, peer=peer, key=key_id, name=record.name)
        )
        await store.remove_key_use(tx, key_id)
        await keys.remove_key(parts.etcd, key)


async def _managed(etcd: EtcdClient, by: Caller, key_id: str) -> keys.Found:
    """The key, which the caller manages. Raises NotFound, for another tenant's key too."""
    found = await keys.get_key(etcd, key_id)
    if not by.manages(found.record.tenant):
        raise NotFound(f"no key {key_id!r}")
    return found


def _key(record: KeyRecord, last_used_at: datetime | None = None) -> shapes.Key:
    fields = record.model_dump(exclude={"scopes"})
    return shapes.Key(**fields, scopes=sorted(map(shapes.Scope, record.scopes)), last_used_at=last_used_at)


def _created(record: KeyRecord, secret: str) -> shapes.CreatedKey:
    return shapes.CreatedKey(**_key(record).model_dump(), secret=secret)
