"""Every HTTP shape of Lepton's `/v1` API, on one page."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Generic, TypeVar
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, StringConstraints

# A tenant's and a model's name become a host name in the mesh, so they are one DNS label each.
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# Printable text: PostgreSQL stores no NUL, and logs and terminals want no control characters.
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{1,200}$")]
Number = Annotated[float, Field(allow_inf_nan=False)]
# A few named values. Without the extra the schema would let through the names that the pattern does not.
_NAMED = Field(max_length=100, json_schema_extra={"additionalProperties": False})
# The letters of names, and `*` for any of them, `?` for one.
NamePattern = Annotated[str, StringConstraints(pattern=r"^[a-z0-9*?-]{1,63}$")]
VersionNumber = Annotated[int, Field(ge=1, le=2_147_483_647)]

T = TypeVar("T")


class Request(BaseModel):
    """What a caller sends. An unknown field is an error, so that a typing mistake is not silently ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Response(BaseModel):
    """What a service answers. Unknown fields are ignored, so that an older client reads a newer service."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class WrongInput(Response):
    """An input that was not accepted, named as `body.metrics.accuracy` or `query.limit`, and what is wrong with it."""

    name: str
    detail: str


class Problem(Response):
    """Every error of `/v1` (RFC 9457, `application/problem+json`). `errors` names each wrong input, if that was it."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[WrongInput] = []


class Page(Response, Generic[T]):
    """A part of a list. `next` is the cursor of the following page, None on the last one."""

    items: list[T]
    next: str | None = None


# --- tenants and keys -------------------------------------------------------------------------------------------------


class Scope(StrEnum):
    """What a key may do: call models, read about them, call a version of one's own choice by header while others get
    the split's, change what is served, manage keys. `deploy` implies `read` and `test`, `admin` everything."""

    INFER = "infer"
    READ = "read"
    TEST = "test"
    DEPLOY = "deploy"
    ADMIN = "admin"


class NewTenant(Request):
    name: Name


class Tenant(Response):
    name: str
    created_at: datetime


class KeyLimits(BaseModel):
    """What one key may use; None is no limit of the key's own. `burst` is how many requests may come at once, where
    their mean rate is limited: None is a second's worth. `per_day` counts infer requests from midnight UTC."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    rate_per_s: Annotated[Number, Field(gt=0)] | None = None
    burst: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_concurrency: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    per_day: Annotated[int, Field(ge=1, le=2**53)] | None = None


class NewKey(Request):
    """A key to make. `tenant` None means the caller's own; `expires_at` None means never.

    `models` are patterns of the models' names that it is for (`fraud-*`); none of them means all of its tenant's.
    """

    name: Text
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=5)] = [Scope.INFER]
    tenant: Name | None = None
    expires_at: AwareDatetime | None = None
    models: Annotated[list[NamePattern], Field(max_length=50)] = []
    limits: KeyLimits = KeyLimits()


class KeyRotation(Request):
    """How many seconds the old secret goes on beside the new one."""

    overlap_s: Annotated[int, Field(ge=0, le=30 * 24 * 3600)] = 3600


class Key(Response):
    """A key without its secret; `prefix` is the secret's beginning, to tell keys apart.

    `replaced_by` is the id of the key that rotation put in its place. `last_used_at` is behind by up to a minute.
    """

    id: str
    prefix: str
    tenant: str
    name: str
    scopes: list[Scope]
    created_at: datetime
    expires_at: datetime | None = None
    models: list[str] = []
    limits: KeyLimits = KeyLimits()
    replaced_by: str | None = None
    last_used_at: datetime | None = None


class CreatedKey(Key):
    """A key just made: the only time its secret is shown."""

    secret: str


# --- artifacts --------------------------------------------------------------------------------------------------------


class TensorSpec(Response):
    """One input or output of a model: an Open Inference Protocol datatype and a shape with -1 for any size."""

    name: str
    datatype: str
    shape: list[int]


class Signature(Response):
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]


class Artifact(Response):
    """Bytes that Lepton stored after checking their digest and that they are a model it can serve."""

    sha256: str
    size_bytes: int
    format: str
    signature: Signature
    created_at: datetime


class Upload(Response):
    """An unfinished upload: the next byte wanted is `offset` of `total_bytes`."""

    sha256: str
    offset: int
    total_bytes: int


# --- models and versions ----------------------------------------------------------------------------------------------


class Batching(BaseModel):
    """How a worker may merge requests of a version. Rows are counted along the first dimension."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    max_rows: Annotated[int, Field(ge=1, le=65536)] = 64
    max_queued_rows: Annotated[int, Field(ge=1, le=1_000_000)] = 4096


class NewVersion(Request):
    """A version to register from an uploaded artifact. `deploy`: serve it by itself when it is the model's first."""

    sha256: Sha256
    deploy: bool = True
    batching: Batching = Batching()
    metrics: Annotated[dict[Text, Number], _NAMED] = {}
    labels: Annotated[dict[Text, Text], _NAMED] = {}


class VersionState(StrEnum):
    """How a version's last rollout ended; `registered` when it has had none.

    The version in production is `promoted` as long as it is there. Whether another one ever was, its timeline tells.
    """

    REGISTERED = "registered"
    PROMOTED = "promoted"
    ROLLED_BACK = "rolled_back"
    ABORTED = "aborted"
    FAILED = "failed"


class Version(Response):
    """One immutable version of a model; `state_reason` says why its last rollout ended as it did."""

    tenant: str
    model: str
    version: int
    sha256: str
    size_bytes: int
    format: str
    signature: Signature
    batching: Batching
    metrics: dict[str, float]
    labels: dict[str, str]
    state: VersionState
    state_reason: str = ""
    created_at: datetime
    created_by: str


class Model(Response):
    """A model, its newest version and its aliases, such as `{"production": 3}`."""

    tenant: str
    name: str
    latest_version: int
    aliases: dict[str, int]
    created_at: datetime


class TimelineEntry(Response):
    """A fact about a model: which, when, by whom, why, and what it was based on. `id` is the event's."""

    id: UUID
    at: datetime
    type: str
    version: int | None = None
    actor: str = ""
    reason: str = ""
    evidence: dict[str, JsonValue]


# --- labels -----------------------------------------------------------------------------------------------------------


class Label(Response):
    """What was right for a request, or for all requests of one key, as somebody told it over Kafka."""

    id: UUID
    at: datetime
    request: str | None = None
    key: str | None = None
    model: str | None = None
    label: JsonValue


# --- what is served ---------------------------------------------------------------------------------------------------


class VersionChoice(Request):
    """A version to load or unload; None means the model itself."""

    version: VersionNumber | None = None


class TrafficShare(Response):
    version: int
    percent: float


class LoadedVersion(Response):
    """A version on one worker; `device` is what runs it, `reason` says why it failed."""

    version: int
    worker: str
    device: str
    state: str
    reason: str = ""


class ResponseCache(Request):
    """The gateways keep a model's answers for `ttl_s` seconds, each in `max_bytes` of its memory, and give them to
    requests of the same bytes. For models that answer the same whenever they are asked the same."""

    ttl_s: Annotated[float, Field(gt=0, le=7 * 24 * 3600, allow_inf_nan=False)] = 60.0
    max_bytes: Annotated[int, Field(ge=1024, le=1 << 30)] = 64 << 20


class ModelLimits(Request):
    """What each gateway lets through to a model, whoever asks, and how long an answer may take. None is the default:
    any rate, a second's worth of it at once, 1024 requests under way, 30 000 ms."""

    rate_per_s: Annotated[Number, Field(gt=0)] | None = None
    burst: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_concurrency: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    timeout_ms: Annotated[int, Field(ge=1, le=3_600_000)] | None = None


class ServingView(Response):
    """What is served of a model now. `previous` is where a rollback goes; `cache` is None where it is off; `limits` are
    those that hold.

    A version without a share of `split` is warm: it answers when asked for by number.
    """

    tenant: str
    model: str
    generation: int
    stable: int | None
    previous: int | None
    split: list[TrafficShare]
    versions: list[int]
    workers: list[LoadedVersion]
    cache: ResponseCache | None = None
    limits: ModelLimits = ModelLimits()


# --- the Open Inference Protocol's part that people look at -----------------------------------------------------------


class ModelMetadata(Response):
    """A served model's inputs and outputs, as `GET /v2/models/{model}` tells them."""

    name: str
    versions: list[str] = []
    platform: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]


# --- traces -----------------------------------------------------------------------------------------------------------


class TraceStage(Response):
    """A part of a request's time. In order: `front` (Envoy's front door) or `kafka` (since it was written), `wait`
    (for its turn at the gateway), `mesh` (there and back), and in the worker `decode`, `queue`, `run`, `encode`.
    `mesh+worker` stands for those of which the worker did not tell."""

    name: str
    ms: float


class Trace(Response):
    """Where the time of one traced request went. It ran in a batch of so many rows and requests, if it ran; `tries` is
    how often the gateway sent it. Of a request over Kafka that was tried again this is the last try."""

    request_id: str
    trace_id: str
    model: str
    version: str
    status: int
    at: datetime
    total_ms: float
    stages: list[TraceStage]
    batch_rows: int | None = None
    batch_requests: int | None = None
    tries: int = 1
