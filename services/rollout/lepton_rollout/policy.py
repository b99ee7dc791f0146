"""What a release policy means: the stages a version passes on its way, and when nothing may start or grow. Pure."""

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from zoneinfo import ZoneInfo

from lepton.policies import Afterwards, FreezeWindow, Policy, Step, Strategy, Weekday
from lepton_common.errors import Invalid

_WEEKDAYS = tuple(Weekday)


class Kind(StrEnum):
    """Where a stage's evidence comes from: copies of the stable's requests; a share of the traffic; the requests that
    carry the policy's headers; all of the traffic."""

    SHADOW = "shadow"
    SPLIT = "split"
    MATCH = "match"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the way. `percent` is the share of live traffic: 0 for copies and for matched requests.

    The version leaves it after `dwell_s` and `min_requests` of its own without harm, and with proof where it `prove`s.
    `approval`: a person must approve before it begins. `bake`: it has all traffic, and is watched against the past.
    """

    number: int
    kind: Kind
    percent: float
    dwell_s: float = 0.0
    min_requests: int = 0
    prove: bool = False
    approval: bool = False
    bake: bool = False


def stages(policy: Policy, *, first: bool) -> tuple[Stage, ...]:
    """The version's way by this policy, in order and numbered from 0. `first`: the model has no stable version, so
    there is nothing to compare with and nobody to protect, and it takes all traffic at once."""
    if first:
        return (Stage(0, Kind.ALL, 100.0),)
    way: list[Stage] = []
    match policy.strategy:
        case Strategy.IMMEDIATE:
            return (Stage(0, Kind.ALL, 100.0, approval=policy.approve_promotion),)
        case Strategy.CANARY:
            way = _split(policy, 0)
        case Strategy.BLUE_GREEN:
            way = [Stage(0, Kind.SPLIT, 0.0, policy.dwell_s)]
        case Strategy.SHADOW:
            shadow = policy.shadow
            way = [Stage(0, Kind.SHADOW, 0.0, shadow.dwell_s, shadow.min_pairs), *_split(policy, 1)]
        case Strategy.AB:
            way = [_compared(policy)]
            if policy.afterwards is Afterwards.RETURN:
                return tuple(way)
    last = _steps(policy)[-1]
    dwell_s, approval = policy.bake_s, policy.approve_promotion
    if policy.strategy in (Strategy.CANARY, Strategy.SHADOW) and last.percent >= 100:
        # A last step of 100 % is the bake itself.
        dwell_s, approval = max(dwell_s, last.dwell_s or 0.0), approval or last.approval
    # Asking what follows an A/B test is asking for approval of the promotion.
    approval = approval or (policy.strategy is Strategy.AB and policy.afterwards is Afterwards.ASK)
    way.append(Stage(len(way), Kind.ALL, 100.0, dwell_s, policy.min_requests, approval=approval, bake=True))
    return tuple(way)


def _steps(policy: Policy) -> list[Step]:
    return [step if isinstance(step, Step) else Step(percent=step) for step in policy.steps]


def _split(policy: Policy, number: int) -> list[Stage]:
    """The steps below 100 %. The last one proves, whatever its share: nothing takes all traffic unproven."""
    steps = [step for step in _steps(policy) if step.percent < 100]
    return [
        Stage(
            number + index,
            Kind.SPLIT,
            step.percent,
            policy.dwell_s if step.dwell_s is None else step.dwell_s,
            policy.min_requests if step.min_requests is None else step.min_requests,
            prove=step is steps[-1] or step.percent >= policy.judge.prove_from_percent,
            approval=step.approval,
        )
        for index, step in enumerate(steps)
    ]


def _compared(policy: Policy) -> Stage:
    """The stage of an A/B test; it proves when the version is promoted without asking."""
    step, prove = _steps(policy)[0], policy.afterwards is Afterwards.PROMOTE
    kind, percent = (Kind.MATCH, 0.0) if policy.match else (Kind.SPLIT, step.percent)
    needed = policy.min_requests if step.min_requests is None else step.min_requests
    return Stage(0, kind, percent, policy.duration_s, needed, prove=prove, approval=step.approval)


# --- when nothing may start or grow -----------------------------------------------------------------------------------


def frozen(policy: Policy, now: datetime) -> FreezeWindow | None:
    """The policy's freeze window that holds now. Raises Invalid when `now` has no time zone."""
    if now.tzinfo is None:
        raise Invalid(f"{now.isoformat()} has no time zone, so it is in no freeze window and out of none")
    return next((window for window in policy.freeze if _holds(window, now.astimezone(UTC))), None)


def _holds(window: FreezeWindow, now: datetime) -> bool:
    today = now.astimezone(ZoneInfo(window.timezone)).date()
    return any(_holds_from(window, day, now) for day in (today, today - timedelta(days=1)))


def _holds_from(window: FreezeWindow, day: date, now: datetime) -> bool:
    """Whether the window that begins on this day holds. The days and dates of a window are those it begins on."""
    outside = (window.first is not None and day < window.first) or (window.last is not None and day > window.last)
    if outside or _WEEKDAYS[day.weekday()] not in window.days:
        return False
    zone = ZoneInfo(window.timezone)
    end_day = day if window.end > window.start else day + timedelta(days=1)
    # When the clocks change, an hour comes twice or not at all: the longer of the two readings holds.
    starts = [datetime.combine(day, window.start.replace(fold=fold), zone).astimezone(UTC) for fold in (0, 1)]
    ends = [datetime.combine(end_day, window.end.replace(fold=fold), zone).astimezone(UTC) for fold in (0, 1)]
    return min(starts) <= now < max(ends)
