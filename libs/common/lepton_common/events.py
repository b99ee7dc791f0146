"""Every event in Lepton, in the order of a model's life. Facts, never commands."""

from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar
from uuid import UUID, uuid4

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from lepton_common.errors import Invalid
from lepton_common.types import ModelRef


class Event(BaseModel):
    """A fact. Its id makes a repeat harmless; its subject is the Kafka key and keeps one subject's story in order."""

    # Unknown fields are ignored, so yesterday's reader takes tomorrow's event.
    model_config = ConfigDict(frozen=True, extra="ignore")
    topic: ClassVar[str]

    id: UUID = Field(default_factory=uuid4)
    at: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    tenant: str

    @property
    def subject(self) -> str:
        raise NotImplementedError(f"{type(self).__name__} has no subject")


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
    """A validated version exists. It carries what a worker needs to run it, so that nobody has to ask the registry."""

    version: int
    sha256: str
    size_bytes: int
    format: str = "onnx"
    batching: Batching = Batching()
    deploy: bool = True
    actor: str = ""


class VersionPromoted(ModelEvent):
    """The alias `production` moved to this version."""

    version: int
    previous: int | None = None


# --- rollout --------------------------------------------------------------------------------------------------------


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


class RolloutFinished(RolloutEvent):
    """The rollout is over: `promoted`, or `failed` with the stable version untouched."""

    outcome: str
    reason: str
    previous: int | None = None


_TYPES: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (ModelCreated, VersionRegistered, VersionPromoted, RolloutStarted, TrafficShifted, RolloutFinished)
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
