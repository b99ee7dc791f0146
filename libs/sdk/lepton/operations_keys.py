"""What a client can do about tenants and keys, as flows; see `operations.py`."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from lepton.flow import Ask, Flow, ask, checked, get_list, post, segment
from lepton.models import CreatedKey, Key, KeyLimits, KeyRotation, NewKey, NewTenant, Scope, Tenant


def tenants() -> Flow[list[Tenant]]:
    """All tenants. Needs the scope `admin`."""
    return get_list(Tenant, "/v1/tenants")


def create_tenant(name: str) -> Flow[Tenant]:
    """The tenant exists, as it may have before. Only for the operator."""
    return post(Tenant, "/v1/tenants", checked(NewTenant, name=name))


def keys(tenant: str | None = None) -> Flow[list[Key]]:
    """The keys of your tenant, or for the operator of another, without their secrets."""
    return get_list(Key, "/v1/keys", {} if tenant is None else {"tenant": tenant})


def create_key(
    name: str,
    *,
    scopes: Sequence[Scope | str] = (Scope.INFER,),
    tenant: str | None = None,
    expires_at: datetime | None = None,
    models: Sequence[str] = (),
    limits: KeyLimits | None = None,
) -> Flow[CreatedKey]:
    """A new key; its secret is shown here and never again.

    `models` are patterns of the models that it is for, such as `fraud-*`; without one it is for all of its tenant's.
    """
    wanted = checked(
        NewKey,
        name=name,
        scopes=list(scopes),
        tenant=tenant,
        expires_at=expires_at,
        models=list(models),
        limits=limits or KeyLimits(),
    )
    return post(CreatedKey, "/v1/keys", wanted)


def rotate_key(key_id: str, *, overlap: timedelta = timedelta(hours=1)) -> Flow[CreatedKey]:
    """A new key with the rights of this one, which ends after the overlap. Raises NotFound, and Conflict for one that
    was rotated before."""
    wanted = checked(KeyRotation, overlap_s=round(overlap.total_seconds()))
    return post(CreatedKey, f"/v1/keys/{segment(key_id)}/rotate", wanted)


def revoke_key(key_id: str) -> Flow[None]:
    """The key opens nothing any more. Raises NotFound."""
    yield from ask(Ask(method="DELETE", path=f"/v1/keys/{segment(key_id)}"))
