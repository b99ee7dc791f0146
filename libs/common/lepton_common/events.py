"""Every event in Lepton, in the order of a model's life. Facts, never commands.

Longer than other files on purpose: all events are on one page, so that a reader finds what can be heard in one place.
"""

from abc import ABC, abstractmethod
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar
from uuid import UUID, uuid4

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from lepton_common.errors import Invalid
from lepton_common.types import ModelRef


class Event(BaseModel, ABC):
    """A fact. Its id makes a repeat harmless; its subject is the Kafka key and keeps one subject's story in order."""

    # Unknown fields are ignored, so yesterday's reader takes tomorrow's event.
    model_config = ConfigDict(frozen=True, extra="ignore")
    topic: ClassVar[str]

    id: UUID = Field(default_factory=uuid4)
    at: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    tenant: str

    @property
    @abstractmethod
    def subject(self) -> str:
        """What the fact is about: a model, a tenant, a key."""


class ModelEvent(Event):
    """A fact about one model."""

    topic = "lepton.models"
    model: str

    @property
    def ref(self) -> ModelRef:
        return ModelRef(self.tenant, self.model)

    @property
    def subject(self) -> str:
        return str(self.ref)


# --- registry -------------------------------------------------------------------------------------------------------


class ModelCreated(ModelEvent):
    """A model's name was taken by its first push."""


class Batching(BaseModel):
    """How a worker may merge requests of a version. Rows are counted along the first dimension."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    max_rows: Annotated[int, Field(ge=1, le=65536)] = 64
    max_queued_rows: Annotated[int, Field(ge=1, le=1_000_000)] = 4096


class VersionRegistered(ModelEvent):
    """A validated version exists. It carries what a worker needs to run it, so that nobody has to ask the registry.

    With `deploy` a model's first version goes live by itself, and with `rollout` any does: by `policy` if there is one,
    else by the model's own, else at once.
    """

    version: int
    sha256: str
    size_bytes: int
    format: str = "onnx"
    batching: Batching = Batching()
    deploy: bool = True
    rollout: bool = False
    policy: dict[str, Any] | None = None
    actor: str = ""


class IngestEvent(ModelEvent):
    """What came of a message on `lepton.ingest`: `request` is its id, `source` its CloudEvents source."""

    request: str
    source: str = ""


class IngestFinished(IngestEvent):
    """The bytes are that version of the model; not `is_new`: they were before."""

    version: int
    sha256: str
    is_new: bool


class IngestFailed(IngestEvent):
    """The bytes did not become a version. `reason` says why, for whoever sent the message."""

    reason: str


class VersionPromoted(ModelEvent):
    """The alias `production` moved to this version."""

    version: int
    previous: int | None = None


# --- who may do what ------------------------------------------------------------------------------------------------

Count = Annotated[int, Field(ge=0)]


class AccessEvent(Event):
    """A fact about tenants, keys and callers, for the audit. It never holds a secret."""

    topic = "lepton.audit"


class AccessChanged(AccessEvent):
    """Somebody changed who may do what: `actor` by name, `by` is the id of their key, `peer` from where."""

    actor: str
    by: str
    peer: str

    @property
    def subject(self) -> str:
        return self.tenant


class TenantCreated(AccessChanged):
    """A tenant exists."""


class KeyCreated(AccessChanged):
    """A key counts from now on. `limits` are those of its own."""

    key: str
    name: str
    scopes: tuple[str, ...]
    models: tuple[str, ...] = ()
    limits: dict[str, float] = {}
    expires_at: AwareDatetime | None = None


class KeyRotated(AccessChanged):
    """Another key has the rights of this one, which ends soon."""

    key: str
    name: str
    replaced_by: str
    ends_at: AwareDatetime


class KeyRevoked(AccessChanged):
    """The key opens nothing any more."""

    key: str
    name: str


class KeysUsed(AccessEvent):
    """When keys of a tenant, by id, were last used at one service, every half a minute. Lossy."""

    keys: dict[str, AwareDatetime]

    @property
    def subject(self) -> str:
        return self.tenant


class AccessRefused(AccessEvent):
    """Somebody was refused (401, 403) so many times within a second, for one reason. Lossy.

    `key` is the id of the key, empty where none was known: the tenant is `default` then. `what` was asked for first.
    """

    service: str
    key: str = ""
    peer: str
    status: int
    reason: str
    what: str = ""
    count: Annotated[int, Field(ge=1)] = 1

    @property
    def subject(self) -> str:
        return self.key or self.peer


# --- gateway --------------------------------------------------------------------------------------------------------


class Tally(BaseModel):
    """Requests by outcome. `latency` counts those with an answer by bucket, see `sketch.py`.

    `client_errors` are the callers' own (4xx, and callers that left), `shed` was refused for load (429, 503 of a full
    queue), `timeouts` are 504, `server_errors` all else from 500 on, the mesh's own answers included.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    ok: Count = 0
    client_errors: Count = 0
    server_errors: Count = 0
    timeouts: Count = 0
    shed: Count = 0
    latency: dict[int, Count] = {}

    @property
    def requests(self) -> int:
        return self.ok + self.client_errors + self.server_errors + self.timeouts + self.shed

    @property
    def errors(self) -> int:
        """What counts against a version: server errors and time-outs. Being shed speaks of load, not of the version."""
        return self.server_errors + self.timeouts


class VersionWindow(Tally):
    """One version's second. `forced`: the callers named the version, so the split had no say.

    `users` counts each user once, by the worst that befell them, where one user stays on one version. `counters` are
    occurrences of events that the platform does not know, by name.
    """

    version: int
    pool: str = ""
    forced: bool = False
    users: Tally | None = None
    counters: dict[str, Count] = {}


class ShadowWindow(BaseModel):
    """Answers of a shadowed version beside the stable's on the same requests.

    `only_stable_right` and `only_shadow_right` count the pairs of which the label was known and just one was right.
    `dropped`: pairs that were not made, to spare the live traffic.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    version: int
    agreed: Count = 0
    disagreed: Count = 0
    both_right: Count = 0
    both_wrong: Count = 0
    only_stable_right: Count = 0
    only_shadow_right: Count = 0
    failed: Count = 0
    dropped: Count = 0
    latency: dict[int, Count] = {}


class InferenceWindow(ModelEvent):
    """What one gateway saw of one model in one second, whole: a later one of the same second replaces it.

    `second` is in Unix time, by when the answers were given. `epoch` tells a gateway's lives apart. Lossy: sent past
    the outbox. `in_flight` is at the second's end.
    """

    topic = "lepton.telemetry"
    gateway: str
    epoch: int
    second: int
    versions: tuple[VersionWindow, ...] = ()
    shadow: ShadowWindow | None = None
    in_flight: Count = 0


# --- monitor --------------------------------------------------------------------------------------------------------


class WindowClosed(ModelEvent):
    """One second of a model over all gateways, final. All versions are in one event, so no one sees half a comparison.

    `sequence` counts the model's closed windows without a gap: who misses one knows.
    """

    topic = "lepton.windows"
    second: int
    sequence: int
    gateways: int
    versions: tuple[VersionWindow, ...] = ()
    shadow: ShadowWindow | None = None
    in_flight: Count = 0


# --- rollout --------------------------------------------------------------------------------------------------------


class PolicySet(ModelEvent):
    """From now on the model's versions come to live traffic by this policy."""

    policy: dict[str, Any]
    actor: str = ""


class RolloutEvent(ModelEvent):
    """A fact about one rollout of a model's version."""

    topic = "lepton.rollouts"
    rollout: UUID
    version: int


class RolloutStarted(RolloutEvent):
    """A version is on its way to live traffic."""

    strategy: str
    actor: str = ""


class TrafficShifted(RolloutEvent):
    """The mesh acknowledged the version's new share of live traffic."""

    percent: Annotated[float, Field(ge=0, le=100)]
    reason: str
    actor: str = ""


class RolloutHeld(RolloutEvent):
    """The rollout waits for a person, and why; `page`: somebody should look now."""

    reason: str
    page: bool = False
    actor: str = ""


class RolloutSteered(RolloutEvent):
    """A person said what a rollout is to do: `command` is pause, resume, promote, abort or approve."""

    command: str
    actor: str
    reason: str = ""


class RolloutFinished(RolloutEvent):
    """The rollout is over: `promoted`, `rolled_back` (it was worse), `aborted` (by a person or a newer version), or
    `failed` before it had any traffic. But for a promotion the traffic is where it was before."""

    outcome: str
    reason: str
    previous: int | None = None
    evidence: dict[str, Any] = {}


class MeshTaken(ModelEvent):
    """Somebody moves the model's traffic by hand, with a VirtualService of their own."""

    topic = "lepton.rollouts"
    actor: str
    reason: str = ""
    spec: dict[str, Any]


class MeshReturned(ModelEvent):
    """The model's traffic is rollout's again."""

    topic = "lepton.rollouts"
    actor: str


_TYPES: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (
        ModelCreated,
        VersionRegistered,
        IngestFinished,
        IngestFailed,
        VersionPromoted,
        TenantCreated,
        KeyCreated,
        KeyRotated,
        KeyRevoked,
        KeysUsed,
        AccessRefused,
        InferenceWindow,
        WindowClosed,
        PolicySet,
        RolloutStarted,
        TrafficShifted,
        RolloutHeld,
        RolloutSteered,
        RolloutFinished,
        MeshTaken,
        MeshReturned,
    )
}


def decode(type_name: str, data: bytes) -> Event:
    """The event of that type from its JSON. Raises Invalid for an unknown type or a value that does not fit it."""
    kind = _TYPES.get(type_name)
    if kind is None:
        raise Invalid(f"unknown event type {type_name[:80]!r}")
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first: Any = error.errors(include_url=False, include_input=False)[0]
        raise Invalid(f"{type_name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def types() -> tuple[type[Event], ...]:
    """Every event type, in the order of a model's life."""
    return tuple(_TYPES.values())
