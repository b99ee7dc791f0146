"""The part of Istio's VirtualService that Lepton honours, as strict shapes: all else is refused, never ignored."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from lepton_common.errors import Invalid
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

_UNITS_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)")
# What Python's regular expressions have and RE2, which runs in linear time, has not.
_NOT_RE2 = re.compile(r"\(\?[=!>(]|\(\?<[=!]|\(\?P=|\\[1-9NUZu]|[*+?}]\+|\{[0-9,]*[0-9]{4,}")
_RETRY_ON = {
    *("5xx", "gateway-error", "reset", "reset-before-request", "connect-failure", "refused-stream", "retriable-4xx"),
    *("envoy-ratelimited", "cancelled", "deadline-exceeded", "internal", "resource-exhausted", "unavailable"),
}
# The gateway needs these itself, or does not pass them on.
_NOT_TO_MATCH = {
    *("authorization", "connection", "content-length", "expect", "host", "keep-alive", "te", "trailer"),
    *("transfer-encoding", "upgrade"),
}
_NOT_TO_EDIT = _NOT_TO_MATCH | {"content-encoding", "content-type", "inference-header-content-length"}
_OWN = ("x-lepton-", "x-envoy-")


def milliseconds(duration: str) -> int:
    """A duration such as 10s, 1.5s, 250ms or 1m30s. Raises ValueError."""
    parts = _DURATION.findall(duration)
    total = sum(float(number) * _UNITS_MS[unit] for number, unit in parts)
    if not parts or "".join(number + unit for number, unit in parts) != duration or total < 1 or total > 86_400_000:
        raise ValueError(f"{duration[:40]!r} is not a duration such as 10s, 1.5s or 250ms, from 1ms to 24h")
    return round(total)


def _duration(text: str) -> str:
    milliseconds(text)
    return text


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{text[:80]!r} is not a regular expression: {error}") from error
    if found := _NOT_RE2.search(text):
        raise ValueError(f"{text[:80]!r} has {found[0]!r}, which the mesh's regular expressions (RE2) do not know")
    return text


def _retry_on(text: str) -> str:
    for name in text.split(","):
        if name.strip() not in _RETRY_ON and not re.fullmatch(r"[1-5][0-9]{2}", name.strip()):
            known = ", ".join(sorted(_RETRY_ON))
            raise ValueError(f"{name.strip()[:40]!r} is neither a status nor one of {known}")
    return text


def _matchable(name: str) -> str:
    if name.startswith("x-lepton-"):
        raise ValueError(f"{name} is between Lepton's gateway and its own routes, which stay in front of yours")
    if name in _NOT_TO_MATCH:
        raise ValueError(f"the gateway does not pass {name} on, so nothing can be routed by it")
    return name


def _editable(name: str) -> str:
    if name in _NOT_TO_EDIT or (name.startswith(_OWN) and name != "x-lepton-version"):
        raise ValueError(f"{name} is not for a VirtualService to change")
    return name


def _plain(value: str) -> str:
    if "%" in value:
        raise ValueError(f"{value[:80]!r} has a %, which the mesh would take for a variable")
    return value


Duration = Annotated[str, AfterValidator(_duration)]
_Header = StringConstraints(pattern=r"^[A-Za-z0-9!#$&'*+.^_`|~-]{1,128}$", to_lower=True)
MatchedHeader = Annotated[str, _Header, AfterValidator(_matchable)]
EditedHeader = Annotated[str, _Header, AfterValidator(_editable)]
MatchedValue = Annotated[str, StringConstraints(pattern=r"^[\x20-\x7e]{1,1024}$")]
HeaderValue = Annotated[str, StringConstraints(pattern=r"^[\x20-\x7e]{0,1024}$"), AfterValidator(_plain)]
RouteName = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,63}$")]


class Part(BaseModel):
    """A part of the document. `refused` are fields that Istio has and Lepton has not, each with the reason."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
    )
    refused: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for name, each in value.items():
                if name in cls.refused:
                    told = {"field": name, "reason": cls.refused[name]}
                    raise PydanticCustomError("refused", "Istio has this, Lepton refuses it: {reason}", told)
                if isinstance(each, dict) and len({str(key).lower() for key in each}) < len(each):
                    raise PydanticCustomError("refused", "one name is there twice, in other letters", {"field": name})
        return value


class Strings(Part):
    """What a header's value must be like; with nothing said it must only be there."""

    exact: MatchedValue | None = None
    prefix: MatchedValue | None = None
    regex: Annotated[MatchedValue, AfterValidator(_regex)] | None = None

    @model_validator(mode="after")
    def _one_at_most(self) -> Self:
        if len(self.model_fields_set) > 1:
            raise ValueError("expected one of exact, prefix and regex")
        return self


class Uri(Part):
    """Every request of a model: routes do not choose by path."""

    refused = dict.fromkeys(("exact", "regex"), 'a model has one path; the only uri is prefix "/"')
    prefix: Annotated[str, StringConstraints(pattern="^/$")]


class Match(Part):
    """All of these headers, and none of those without."""

    refused = {
        **dict.fromkeys(("scheme", "method", "authority", "port", "queryParams", "ignoreUriCase"), "match by headers"),
        **dict.fromkeys(("sourceLabels", "sourceNamespace", "gateways"), "every request comes from Lepton's gateway"),
        "statPrefix": "Lepton counts by version",
    }
    name: str | None = None
    uri: Uri | None = None
    headers: Annotated[dict[MatchedHeader, Strings], Field(max_length=20)] = {}
    without_headers: Annotated[dict[MatchedHeader, Strings], Field(max_length=20)] = {}


class Port(Part):
    number: Annotated[int, Field(ge=1, le=65535)]


class Destination(Part):
    """A version: its subset is named v and its number. The port is the mesh's own business."""

    host: str
    subset: Annotated[str, StringConstraints(pattern=r"^v[1-9][0-9]{0,8}$")]
    port: Port | None = None

    @property
    def version(self) -> int:
        return int(self.subset[1:])


class Operations(Part):
    """What becomes of a message's headers."""

    set: Annotated[dict[EditedHeader, HeaderValue], Field(max_length=20)] = {}
    add: Annotated[dict[EditedHeader, HeaderValue], Field(max_length=20)] = {}
    remove: Annotated[list[EditedHeader], Field(max_length=20)] = []


class Headers(Part):
    request: Operations = Operations()
    response: Operations = Operations()


class Weighted(Part):
    """A version with its weight: of 100, or of 10 000 for hundredths of a percent."""

    destination: Destination
    weight: Annotated[int, Field(ge=0, le=10_000)] | None = None
    headers: Headers = Headers()


class Percentage(Part):
    value: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.0


class Mirrored(Part):
    """A version that gets copies, of all requests unless said otherwise."""

    destination: Destination
    percentage: Percentage = Percentage(value=100.0)


class Retrying(Part):
    """How often a failed request is tried again."""

    refused = {
        "retryRemoteLocalities": "retries stay in the version's pool",
        "retryIgnorePreviousHosts": "a retry always goes to another worker",
    }
    attempts: Annotated[int, Field(ge=0, le=10)]
    per_try_timeout: Duration | None = None
    retry_on: Annotated[str, StringConstraints(max_length=512), AfterValidator(_retry_on)] | None = None
    backoff: Duration | None = None


class Route(Part):
    """Where requests go that match, by weight."""

    refused = {
        "fault": "faults are for tests, and the judge would take them for the version's own",
        "rewrite": "a model has one path and one host",
        "redirect": "a model's answers come from its versions",
        "directResponse": "a model's answers come from its versions",
        "delegate": "one VirtualService says all about a model",
        "corsPolicy": "browsers meet the front door, not the mesh",
        "headers": "set headers on each destination",
        "mirrorPercent": "use mirrorPercentage",
    }
    name: RouteName | None = None
    match: Annotated[list[Match], Field(max_length=20)] = []
    route: Annotated[list[Weighted], Field(min_length=1, max_length=20)]
    timeout: Duration | None = None
    retries: Retrying | None = None
    mirror: Destination | None = None
    mirror_percentage: Percentage | None = None
    mirrors: Annotated[list[Mirrored], Field(max_length=5)] = []


class Spec(Part):
    """A whole VirtualService's spec."""

    refused = {
        "tcp": "models answer HTTP",
        "tls": "models answer HTTP; the mesh encrypts",
        "gateways": "every request comes from Lepton's gateway; in Kubernetes the field is left to whoever sets it",
        "exportTo": "in Kubernetes the field is left to whoever sets it",
    }
    hosts: list[str]
    http: Annotated[list[Route], Field(min_length=1, max_length=50)]


class Document(Part):
    """The object as a file or Kubernetes has it. `metadata` and `status` say nothing about traffic."""

    api_version: Annotated[str, StringConstraints(pattern=r"^networking\.istio\.io/(v1|v1beta1|v1alpha3)$")]
    kind: Annotated[str, StringConstraints(pattern="^VirtualService$")]
    metadata: dict[str, Any] = {}
    status: dict[str, Any] = {}
    spec: Spec


def parsed(document: Mapping[str, Any]) -> Spec:
    """The document's spec. Raises Invalid with the path of the first thing that is wrong, and what is wrong with it."""
    try:
        return Document.model_validate(document).spec
    except ValidationError as error:
        raise Invalid(_told(error)) from error


def _told(error: ValidationError) -> str:
    errors = error.errors(include_url=False)
    # A misspelt field tells more than the one that is missing for it.
    first = next((each for each in errors if each["type"] in ("refused", "extra_forbidden")), errors[0])
    location = [each for each in first["loc"] if each != "[key]"]
    path = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in location).lstrip(".")
    if first["type"] == "refused":
        return f"{path}.{first['ctx']['field']}: {first['msg']}".lstrip(".")
    if first["type"] == "extra_forbidden":
        return f"{path}: there is no such field"
    return f"{path or 'the document'}: {first['msg'].removeprefix('Value error, ')}"
