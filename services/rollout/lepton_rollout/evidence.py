"""What a rollout has seen of its versions: every second of traffic folded into evidence of bounded size. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil, exp
from typing import Any

import pydantic_core
from lepton.policies import Policy
from lepton_common.errors import Invalid
from lepton_common.events import ShadowWindow, Tally, VersionWindow, WindowClosed
from lepton_common.sketch import bucket_of, count_above, merged, milliseconds_of, quantile_bucket
from pydantic import TypeAdapter, ValidationError

from lepton_rollout import trials
from lepton_rollout.bets import log_mismatch
from lepton_rollout.policy import Kind, Stage
from lepton_rollout.trials import ERRORS, NONE, REFUSED, SLOW_P95, SLOW_P99, Counts, Trial

# How long before a step the stable's windows make its baseline, and how many answers a percentile takes.
BASELINE_S = 600
_FOR_P95, _FOR_P99 = 100, 500


@dataclass(frozen=True, slots=True)
class Observation:
    """A second of one comparison: forced requests are left out, pools are merged. None: nothing was seen of it."""

    second: int
    candidate: VersionWindow | None = None
    stable: VersionWindow | None = None
    shadow: ShadowWindow | None = None


@dataclass(frozen=True, slots=True)
class Baseline:
    """What the stable was like before a step: the buckets of its percentiles, None when too few answers were seen.

    `requests` are what `counters` are counted in; `answers` and `errors` are of users where those are counted.
    """

    p95: int | None = None
    p99: int | None = None
    answers: int = 0
    errors: Counts = NONE
    refused: Counts = NONE
    requests: int = 0
    counters: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Recent:
    """A second, for the absolute limits: both versions' errors, and answers above the latency limit."""

    second: int
    candidate: Counts = NONE
    candidate_slow: Counts = NONE
    stable: Counts = NONE
    stable_slow: Counts = NONE


@dataclass(frozen=True, slots=True)
class Evidence:
    """The whole state of judgement, of bounded size. `second` is the last one seen, `entered` the step's beginning,
    `active` the last second in which the candidate had traffic in this step.

    Of this step are `requests` and `shadowed` (the shadow's agreed and disagreed answers), which a version can be
    judged by, and `split`, all requests by version, or with sticky users `mismatch` over `split_windows`.
    """

    second: int = -1
    entered: int = -1
    active: int = -1
    requests: int = 0
    shadowed: Counts = NONE
    split: tuple[int, int] = (0, 0)
    split_windows: int = 0
    mismatch: float = 0.0
    baseline: Baseline = field(default_factory=Baseline)
    trials: dict[str, Trial] = field(default_factory=dict)
    recent: tuple[Recent, ...] = ()


_STORED = TypeAdapter(Evidence)


# --- what was seen ----------------------------------------------------------------------------------------------------


def observation(window: WindowClosed, candidate: int, stable: int | None) -> Observation:
    """What the window says of these two versions."""
    shadow = window.shadow if window.shadow is not None and window.shadow.version == candidate else None
    return Observation(window.second, _whole(window, candidate), _whole(window, stable), shadow)


def _whole(window: WindowClosed, version: int | None) -> VersionWindow | None:
    parts = [each for each in window.versions if each.version == version and not each.forced]
    if len(parts) <= 1:
        return next(iter(parts), None)
    counters: dict[str, int] = {}
    for part in parts:
        for name, count in part.counters.items():
            counters[name] = counters.get(name, 0) + count
    asked = [part for part in parts if part.requests]
    users = [part.users for part in asked if part.users is not None]
    # Users that are known of a part of the traffic only would be half a comparison.
    known = _added(users) if users and len(users) == len(asked) else None
    return VersionWindow(version=parts[0].version, users=known, counters=counters, **_added(parts).model_dump())


def _added(parts: Sequence[Tally]) -> Tally:
    return Tally(
        ok=sum(part.ok for part in parts),
        client_errors=sum(part.client_errors for part in parts),
        server_errors=sum(part.server_errors for part in parts),
        timeouts=sum(part.timeouts for part in parts),
        shed=sum(part.shed for part in parts),
        latency=merged(part.latency for part in parts),
    )


def baseline(windows: Iterable[Observation]) -> Baseline:
    """What the stable was like in these windows: those of up to BASELINE_S seconds before a step."""
    seen = [each.stable for each in windows if each.stable is not None]
    # Where users are counted, they are what is judged.
    tallies: list[Tally] = [each.users or each for each in seen]
    latency = merged(tally.latency for tally in tallies)
    answers = sum(latency.values())
    counters: dict[str, int] = {}
    for each in seen:
        for name, count in each.counters.items():
            counters[name] = counters.get(name, 0) + min(count, trials.judged(each))
    return Baseline(
        p95=quantile_bucket(latency, 0.95) if answers >= _FOR_P95 else None,
        p99=quantile_bucket(latency, 0.99) if answers >= _FOR_P99 else None,
        answers=answers,
        errors=Counts(sum(tally.errors for tally in tallies), sum(map(trials.judged, tallies))),
        refused=Counts(sum(tally.client_errors for tally in tallies), sum(map(trials.judged, tallies))),
        requests=sum(map(trials.judged, seen)),
        counters=tuple(sorted(counters.items())),
    )


# --- evidence ---------------------------------------------------------------------------------------------------------


def fresh() -> Evidence:
    """No evidence at all."""
    return Evidence()


def entered(evidence: Evidence, stage: Stage, second: int, baseline: Baseline) -> Evidence:
    """The evidence when the mesh acknowledged the stage's share in this second. What is counted by share begins anew;
    what speaks for and against the version goes on, because each window is a comparison by itself. What `baseline`
    does not know stays as it was known before."""
    known = _known(evidence.baseline, baseline)
    second = max(second, evidence.second)
    return Evidence(second=second, entered=second, active=second, baseline=known, trials=evidence.trials)


def learned(evidence: Evidence, windows: Iterable[Observation]) -> Evidence:
    """The evidence with the percentiles of these windows, if too little was known of the stable when the step began.
    What is measured by them comes later, so nothing is judged by what it was chosen by."""
    if evidence.baseline.p95 is not None:
        return evidence
    return replace(evidence, baseline=_known(evidence.baseline, baseline(windows)))


def _known(before: Baseline, now: Baseline) -> Baseline:
    if now.answers < _FOR_P95 and now.answers <= before.answers:
        return before
    p95, p99 = (old if new is None else new for old, new in ((before.p95, now.p95), (before.p99, now.p99)))
    return replace(now, p95=p95, p99=p99)


def observe(evidence: Evidence, seen: Observation, stage: Stage, policy: Policy) -> Evidence:
    """The evidence after a window. One that is not later than the last changes nothing; silence is only time."""
    if seen.second <= evidence.second:
        return evidence
    seen = _alike(seen)
    candidate, stable, shadow = seen.candidate, seen.stable, seen.shadow
    after = replace(evidence, second=seen.second)
    if candidate is not None or stable is not None:
        # Silence must not make anything look better, nor let anything be forgotten.
        came = candidate is not None and candidate.requests > 0
        after = replace(
            after,
            active=seen.second if came else evidence.active,
            requests=evidence.requests + (0 if candidate is None else trials.judged(candidate)),
            trials=_tried(evidence, seen, stage, policy),
            recent=_recent(evidence, seen, policy),
        )
    if stage.kind is Kind.SHADOW and shadow is not None:
        after = _shadowed(after, shadow, stable, policy)
    if is_split(stage) and seen.second > evidence.entered + _settling_s(evidence.baseline):
        after = _split(after, candidate, stable, stage, policy)
    return after


def _alike(seen: Observation) -> Observation:
    """The window with the users of both versions, or of neither: users beside requests are no comparison."""
    both = [each for each in (seen.candidate, seen.stable) if each is not None and each.requests]
    if len({each.users is None for each in both}) <= 1:
        return seen
    ours, theirs = (each and each.model_copy(update={"users": None}) for each in (seen.candidate, seen.stable))
    return replace(seen, candidate=ours, stable=theirs)


def _tried(evidence: Evidence, seen: Observation, stage: Stage, policy: Policy) -> dict[str, Trial]:
    after = dict(evidence.trials)
    percentiles = {SLOW_P95: evidence.baseline.p95, SLOW_P99: evidence.baseline.p99}
    for kind, comparison in trials.kinds(policy).items():
        percentile = percentiles.get(kind)
        past = None
        if stage.kind is Kind.ALL:
            past = trials.past_limit(_before(kind, evidence.baseline), comparison, trials.level(policy))
        after[kind] = after.get(kind, Trial()).seen(
            trials.counted(kind, seen.candidate, policy, percentile),
            trials.counted(kind, seen.stable, policy, percentile),
            comparison,
            past,
        )
    return after


def _before(kind: str, known: Baseline) -> Counts:
    """The stable's bad answers before the step; beyond a percentile are those that define it, with `slack` fewer."""
    if kind == ERRORS:
        return known.errors
    if kind == REFUSED:
        return known.refused
    if kind == SLOW_P95:
        return Counts(ceil(0.05 * known.answers), known.answers if known.p95 is not None else 0)
    if kind == SLOW_P99:
        return Counts(ceil(0.01 * known.answers), known.answers if known.p99 is not None else 0)
    return Counts(dict(known.counters).get(kind.removeprefix("counter_"), 0), known.requests)


def _shadowed(evidence: Evidence, shadow: ShadowWindow, stable: VersionWindow | None, policy: Policy) -> Evidence:
    pairs = shadow.agreed + shadow.disagreed
    if pairs + shadow.failed == 0:
        return evidence
    errors = evidence.trials.get(trials.SHADOW_ERRORS, Trial()).seen(
        Counts(shadow.failed, pairs + shadow.failed),
        None if stable is None else Counts(stable.errors, trials.judged(stable)),
        policy.judge.errors,
    )
    labels = evidence.trials.get(trials.SHADOW_LABELS, Trial()).paired(
        shadow.only_stable_right, shadow.only_shadow_right
    )
    after = evidence.trials | {trials.SHADOW_ERRORS: errors, trials.SHADOW_LABELS: labels}
    shadowed = evidence.shadowed.plus(Counts(shadow.disagreed, pairs))
    return replace(
        evidence, active=evidence.second, requests=evidence.requests + pairs, shadowed=shadowed, trials=after
    )


def is_split(stage: Stage) -> bool:
    return stage.kind is Kind.SPLIT and 0 < stage.percent < 100


def _settling_s(known: Baseline) -> int:
    """How long answers still come that were asked for before the step, by the stable's slowest."""
    slowest = known.p95 if known.p99 is None else known.p99
    return 1 if slowest is None else min(60, 1 + int(milliseconds_of(slowest) / 1e3))


def _split(
    evidence: Evidence, candidate: VersionWindow | None, stable: VersionWindow | None, stage: Stage, policy: Policy
) -> Evidence:
    """The evidence after how this window was split."""
    ours, theirs = (0 if each is None else trials.heads(each, policy).requests for each in (candidate, stable))
    if ours + theirs == 0:
        return evidence
    if not policy.sticky:
        return replace(evidence, split=(evidence.split[0] + ours, evidence.split[1] + theirs))
    # The same users come again and again, so windows are no new evidence: each is weighed with a part of one.
    count = evidence.split_windows + 1
    seen = exp(min(log_mismatch(ours, theirs, stage.percent / 100), 600.0)) / (count * (count + 1))
    return replace(evidence, split_windows=count, mismatch=min(evidence.mismatch + seen, 1e300))


def _recent(evidence: Evidence, seen: Observation, policy: Policy) -> tuple[Recent, ...]:
    limits = policy.limits
    kept = [each for each in evidence.recent if each.second > seen.second - limits.window_s]
    bucket = None if limits.max_p99_ms is None else bucket_of(limits.max_p99_ms / 1e3)

    def of(window: VersionWindow | None) -> tuple[Counts, Counts]:
        if window is None:
            return NONE, NONE
        slow = NONE if bucket is None else Counts(count_above(window.latency, bucket), sum(window.latency.values()))
        return Counts(window.errors, trials.judged(window)), slow

    return (*kept, Recent(seen.second, *of(seen.candidate), *of(seen.stable)))


# --- kept -------------------------------------------------------------------------------------------------------------


def to_json(evidence: Evidence) -> dict[str, Any]:
    """The evidence as JSON has it; `from_json` makes exactly the same of it."""
    return asdict(evidence)


def from_json(data: Mapping[str, Any]) -> Evidence:
    """The evidence that `to_json` wrote, in this release or another: what it does not hold is as at the beginning, what
    nobody knows any more is left out. Raises Invalid when something in it is of a wrong type."""
    try:
        # Only as JSON do lists pass for tuples where types are strict.
        return _STORED.validate_json(pydantic_core.to_json(data), strict=True)
    except (ValidationError, pydantic_core.PydanticSerializationError) as error:
        raise Invalid(f"this is no evidence of a rollout: {error}") from error
