"""The judge: what a rollout should do after each second of traffic, from counts alone. Pure, and the same in a replay.

A version is taken back on proof of harm, goes on with proof of none, and else waits. Both are e-processes, so one may
look after every window. The stable's counts of the same second are the measure, so what befalls both accuses neither.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import log

from lepton.policies import Policy
from lepton.rollouts import Action, Gate, GateState, Verdict
from lepton_common.events import WindowClosed

from lepton_rollout import trials
from lepton_rollout.bets import interval, log_mismatch
from lepton_rollout.evidence import (
    BASELINE_S,
    Baseline,
    Evidence,
    Observation,
    baseline,
    entered,
    fresh,
    from_json,
    is_split,
    learned,
    observation,
    observe,
    to_json,
)
from lepton_rollout.policy import Kind, Stage, stages
from lepton_rollout.trials import NONE, Trial

# The judge's whole page: who uses it needs no other.
__all__ = [
    "BASELINE_S",
    "Baseline",
    "Evidence",
    "Observation",
    "baseline",
    "entered",
    "fresh",
    "from_json",
    "interval",
    "judge",
    "learned",
    "observation",
    "observe",
    "replay",
    "replayed",
    "to_json",
]

# A version without a request for so long is not let on, whatever was seen before.
QUIET_S = 30
# Evidence at which the split is held not to have taken effect.
_MISMATCH = 100.0


def judge(evidence: Evidence, stage: Stage, policy: Policy) -> Verdict:
    """What to do now, by everything seen so far. STEP is the only word that lets the version's share grow.

    Reasons to wait carry no numbers that change from second to second: those are in the gates.
    """
    if stage.kind is Kind.ALL and not stage.bake:
        return Verdict(action=Action.STEP, reason="takes all traffic without judgement", second=evidence.second)
    limits, stable = _limits(evidence, policy)
    harms = [*_harms(evidence, stage, policy), limits]
    # Somebody should look when the stable is sick, and when the split did not take effect: so a version looks that
    # keeps its callers waiting until they leave. Nobody is taken back for it, since it may be the mesh's doing.
    alarms = [stable, *_split(evidence, stage, policy)]
    gates = [*harms, *alarms, *_progress(evidence, stage), *_proofs(evidence, stage, policy)]
    failed = next((gate for gate in harms if gate.state is GateState.FAILED), None)
    alarm = next((gate for gate in alarms if gate.state is not GateState.PASSED), None)
    waiting = alarm or next((gate for gate in gates if gate.state is not GateState.PASSED), None)
    if failed is not None:
        action, reason = Action.ROLL_BACK, failed.detail
    elif waiting is not None:
        action, reason = Action.HOLD, waiting.detail
    else:
        action, reason = Action.STEP, "proven to be no worse" if stage.prove else "no proof of harm"
    # And somebody should look when the evidence can say nothing: it is no number, or there is nothing to compare with.
    unknown = waiting in harms and waiting is not None and not waiting.numbers
    page = failed is None and (unknown or alarm is not None)
    return Verdict(action=action, reason=reason, second=evidence.second, page=page, gates=gates)


def replay(
    windows: Sequence[WindowClosed],
    candidate: int,
    stable: int | None,
    policy: Policy,
    first_entered: int,
    baseline: Baseline,
) -> list[tuple[int, Stage, Verdict]]:
    """What this policy would have said of these windows: every second on which it changed its mind, and the last one.

    It goes on to the next stage in the second of its STEP and ends with ROLL_BACK, with its last STEP, or with the
    windows. How the traffic was really split is not its doing, so that is not judged.
    """
    way = stages(policy, first=stable is None)
    said: list[tuple[int, Stage, Verdict]] = []
    number, seen = 0, list[Observation]()
    evidence = entered(fresh(), way[0], first_entered, baseline)
    last: tuple[int, Stage, Verdict] | None = None
    for window in windows:
        if window.second <= evidence.second:
            continue
        stage = way[number]
        as_is = replace(stage, kind=Kind.MATCH) if is_split(stage) else stage
        seen.append(observation(window, candidate, stable))
        evidence = learned(observe(evidence, seen[-1], as_is, policy), _recent(seen, window.second))
        last = (window.second, stage, judge(evidence, as_is, policy))
        if not said or said[-1][1] != stage or _changed(said[-1][2], last[2]):
            said.append(last)
        if last[2].action is Action.ROLL_BACK or (last[2].action is Action.STEP and number + 1 == len(way)):
            break
        if last[2].action is Action.STEP:
            number += 1
            evidence = _onward(evidence, way[number], window.second, seen)
    if last is not None and said[-1] is not last:
        said.append(last)
    return said


def replayed(
    windows: Sequence[WindowClosed], candidate: int, stable: int | None, policy: Policy, started: int
) -> list[tuple[int, Stage, Verdict]]:
    """What `replay` says of a rollout that started in that second: the windows before it are its baseline, and its
    first step begins with the first later one that holds anything of the candidate."""
    before = [observation(each, candidate, stable) for each in windows if each.second < started]
    judged = [each for each in windows if each.second >= started]
    first = next((each.second for each in judged if _holds(each, candidate)), started) - 1
    return replay(judged, candidate, stable, policy, first, baseline(before))


def _holds(window: WindowClosed, version: int) -> bool:
    shadowed = window.shadow is not None and window.shadow.version == version
    return shadowed or any(each.version == version and each.requests for each in window.versions)


def _onward(evidence: Evidence, stage: Stage, second: int, seen: Sequence[Observation]) -> Evidence:
    return entered(evidence, stage, second, baseline(_recent(seen, second)))


def _recent(seen: Sequence[Observation], second: int) -> list[Observation]:
    return [each for each in seen if each.second > second - BASELINE_S]


def _changed(before: Verdict, now: Verdict) -> bool:
    return (before.action, before.reason, before.page) != (now.action, now.reason, now.page)


# --- harm -------------------------------------------------------------------------------------------------------------


def _harms(evidence: Evidence, stage: Stage, policy: Policy) -> list[Gate]:
    part = trials.level(policy)
    kinds = [*trials.kinds(policy)]
    kinds += [kind for kind in (trials.SHADOW_ERRORS, trials.SHADOW_LABELS) if kind in evidence.trials]
    gates = [trials.harm(kind, evidence.trials.get(kind, Trial()), part) for kind in kinds]
    if stage.kind is Kind.ALL and not _bounded(evidence, policy):
        detail = "errors: nothing is known of the stable's, and no limit is set; a person must say"
        unknown = Gate(name=trials.ERRORS, state=GateState.WAITING, detail=detail)
        gates = [unknown if _is_open(gate) else gate for gate in gates]
    return gates


def _bounded(evidence: Evidence, policy: Policy) -> bool:
    """Whether anything says how many errors are too many of a version that has all traffic: the past or a limit. For
    other kinds there need not be: unknown latencies and refusals are no failures."""
    past = trials.past_limit(evidence.baseline.errors, policy.judge.errors, trials.level(policy))
    return past is not None or policy.limits.max_error_ratio is not None


def _is_open(gate: Gate) -> bool:
    return gate.name == trials.ERRORS and gate.state is GateState.PASSED


def _limits(evidence: Evidence, policy: Policy) -> tuple[Gate, Gate]:
    """The absolute limits: of the candidate, which fail, and of the stable, which make everything wait.

    With both versions beyond a limit it is not the candidate's doing, unless it is proven to be worse.
    """
    ours = _breach(evidence, policy, of_stable=False)
    theirs = _breach(evidence, policy, of_stable=True) or _sick(evidence, policy)
    if ours and not theirs:
        limits = Gate(name="limits", state=GateState.FAILED, detail=f"limits: {ours} of the version's requests")
    else:
        kept = "the stable is beyond them as well" if ours else "kept, as far as any is set"
        limits = Gate(name="limits", state=GateState.PASSED, detail=f"limits: {kept}")
    if theirs:
        return limits, Gate(name="stable", state=GateState.WAITING, detail=f"the stable itself is sick: {theirs}")
    return limits, Gate(name="stable", state=GateState.PASSED, detail="the stable is well")


def _breach(evidence: Evidence, policy: Policy, *, of_stable: bool) -> str:
    """Which limit one of the versions is beyond; empty for none, or when there are too few requests to say."""
    limits, errors, slow = policy.limits, NONE, NONE
    if limits.max_error_ratio is None and limits.max_p99_ms is None:
        return ""
    for each in evidence.recent:
        errors = errors.plus(each.stable if of_stable else each.candidate)
        slow = slow.plus(each.stable_slow if of_stable else each.candidate_slow)
    if errors.of < limits.min_requests:
        return ""
    if limits.max_error_ratio is not None and not errors.bad <= limits.max_error_ratio * errors.of:
        return f"more than {limits.max_error_ratio:g} errors"
    # Of a hundred answers the slowest is the 99th percentile: one bad moment is no breach, so the interval decides.
    if limits.max_p99_ms is not None and not interval(slow.bad, slow.of)[0] <= 0.01:
        return f"more than 1 in 100 slower than {limits.max_p99_ms:g} ms"
    return ""


def _sick(evidence: Evidence, policy: Policy) -> str:
    """Whether the stable fails far more often than before the step, although no limit says what is too often."""
    bad, of = sum([each.stable.bad for each in evidence.recent]), sum([each.stable.of for each in evidence.recent])
    limit = trials.past_limit(evidence.baseline.errors, policy.judge.errors, trials.level(policy))
    if of < policy.limits.min_requests or limit is None or not interval(bad, of)[0] > limit:
        return ""
    return "it fails far more often than before this step"


# --- what a step waits for --------------------------------------------------------------------------------------------


def _split(evidence: Evidence, stage: Stage, policy: Policy) -> list[Gate]:
    """Whether the traffic is really split as the stage has it. Harm is proven whatever the split was; but nothing is
    proven to be well while it is unknown who answered what."""
    if not is_split(stage):
        return []
    if policy.sticky:
        against = 0.0 if evidence.mismatch == 0 else log(evidence.mismatch)
    else:
        against = log_mismatch(*evidence.split, stage.percent / 100)
    numbers = {"share": stage.percent / 100, "log_evidence": against, "log_needed": log(_MISMATCH)}
    if evidence.split != (0, 0):
        numbers["seen"] = evidence.split[0] / (evidence.split[0] + evidence.split[1])
    if against < log(_MISMATCH):
        return [
            Gate(name="split", state=GateState.PASSED, detail="the split took effect", numbers=trials.finite(numbers))
        ]
    return [
        Gate(
            name="split",
            state=GateState.WAITING,
            detail="the split did not take effect",
            numbers=trials.finite(numbers),
        )
    ]


def _progress(evidence: Evidence, stage: Stage) -> list[Gate]:
    """Traffic, time and, of a shadow, agreement."""
    # A version that is reachable by number only is not expected to have traffic.
    preview = stage.kind is Kind.SPLIT and stage.percent == 0
    until = evidence.second if preview else evidence.active
    elapsed = until - evidence.entered if evidence.entered >= 0 else 0
    gates = [] if preview else [_traffic(evidence, stage)]
    passed = elapsed >= stage.dwell_s
    state = GateState.PASSED if passed else GateState.WAITING
    detail = f"{'was' if passed else 'waits until it was'} watched for {stage.dwell_s:g} s at this share"
    numbers = trials.finite({"elapsed_s": float(elapsed), "needed_s": stage.dwell_s})
    return [*gates, Gate(name="dwell", state=state, detail=detail, numbers=numbers)]


def _traffic(evidence: Evidence, stage: Stage) -> Gate:
    needed, quiet = max(1, stage.min_requests), evidence.second - evidence.active
    numbers = {"requests": float(evidence.requests), "needed": float(needed), "quiet_s": float(quiet)}
    what = "compared answers" if stage.kind is Kind.SHADOW else "requests"
    if evidence.requests == 0:
        return Gate(
            name="traffic",
            state=GateState.WAITING,
            detail=f"waits for its first {what}",
            numbers=trials.finite(numbers),
        )
    if not quiet <= QUIET_S:
        return Gate(
            name="traffic", state=GateState.WAITING, detail=f"waits for {what} again", numbers=trials.finite(numbers)
        )
    passed = evidence.requests >= needed
    state = GateState.PASSED if passed else GateState.WAITING
    detail = f"{'had' if passed else 'waits for'} {needed} {what} at this share"
    return Gate(name="traffic", state=state, detail=detail, numbers=trials.finite(numbers))


def _proofs(evidence: Evidence, stage: Stage, policy: Policy) -> list[Gate]:
    if stage.kind is Kind.SHADOW:
        return [_agreement(evidence, policy.shadow.min_agreement)]
    if not stage.prove:
        return []
    kinds = [kind for kind in trials.kinds(policy) if trials.proves(kind)]
    return [trials.proof(kind, evidence.trials.get(kind, Trial()), policy.judge.beta) for kind in kinds]


def _agreement(evidence: Evidence, least: float) -> Gate:
    """The plain ratio, as the policy has it: other answers need not be worse ones, copies harm nobody, and harm is
    tested by itself."""
    seen = evidence.shadowed
    low, high = interval(seen.of - seen.bad, seen.of)
    numbers = {"pairs": float(seen.of), "agreed": float(seen.of - seen.bad), "low": low, "high": high, "needed": least}
    passed = seen.of > 0 and seen.of - seen.bad >= least * seen.of
    state = GateState.PASSED if passed else GateState.WAITING
    detail = f"{'' if passed else 'waits until '}{least:.0%} of its answers agree with the stable's"
    return Gate(name="agreement", state=state, detail=detail, numbers=trials.finite(numbers))
