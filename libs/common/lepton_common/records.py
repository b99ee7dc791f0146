"""Every value in etcd: small live state that many watch. One page, as `events.py` is for Kafka.

| key | value | written by | watched by |
|---|---|---|---|
| `/lepton/serving/{tenant}/{model}` | Serving | rollout, compare-and-swap | gateway, worker |
| `/lepton/workers/{id}` | WorkerState, under a lease | worker | gateway, rollout |
| `/lepton/keys/{sha256}` | KeyRecord | registry | every service |
| `/lepton/quotas/{key id}` | QuotaUse | gateway, compare-and-swap | nobody: read when written |
"""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from lepton_common.events import Batching
from lepton_common.types import ModelRef

SERVING = "/lepton/serving/"
WORKERS = "/lepton/workers/"
KEYS = "/lepton/keys/"
QUOTAS = "/lepton/quotas/"


class Record(BaseModel):
    """A value in etcd. Unknown fields are ignored, so services of two releases can share a cluster."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Share(Record):
    """A version's share of the model's traffic."""

    version: int
    percent: Annotated[float, Field(ge=0, le=100)]


class Assigned(Record):
    """What a worker needs to run a version, and the pool that runs it."""

    version: int
    sha256: str
    size_bytes: int
    format: str = "onnx"
    pool: str = "cpu"
    batching: Batching = Batching()


class Limits(Record):
    """What each gateway lets through to one model. `rate_per_s` and `burst` are as in `KeyLimits`."""

    max_concurrency: Annotated[int, Field(ge=1)] = 1024
    timeout_ms: Annotated[int, Field(ge=1)] = 30_000
    rate_per_s: Annotated[float, Field(gt=0)] | None = None
    burst: Annotated[int, Field(ge=1)] | None = None


class Shadow(Record):
    """A version that gets a copy of the stable's requests. Callers never see its answers."""

    version: int
    percent: Annotated[float, Field(ge=0, le=100)]


class Cache(Record):
    """How long, and in how many bytes of each gateway, the model's answers are kept for requests that equal theirs."""

    ttl_s: Annotated[float, Field(gt=0)]
    max_bytes: Annotated[int, Field(gt=0)]


class Sticky(Record):
    """One user stays on one version. `by` is the header that names the user, or "key" for the caller's API key.

    `salt` spreads the users anew each time, so that not always the same ones are first.
    """

    by: str
    salt: str = ""


class VersionMatch(Record):
    """Requests that carry the header with this value go to the version, whatever the split says."""

    header: str
    value: str
    version: int


class Hand(Record):
    """A person moves the traffic: `spec` is that of their Istio VirtualService, checked. It goes before the split.

    `versions` are those that it leads to.
    """

    by: str
    at: AwareDatetime
    spec: dict[str, Any]
    versions: tuple[int, ...] = ()


class Serving(Record):
    """What is served of one model. A version without a share of the split is warm: loaded, and called by its number.

    `forwarded`: headers of callers, in lower case, that the mesh routes this model by.
    """

    tenant: str
    model: str
    generation: int
    stable: int | None = None
    previous: int | None = None
    split: tuple[Share, ...] = ()
    versions: tuple[Assigned, ...] = ()
    limits: Limits = Limits()
    shadow: Shadow | None = None
    sticky: Sticky | None = None
    matches: tuple[VersionMatch, ...] = ()
    hand: Hand | None = None
    forwarded: tuple[str, ...] = ()
    cache: Cache | None = None

    @property
    def ref(self) -> ModelRef:
        return ModelRef(self.tenant, self.model)

    @property
    def key(self) -> str:
        return f"{SERVING}{self.tenant}/{self.model}"

    def assigned(self, version: int) -> Assigned | None:
        return next((each for each in self.versions if each.version == version), None)


class LoadState(StrEnum):
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    UNLOADING = "unloading"


class Loaded(Record):
    """One version on one worker; `reason` says why when it failed."""

    tenant: str
    model: str
    version: int
    sha256: str
    state: LoadState
    reason: str = ""


class WorkerState(Record):
    """A worker, for as long as its lease lives. `address` is host:port; `device` is what its engine runs on."""

    id: str
    pool: str
    address: str
    device: str
    draining: bool = False
    versions: tuple[Loaded, ...] = ()


class Scope(StrEnum):
    """What a key may do; `auth.Caller.has` says which scopes bring others with them."""

    INFER = "infer"
    READ = "read"
    TEST = "test"
    DEPLOY = "deploy"
    ADMIN = "admin"


class KeyLimits(Record):
    """What one key may use; None is no limit of the key's own. `burst` is how many requests may come at once, where
    their mean rate is limited: None is a second's worth. `per_day` counts infer requests from midnight UTC."""

    rate_per_s: Annotated[float, Field(gt=0)] | None = None
    burst: Annotated[int, Field(ge=1)] | None = None
    max_concurrency: Annotated[int, Field(ge=1)] | None = None
    per_day: Annotated[int, Field(ge=1)] | None = None


class KeyRecord(Record):
    """An API key. Its secret is not here: the etcd key is the secret's sha256. `expires_at` None means never.

    `models` are patterns (`fraud-*`) of the names that the key is for; none of them means every model of its tenant.
    `replaced_by` is the id of the key that rotation put in its place.
    """

    id: str
    prefix: str
    tenant: str
    name: str
    scopes: frozenset[Scope]
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None
    models: tuple[str, ...] = ()
    limits: KeyLimits = KeyLimits()
    replaced_by: str | None = None


class QuotaUse(Record):
    """How many requests of a key all gateways have counted on its latest day, in days since 1970, UTC."""

    day: int
    used: int
