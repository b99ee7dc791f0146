"""What producers may ask for over Kafka: the data of their messages, by topic. How they write it, see `foreign.py`."""

from typing import Annotated, Any, Literal, Self

from lepton.models import Name, NewVersion, Sha256, Text
from lepton.policies import PRESETS, Policy
from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StringConstraints,
    model_validator,
)


def _of_preset(policy: object) -> object:
    if not isinstance(policy, str):
        return policy
    if policy not in PRESETS:
        raise ValueError(f"no preset is called so; there are {', '.join(PRESETS)}")
    return PRESETS[policy]


PolicyOrPreset = Annotated[
    Policy,
    BeforeValidator(_of_preset, json_schema_input_type=Policy | Literal[tuple(PRESETS)]),
]


class Ingest(NewVersion):
    """`lepton.ingest`: bytes are to be a version of the model, as a push would make them one.

    They are an artifact that the key's tenant has uploaded (`sha256`), or what is at `uri`, under a prefix that the
    operator allows; with both they must have that digest. With `deploy` the version goes live, by `policy` if there is
    one (a preset's name, or one of its own), else by the model's own, else at once.
    """

    model: Name
    sha256: Sha256 | None = None  # type: ignore[assignment]  # here a URI can take its place
    uri: Annotated[str, StringConstraints(min_length=1, max_length=2048)] | None = None
    policy: PolicyOrPreset | None = None

    @model_validator(mode="after")
    def _has_bytes(self) -> Self:
        if self.sha256 is None and self.uri is None:
            raise ValueError("sha256 or uri: one of them has to say where the bytes are")
        return self


_Word = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{0,1000}$")]
Truth = StrictBool | StrictInt | StrictFloat | _Word


class Label(BaseModel):
    """`lepton.labels`: what was right for a request, by the id it was answered with, or for all of one `key`.

    `at` is when that was known; without it, when the message was stored.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    request: Text | None = None
    key: Text | None = None
    label: Truth | Annotated[list[Truth], Field(max_length=1000)]
    model: Name | None = None
    at: AwareDatetime | None = None

    @model_validator(mode="after")
    def _is_of_something(self) -> Self:
        if (self.request is None) == (self.key is None):
            raise ValueError("request or key: exactly one of them has to say what the label is of")
        return self


class Tensor(BaseModel):
    """A tensor of the Open Inference Protocol. Without `data` its bytes follow the JSON: `binary_data_size` of them."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class InferenceRequest(BaseModel):
    """`lepton.inference.requests`: an infer request of the Open Inference Protocol, and what is to become of it.

    The fields that are not the protocol's may stand in headers `lepton-model` … instead. With the header
    `inference-header-content-length` the value is that much JSON, and the bytes of the tensors behind it.
    """

    model: str
    version: int | None = None
    reply_topic: str = "lepton.inference.results"
    timeout_ms: int | None = None
    ordered: bool = False
    id: str | None = None
    parameters: dict[str, Any] = {}
    inputs: list[Tensor]
    outputs: list[dict[str, Any]] = []


class InferenceAnswered(BaseModel):
    """`lepton.inference.results`: the answer of the Open Inference Protocol, in the form that the request had."""

    model_name: str
    model_version: str | None = None
    id: str | None = None
    parameters: dict[str, Any] = {}
    outputs: list[Tensor]


class InferenceFailed(BaseModel):
    """`lepton.inference.results`: the request has no answer, and why. The header `lepton-status` is as by HTTP."""

    error: str
