"""The registry's rules: who may manage what, how versions are numbered, what a fact changes and how it is told."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from lepton_common.errors import Conflict, Forbidden, Invalid, NotFound
from lepton_common.events import Batching, ModelEvent, VersionRegistered
from lepton_common.records import KeyRecord
from lepton_common.signature import Signature

PRODUCTION = "production"

# Exists from the first migration. Its admin keys are the operator's: they manage every tenant.
DEFAULT_TENANT = "default"

# Every kind of bytes that inspection lets through.
ONNX = "onnx"


@dataclass(frozen=True, slots=True)
class Tenant:
    name: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Artifact:
    """Verified, servable bytes that a tenant has uploaded."""

    tenant: str
    sha256: str
    size_bytes: int
    format: str
    signature: Signature
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Model:
    tenant: str
    name: str
    latest_version: int
    aliases: Mapping[str, int]
    created_at: datetime


class VersionState(StrEnum):
    """How a version's last rollout ended; `registered` when it has had none."""

    REGISTERED = "registered"
    PROMOTED = "promoted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable version of a model; only its state, and why it is so, follows its rollouts."""

    tenant: str
    model: str
    version: int
    sha256: str
    size_bytes: int
    format: str
    signature: Signature
    batching: Batching
    metrics: Mapping[str, float]
    labels: Mapping[str, str]
    state: VersionState
    state_reason: str
    created_at: datetime
    created_by: str


@dataclass(frozen=True, slots=True)
class Push:
    """What a caller says of a new version."""

    batching: Batching
    metrics: Mapping[str, float]
    labels: Mapping[str, str]
    actor: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Entry:
    """A fact on a model's timeline. `seq` is the order of arrival, 0 before it is stored."""

    id: UUID
    tenant: str
    model: str
    at: datetime
    type: str
    version: int | None
    actor: str
    reason: str
    evidence: Mapping[str, Any]
    seq: int = 0


def manages(own: str, tenant: str) -> bool:
    """Whether an admin key of tenant `own` manages that tenant."""
    return own in (tenant, DEFAULT_TENANT)


def managed_tenant(own: str, asked: str | None) -> str:
    """The tenant that an admin of tenant `own` means. Raises NotFound for one that it does not manage."""
    tenant = asked or own
    if manages(own, tenant):
        return tenant
    raise NotFound(f"no tenant {tenant!r}")


def check_operator(own: str) -> None:
    """Raises Forbidden unless an admin of tenant `own` is the operator."""
    if own != DEFAULT_TENANT:
        raise Forbidden(f"only an admin key of the tenant {DEFAULT_TENANT!r} may do this")


def check_new_key(name: str, expires_at: datetime | None, existing: Iterable[KeyRecord], now: datetime) -> None:
    """Raises Invalid for a key that would be dead at birth, Conflict when one of the tenant's keys has the name.

    A name used once makes a repeated request harmless: no second secret lives on that nobody has seen.
    """
    if expires_at is not None and expires_at <= now:
        raise Invalid("expires_at is in the past")
    if any(key.name == name for key in existing):
        raise Conflict(f"a key named {name!r} exists; revoke it first, or choose another name")


def next_version(model: Model, artifact: Artifact, push: Push) -> Version:
    """The model's next version, made of that artifact. Numbers count 1, 2, 3 and are never used twice."""
    return Version(
        tenant=model.tenant,
        model=model.name,
        version=model.latest_version + 1,
        sha256=artifact.sha256,
        size_bytes=artifact.size_bytes,
        format=artifact.format,
        signature=artifact.signature,
        batching=push.batching,
        metrics=push.metrics,
        labels=push.labels,
        state=VersionState.REGISTERED,
        state_reason="",
        created_at=push.at,
        created_by=push.actor,
    )


def registered(version: Version, *, deploy: bool) -> VersionRegistered:
    """The event that tells of a new version."""
    return VersionRegistered(
        at=version.created_at,
        tenant=version.tenant,
        model=version.model,
        version=version.version,
        sha256=version.sha256,
        size_bytes=version.size_bytes,
        format=version.format,
        batching=version.batching,
        deploy=deploy,
        actor=version.created_by,
    )


def state_after(outcome: str) -> VersionState:
    """A version's state after a rollout of it with that outcome. Anything but `promoted` is a failure."""
    return VersionState.PROMOTED if outcome == "promoted" else VersionState.FAILED


# What an entry says in fields of its own; all else of an event is evidence.
_TOLD = {"id", "at", "tenant", "model", "version", "actor", "reason"}


def entry(event: ModelEvent) -> Entry:
    """The timeline entry that tells the event."""
    return Entry(
        id=event.id,
        tenant=event.tenant,
        model=event.model,
        at=event.at,
        type=type(event).__name__,
        version=getattr(event, "version", None),
        actor=getattr(event, "actor", ""),
        reason=getattr(event, "reason", ""),
        evidence=event.model_dump(mode="json", exclude=_TOLD),
    )
