"""Every value in etcd: small live state that many watch. One page, as `events.py` is for Kafka.

| key | value | written by | watched by |
|---|---|---|---|
| `/lepton/serving/{tenant}/{model}` | Serving | rollout, compare-and-swap | gateway, worker |
| `/lepton/workers/{id}` | WorkerState, under a lease | worker | gateway, rollout |
| `/lepton/keys/{sha256}` | KeyRecord | registry | every service |
"""

from enum import StrEnum
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from lepton_common.events import Batching
from lepton_common.types import ModelRef

SERVING = "/lepton/serving/"
WORKERS = "/lepton/workers/"
KEYS = "/lepton/keys/"


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
    """What the gateway lets through to one model."""

    max_concurrency: Annotated[int, Field(ge=1)] = 1024
    timeout_ms: Annotated[int, Field(ge=1)] = 30_000


class Serving(Record):
    """What is served of one model. A version without a share of the split is warm: loaded, and called by its number."""

    tenant: str
    model: str
    generation: int
    stable: int | None = None
    previous: int | None = None
    split: tuple[Share, ...] = ()
    versions: tuple[Assigned, ...] = ()
    limits: Limits = Limits()

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
    INFER = "infer"
    READ = "read"
    DEPLOY = "deploy"
    ADMIN = "admin"


class KeyRecord(Record):
    """An API key. Its secret is not here: the etcd key is the secret's sha256. `expires_at` None means never."""

    id: str
    prefix: str
    tenant: str
    name: str
    scopes: frozenset[Scope]
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None
