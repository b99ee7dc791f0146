"""A release policy: how a version earns its traffic. The shape that is sent, stored and published as JSON schema."""

from collections.abc import Mapping
from datetime import date, time
from enum import StrEnum
from itertools import pairwise
from types import MappingProxyType
from typing import Annotated, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from lepton.models import Name, Request, Text


class Strategy(StrEnum):
    """How a version takes over live traffic.

    `immediate`: all at once, as soon as a worker has it ready. `canary`: step by step, each judged. `blue-green`: it is
    ready and reachable by number, then takes all at once and is watched. `shadow`: it gets copies of the stable's
    requests first, then steps. `ab`: it keeps a fixed share, or the requests that carry a header, for a set time.
    """

    IMMEDIATE = "immediate"
    CANARY = "canary"
    BLUE_GREEN = "blue-green"
    SHADOW = "shadow"
    AB = "ab"


class OnFailure(StrEnum):
    """What happens when the version proves worse: all traffic goes back; the shares stay as they are until a person
    decides, or a newer version comes; or they stay, and nothing but a person's word may move them."""

    ROLLBACK = "rollback"
    HOLD = "hold"
    FREEZE = "freeze"


class OnNewer(StrEnum):
    """What a newer version does to a rollout under way: take its place, wait for its end, or be refused."""

    SUPERSEDE = "supersede"
    QUEUE = "queue"
    REFUSE = "refuse"


class Afterwards(StrEnum):
    """What follows an `ab` that ran its time without harm."""

    ASK = "ask"
    PROMOTE = "promote"
    RETURN = "return"


class Weekday(StrEnum):
    MON = "mon"
    TUE = "tue"
    WED = "wed"
    THU = "thu"
    FRI = "fri"
    SAT = "sat"
    SUN = "sun"


def _hundredths(percent: float) -> float:
    if abs(percent * 100 - round(percent * 100)) > 1e-6:
        raise ValueError("a share is a multiple of 0.01 %")
    return percent


def _known_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError(f"{name[:80]!r} is not a time zone such as Europe/Zurich") from error
    return name


Percent = Annotated[float, Field(gt=0, le=100), AfterValidator(_hundredths)]
Seconds = Annotated[float, Field(ge=0, le=30 * 24 * 3600, allow_inf_nan=False)]
Probability = Annotated[float, Field(gt=0, lt=0.5)]
Ratio = Annotated[float, Field(gt=0, lt=1)]
OddsRatio = Annotated[float, Field(ge=1, le=100, allow_inf_nan=False)]
Requests = Annotated[int, Field(ge=0, le=1_000_000_000)]
HeaderName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{1,64}$", to_lower=True)]
CounterName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,62}$")]


class Step(Request):
    """A share of the traffic, and what must be true before it grows. None means as the policy has it.

    `approval`: a person must approve before the step begins.
    """

    percent: Percent
    dwell_s: Seconds | None = None
    min_requests: Requests | None = None
    approval: bool = False


class Comparison(Request):
    """How one kind of bad answer is judged, by odds ratios: the odds of a bad answer from the version, divided by the
    stable's in the same seconds.

    Harm is evidence for more than `tolerated`. Promotion needs proof that it is below `margin`, or that the version's
    own ratio of bad answers is below `acceptable`.
    """

    tolerated: OddsRatio = 1.0
    margin: OddsRatio = 1.5
    acceptable: Ratio = 0.01


class Judging(Request):
    """The statistics. `alpha` bounds the chance that a version as good as the stable is taken back, however often one
    looks; `beta` the chance that one at the margin passes. `slack`: a request is slow when it takes this part longer
    than the stable's 95th (99th) percentile from before the step. `refused` are requests answered as the caller's own
    mistake (4xx): callers are split by chance, so more of them with one version are its doing. Proof is asked for from
    `prove_from_percent` on."""

    alpha: Probability = 0.05
    beta: Probability = 0.05
    errors: Comparison = Comparison()
    refused: Comparison = Comparison()
    slow: Comparison = Comparison(acceptable=0.1)
    slack: Annotated[float, Field(ge=0, le=10)] = 0.25
    prove_from_percent: Annotated[float, Field(ge=0, le=100)] = 25.0


class Limits(Request):
    """What holds whatever the stable does, looked at over the last `window_s` seconds once they hold `min_requests`."""

    max_error_ratio: Ratio | None = None
    max_p99_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    window_s: Annotated[int, Field(ge=1, le=600)] = 10
    min_requests: Annotated[int, Field(ge=1, le=1_000_000)] = 20


class Shadowing(Request):
    """The version gets a copy of `percent` of the stable's requests before any of its own.

    It goes on after `dwell_s` and `min_pairs` compared answers, of which `min_agreement` agreed. Where requests carry a
    label, the version must not be right less often.
    """

    percent: Percent = 100.0
    dwell_s: Seconds = 60.0
    min_pairs: Requests = 200
    min_agreement: Annotated[float, Field(ge=0, le=1)] = 0.9


class HeaderMatch(Request):
    """Requests that carry the header with exactly this value."""

    header: HeaderName
    value: Text


class FreezeWindow(Request):
    """When nothing starts or grows: from `start` to `end` on these days in this time zone, from the date `first` to
    `last`. An `end` that is not after `start` is on the next day. Traffic is taken back at any time."""

    timezone: Annotated[str, AfterValidator(_known_zone)] = "UTC"
    days: Annotated[list[Weekday], Field(min_length=1, max_length=7)] = list(Weekday)
    start: time = time(0)
    end: time = time(0)
    first: date | None = None
    last: date | None = None
    reason: Text | None = None


class Policy(Request):
    """How versions of a model come to live traffic.

    `bake_s`: how long the version is watched once it has all of the traffic. `max_step_s`: how long a step may wait for
    evidence before a person is asked. `sticky`: "key" or the name of a header; one user then stays on one version.
    `pool`: the pool the version runs in until it is promoted. `cool_down_s`: after it was taken back, how long the same
    bytes are refused even with force.
    """

    strategy: Strategy = Strategy.CANARY
    steps: Annotated[list[Percent | Step], Field(min_length=1, max_length=50)] = [1.0, 5.0, 25.0, 50.0]
    dwell_s: Seconds = 60.0
    min_requests: Requests = 100
    bake_s: Seconds = 60.0
    max_step_s: Annotated[float, Field(gt=0, le=30 * 24 * 3600)] = 6 * 3600.0
    judge: Judging = Judging()
    limits: Limits = Limits()
    counters: Annotated[dict[CounterName, Comparison], Field(max_length=20)] = {}
    shadow: Shadowing = Shadowing()
    match: Annotated[list[HeaderMatch], Field(max_length=20)] = []
    duration_s: Seconds = 24 * 3600.0
    afterwards: Afterwards = Afterwards.ASK
    sticky: HeaderName | None = None
    pool: Name | None = None
    approve_promotion: bool = False
    on_failure: OnFailure = OnFailure.ROLLBACK
    on_newer: OnNewer = OnNewer.SUPERSEDE
    freeze: Annotated[list[FreezeWindow], Field(max_length=50)] = []
    cool_down_s: Seconds = 600.0

    @model_validator(mode="after")
    def _steps_grow(self) -> Self:
        shares = [share_of(step) for step in self.steps]
        if any(later <= earlier for earlier, later in pairwise(shares)):
            raise ValueError(f"steps must grow: {', '.join(f'{share:g}' for share in shares)}")
        # Nothing takes all traffic before it was judged at less.
        if self.strategy in (Strategy.CANARY, Strategy.SHADOW) and shares[0] >= 100:
            raise ValueError("the first step of a canary must be less than 100 %")
        return self


def share_of(step: float | Step) -> float:
    """A step's percent."""
    return step.percent if isinstance(step, Step) else step


# Named policies: `fast` for development and urgent repairs with much traffic, `careful` for what must not go wrong.
PRESETS: Mapping[str, Policy] = MappingProxyType(
    {
        "immediate": Policy(strategy=Strategy.IMMEDIATE, on_newer=OnNewer.REFUSE),
        "fast": Policy(
            steps=[5.0, 25.0, 50.0],
            dwell_s=4,
            min_requests=30,
            bake_s=3,
            max_step_s=600,
            judge=Judging(
                errors=Comparison(margin=3, acceptable=0.03), slow=Comparison(margin=3, acceptable=0.2), slack=0.5
            ),
            cool_down_s=30,
        ),
        "careful": Policy(
            steps=[0.1, 1.0, 5.0, 10.0, 25.0, 50.0],
            dwell_s=600,
            min_requests=1000,
            bake_s=1800,
            max_step_s=48 * 3600,
            judge=Judging(
                alpha=0.02, beta=0.02, errors=Comparison(margin=1.25, acceptable=0.005), prove_from_percent=10
            ),
            approve_promotion=True,
            cool_down_s=3600,
        ),
        "shadow-first": Policy(strategy=Strategy.SHADOW),
    }
)
