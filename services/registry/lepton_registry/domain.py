"""The registry's rules: which keys there may be, how versions are numbered, what a fact changes and how it is told."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, TypeGuard
from uuid import UUID

from lepton_common.errors import Conflict, Invalid
from lepton_common.events import Batching, Event, ModelEvent, RolloutEvent, VersionRegistered
from lepton_common.records import KeyRecord, Scope
from lepton_common.signature import Signature

PRODUCTION = "production"

# Of the operator's first key not even the beginning of its secret is known.
BOOTSTRAP_PREFIX = "lp_"

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
    """How a version's last rollout ended; `registered` when it has had none.

    The version in production is `promoted` as long as it is there: a later rollout of it that came to nothing left the
    traffic with it. What was promoted once and is not in production any more may end in any state; its timeline tells.
    """

    REGISTERED = "registered"
    PROMOTED = "promoted"
    ROLLED_BACK = "rolled_back"
    ABORTED = "aborted"
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
    """What a caller says of a new version; how it goes live, see VersionRegistered."""

    batching: Batching
    metrics: Mapping[str, float]
    labels: Mapping[str, str]
    actor: str
    at: datetime
    deploy: bool = True
    rollout: bool = False
    policy: Mapping[str, Any] | None = None


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


def check_new_key(wanted: KeyRecord, existing: Iterable[KeyRecord]) -> None:
    """Raises Invalid for a key that would be dead at birth or open more than it says, Conflict for a name in use.

    A name used once makes a repeated request harmless: no second secret lives on that nobody has seen.
    """
    if wanted.expires_at is not None and wanted.expires_at <= wanted.created_at:
        raise Invalid("expires_at is in the past")
    if wanted.models and Scope.ADMIN in wanted.scopes:
        raise Invalid("models: a key with the scope admin makes keys for every model, so it cannot be for some only")
    if wanted.limits.burst is not None and wanted.limits.rate_per_s is None:
        raise Invalid("limits.burst says how far requests may run ahead of a rate: set limits.rate_per_s too")
    if any(key.name == wanted.name for key in existing):
        raise Conflict(f"a key named {wanted.name!r} exists; revoke it first, or choose another name")


def successor(old: KeyRecord, key_id: str, prefix: str, now: datetime) -> KeyRecord:
    """The key that takes the old one's place: the same rights, and as long to live as that one had at first.

    Raises Conflict for a key that was replaced before, which makes a repeat harmless, and for one that is over.
    """
    if old.prefix == BOOTSTRAP_PREFIX:
        raise Conflict("the bootstrap key is the registry's setting: change LEPTON_BOOTSTRAP_KEY_SHA256")
    if old.replaced_by is not None:
        raise Conflict(f"key {old.id} was rotated before: {old.replaced_by} has its place; rotate that if it was lost")
    if old.expires_at is not None and old.expires_at <= now:
        raise Conflict(f"key {old.id} has expired: create another")
    expires_at = None if old.expires_at is None else now + (old.expires_at - old.created_at)
    return old.model_copy(update={"id": key_id, "prefix": prefix, "created_at": now, "expires_at": expires_at})


def replaced(old: KeyRecord, by: str, ends_at: datetime) -> KeyRecord:
    """The old key, which ends then, or before if it would have anyway."""
    ends_at = ends_at if old.expires_at is None else min(ends_at, old.expires_at)
    return old.model_copy(update={"replaced_by": by, "expires_at": ends_at})


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


def registered(version: Version, push: Push) -> VersionRegistered:
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
        deploy=push.deploy,
        rollout=push.rollout,
        policy=dict(push.policy) if push.policy is not None else None,
        actor=version.created_by,
    )


_ENDS = {
    "promoted": VersionState.PROMOTED,
    "rolled_back": VersionState.ROLLED_BACK,
    "aborted": VersionState.ABORTED,
}


def state_after(outcome: str, *, in_production: bool) -> VersionState | None:
    """A version's state after a rollout of it with that outcome, None when it stays as it is.

    An outcome that is not known here is a failure.
    """
    state = _ENDS.get(outcome, VersionState.FAILED)
    return None if in_production and state is not VersionState.PROMOTED else state


# What happens every second is no part of a model's story: it would bury the rest.
_TOPICS_OF_THE_STORY = {ModelEvent.topic, RolloutEvent.topic}

# What an entry says in fields of its own; all else of an event is evidence.
_TOLD = {"id", "at", "tenant", "model", "version", "actor", "reason"}


def is_told(kind: type[Event]) -> TypeGuard[type[ModelEvent]]:
    """Whether events of that type are on their model's timeline."""
    return issubclass(kind, ModelEvent) and kind.topic in _TOPICS_OF_THE_STORY


def entry(event: ModelEvent) -> Entry:
    """The timeline entry that tells the event, in values that PostgreSQL can keep."""
    return Entry(
        id=event.id,
        tenant=event.tenant,
        model=event.model,
        at=event.at,
        type=type(event).__name__,
        version=getattr(event, "version", None),
        actor=_storable(getattr(event, "actor", "")),
        reason=_storable(getattr(event, "reason", "")),
        evidence=_storable(event.model_dump(mode="json", exclude=_TOLD)),
    )


def _storable(value: Any) -> Any:
    """As it is, but for what neither text nor jsonb can hold: NUL is U+FFFD, and a number that is none is None."""
    match value:
        case str():
            return value.replace("\0", "\N{REPLACEMENT CHARACTER}")
        case float() if not math.isfinite(value):
            return None
        case list():
            return [_storable(each) for each in value]
        case dict():
            return {_storable(name): _storable(each) for name, each in value.items()}
        case _:
            return value
