import json
from collections.abc import Callable
from dataclasses import replace
from math import nan
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lepton.policies import Comparison, Judging, Limits, Policy
from lepton.rollouts import Action, GateState
from lepton_common.errors import Invalid
from lepton_common.events import ShadowWindow, WindowClosed
from lepton_rollout.bets import Bet
from lepton_rollout.judge import (
    Baseline,
    Observation,
    baseline,
    entered,
    fresh,
    from_json,
    judge,
    observation,
    observe,
    replay,
    replayed,
    to_json,
)
from lepton_rollout.policy import Stage
from lepton_rollout.trials import ERRORS, Counts, Trial

from .judging import (
    BAKE,
    BEFORE,
    BEGIN,
    CANDIDATE,
    FAST,
    PROVING,
    SLOWEST,
    SPLIT,
    STABLE,
    after,
    arm,
    closed,
    gate,
    good,
    second,
    verdict,
)

# --- steps ------------------------------------------------------------------------------------------------------------


def test_a_new_step_counts_anew_and_remembers_harm_and_proof() -> None:
    before = after(second(BEGIN + at, ours=(10, 1)) for at in range(1, 10))
    now = entered(before, replace(SPLIT, number=1, percent=25.0), BEGIN + 12, Baseline())
    assert (now.requests, now.split, now.entered, now.recent) == (0, (0, 0), BEGIN + 12, ())
    assert (now.trials, now.baseline) == (before.trials, BEFORE)


def test_seconds_up_to_the_meshs_acknowledgement_are_ignored() -> None:
    evidence = entered(fresh(), SPLIT, BEGIN, BEFORE)
    assert observe(evidence, second(BEGIN, ours=(10, 10)), SPLIT, Policy()) == evidence


def test_what_is_slow_is_frozen_at_the_step() -> None:
    faster = baseline([Observation(1, stable=arm(STABLE, 1000))])
    assert entered(after([]), SPLIT, BEGIN, faster).baseline == faster
    too_few = baseline([Observation(1, stable=arm(STABLE, 50))])
    assert (too_few.p95, too_few.p99) == (None, None)
    assert entered(after([]), SPLIT, BEGIN, too_few).baseline == BEFORE


# --- what must never happen -------------------------------------------------------------------------------------------

COUNTS = st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda pair: (max(pair), min(pair)))
WINDOWS = st.lists(
    st.builds(second, st.integers(BEGIN + 1, BEGIN + 40), COUNTS, COUNTS, st.just((0, 0))), max_size=30
).map(lambda windows: sorted(windows, key=lambda each: each.second))


@settings(max_examples=40)
@given(WINDOWS, st.randoms(use_true_random=False))
def test_repeated_and_reordered_windows_change_nothing(windows: list[Observation], chance: Random) -> None:
    once: list[Observation] = []
    for window in windows:
        if not once or window.second > once[-1].second:
            once.append(window)
    again = [each for window in once for each in (window,) * chance.randint(1, 3)]
    late = [each for index, window in enumerate(once) for each in (window, *once[: chance.randint(0, index)])]
    assert after(once) == after(again) == after(late)


@given(WINDOWS, st.sets(st.integers(BEGIN + 41, BEGIN + 200), max_size=4))
def test_silence_promotes_nobody_and_takes_nobody_back(windows: list[Observation], silent: set[int]) -> None:
    for stage in (SPLIT, PROVING, BAKE):
        evidence = after(windows, stage)
        said = judge(evidence, stage, Policy())
        for at in sorted(silent):
            evidence = observe(evidence, Observation(at), stage, Policy())
            now = judge(evidence, stage, Policy())
            assert now.action is said.action or (said.action is Action.STEP and now.action is Action.HOLD)


def test_a_version_that_has_fallen_silent_does_not_go_on() -> None:
    evidence = observe(after(good(10)), Observation(BEGIN + 41), SPLIT, Policy())
    assert judge(evidence, SPLIT, Policy()).reason == "waits for requests again"


@given(WINDOWS)
def test_nothing_goes_on_without_time_traffic_and_proof(windows: list[Observation]) -> None:
    evidence = after(windows, PROVING)
    if judge(evidence, PROVING, Policy()).action is Action.STEP:
        seen = [each for each in windows if each.candidate]
        assert seen[-1].second - BEGIN >= PROVING.dwell_s
        assert evidence.requests >= PROVING.min_requests
        assert all(evidence.trials[kind].proof >= 20 for kind in ("errors", "slow_p95"))


@given(WINDOWS)
def test_evidence_survives_json(windows: list[Observation]) -> None:
    policy = Policy(counters={"refusals": Comparison()}, limits=Limits(max_error_ratio=0.5, max_p99_ms=100))
    evidence = after(windows, BAKE, policy)
    assert from_json(json.loads(json.dumps(to_json(evidence), allow_nan=False))) == evidence


def test_evidence_of_another_release_keeps_what_it_knows() -> None:
    limits = Policy(limits=Limits(max_error_ratio=0.5))
    evidence = after([second(BEGIN + at, ours=(10, at % 2)) for at in range(1, 9)], policy=limits)
    stored = json.loads(json.dumps(to_json(evidence)))
    # As before requests that were refused, splits of users, and the time before were counted.
    for where, name in [
        (stored["baseline"], "refused"),
        (stored, "mismatch"),
        (stored["trials"], "refused"),
        *((each, "past") for each in stored["trials"].values() if "past" in each),
        *((each, "stable_slow") for each in stored["recent"]),
    ]:
        del where[name]
    assert from_json(stored) == replace(
        evidence,
        baseline=replace(evidence.baseline, refused=Counts()),
        trials={name: each for name, each in evidence.trials.items() if name != "refused"},
    )
    # As after something was counted that is not yet.
    for where in (stored, stored["baseline"], stored["trials"][ERRORS], stored["trials"][ERRORS]["worse"]):
        where["dreams"] = {"sheep": 3}
    assert from_json(stored).trials[ERRORS] == evidence.trials[ERRORS]
    assert from_json({}) == fresh()


# A database that keeps JSON's numbers as decimals writes large ones without a point.
def test_large_numbers_of_stored_evidence_may_lack_their_point() -> None:
    evidence = replace(fresh(), mismatch=1e300)
    assert from_json(to_json(evidence) | {"mismatch": 10**300}) == evidence


WRONG: list[dict[str, object]] = [
    {"trials": 3},
    {"second": None},
    {"second": "1"},
    {"second": 1.5},
    {"split": [1]},
    {"split": {"0": 1}},
    {"baseline": None},
    {"baseline": {"refused": 3}},
    {"trials": {"errors": {"worse": {"logs": "0.5"}}}},
    {"trials": {"errors": {"candidate": {"bad": True}}}},
    {"recent": [{"candidate": {}}]},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_what_is_no_evidence_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(Invalid, match="no evidence of a rollout"):
        from_json(to_json(fresh()) | wrong)


BROKEN = Bet((nan,) * 10, 5, nan, nan)


@pytest.mark.parametrize("broken", [{"worse": BROKEN}, {"past": BROKEN}, {"no_worse": BROKEN}, {"low": BROKEN}])
def test_evidence_that_is_not_a_number_stops_everything(broken: dict[str, Bet]) -> None:
    evidence = after(good(90), PROVING)
    trial = replace(evidence.trials[ERRORS], **broken)  # type: ignore[arg-type]  # wrong on purpose
    found = judge(replace(evidence, trials={**evidence.trials, ERRORS: trial}), PROVING, Policy())
    assert found.action is Action.HOLD
    assert found.page is bool({"worse", "past"} & broken.keys())


@pytest.mark.parametrize("stage", [replace(SPLIT, dwell_s=nan), replace(SPLIT, percent=nan, min_requests=10**6)])
def test_a_stage_that_is_not_a_number_is_never_left(stage: Stage) -> None:
    assert verdict(good(90), stage).action is Action.HOLD


def test_a_mismatch_that_is_not_a_number_stops_everything() -> None:
    policy = Policy(sticky="x-user")
    evidence = replace(after(good(20)), mismatch=nan)
    assert gate(judge(evidence, SPLIT, policy), "split").state is GateState.WAITING


# --- windows ----------------------------------------------------------------------------------------------------------


def test_forced_requests_are_left_out_and_pools_are_added_up() -> None:
    window = closed(
        7,
        arm(STABLE, 90, pool="cpu"),
        arm(CANDIDATE, 10, 1, pool="cpu", counters={"refusals": 1}),
        arm(CANDIDATE, 20, 2, 3, pool="gpu", counters={"refusals": 2}),
        arm(CANDIDATE, 5, 5, pool="gpu", forced=True),
        arm(3, 100),
    )
    seen = observation(window, CANDIDATE, STABLE)
    assert seen.candidate is not None
    assert seen.stable == arm(STABLE, 90, pool="cpu")
    assert (seen.candidate.requests, seen.candidate.errors) == (30, 3)
    assert seen.candidate.latency == {FAST: 24, SLOWEST: 3}
    assert seen.candidate.counters == {"refusals": 3}
    assert observation(window, 4, None) == Observation(7)


def test_a_shadow_of_another_version_is_not_seen() -> None:
    shadow = ShadowWindow(version=9, agreed=5)
    assert observation(closed(7, shadow=shadow), CANDIDATE, STABLE).shadow is None
    assert observation(closed(7, shadow=shadow), 9, STABLE).shadow == shadow


def windows_of(seconds: int, errors: Callable[[int], tuple[int, int]]) -> list[WindowClosed]:
    """Windows with so many errors of the candidate and of the stable."""
    return [
        closed(BEGIN + at, arm(CANDIDATE, 10, errors(at)[0]), arm(STABLE, 90, errors(at)[1]))
        for at in range(1, seconds + 1)
    ]


def test_a_replay_says_how_far_another_policy_would_have_come() -> None:
    quick = Policy(steps=[5.0, 50.0], dwell_s=5, min_requests=20, bake_s=5)
    said = replay(windows_of(200, lambda at: (0, 0)), CANDIDATE, STABLE, quick, BEGIN, BEFORE)
    steps = [(stage.number, found.action) for _, stage, found in said if found.action is Action.STEP]
    assert steps == [(0, Action.STEP), (1, Action.STEP), (2, Action.STEP)]
    assert said[0][2].action is Action.HOLD
    assert said[-1][0] < BEGIN + 200


def test_a_replay_ends_when_its_policy_takes_the_version_back() -> None:
    windows = windows_of(200, lambda at: (5, 9) if at > 50 else (0, 0))
    said = replay(windows, CANDIDATE, STABLE, Policy(), BEGIN, BEFORE)
    assert said[-1][2].action is Action.ROLL_BACK
    assert BEGIN + 50 < said[-1][0] < BEGIN + 60
    tolerant = Policy(judge=Judging(errors=Comparison(tolerated=100, margin=100)))
    said = replay(windows, CANDIDATE, STABLE, tolerant, BEGIN, BEFORE)
    assert (said[-1][0], said[-1][2].action) == (BEGIN + 200, Action.HOLD)


def test_a_replay_of_nothing_says_nothing() -> None:
    assert replay([], CANDIDATE, STABLE, Policy(), BEGIN, BEFORE) == []
    assert replayed([], CANDIDATE, STABLE, Policy(), BEGIN) == []


def test_a_rollout_is_replayed_by_the_seconds_before_it_and_from_the_candidates_first_on() -> None:
    before = [closed(BEGIN - 200 + at, arm(STABLE, 100, at % 2)) for at in range(200)]
    loading = [closed(BEGIN + at, arm(STABLE, 100), arm(CANDIDATE, 0)) for at in range(30)]
    shadowed = closed(BEGIN + 30, arm(STABLE, 100), shadow=ShadowWindow(version=CANDIDATE, agreed=9))
    both = [closed(BEGIN + 30 + at, arm(CANDIDATE, 10), arm(STABLE, 90)) for at in range(1, 60)]
    past = baseline([observation(each, CANDIDATE, STABLE) for each in before])
    quick = Policy(steps=[10.0], dwell_s=20, min_requests=20)
    for judged, first in ((both, BEGIN + 30), ([shadowed, *both], BEGIN + 29)):
        after_start = [*loading, *judged]
        said = replayed([*before, *after_start], CANDIDATE, STABLE, quick, BEGIN)
        assert said == replay(after_start, CANDIDATE, STABLE, quick, first, past)
        assert said[0][0] == first + 1


def test_what_never_had_its_candidate_is_replayed_from_its_start() -> None:
    windows = [closed(BEGIN + at, arm(STABLE, 100)) for at in range(5)]
    said = replayed(windows, CANDIDATE, STABLE, Policy(), BEGIN)
    assert [each[0] for each in said] == [BEGIN, BEGIN + 4]


def test_a_trial_without_windows_is_no_evidence() -> None:
    assert (Trial().proof, Trial().worse.value) == (1, 1)
