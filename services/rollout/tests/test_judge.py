from dataclasses import replace

import numpy as np
import pytest
from lepton.policies import PRESETS, Comparison, Judging, Limits, Policy, Strategy
from lepton.rollouts import Action, GateState
from lepton_common.events import VersionWindow
from lepton_rollout.judge import (
    Baseline,
    Observation,
    baseline,
    fresh,
    judge,
    observe,
    replay,
)
from lepton_rollout.policy import Kind, stages
from lepton_rollout.trials import Counts

from .judging import (
    BAKE,
    BEGIN,
    CANDIDATE,
    PROVING,
    SPLIT,
    STABLE,
    after,
    arm,
    closed,
    gate,
    good,
    second,
    seconds_until,
    verdict,
)

# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_version_goes_on_after_its_time_and_traffic() -> None:
    found = verdict(good(10))
    assert (found.action, found.second, found.page) == (Action.STEP, BEGIN + 10, False)


def test_it_waits_for_its_time() -> None:
    found = verdict(second(BEGIN + at, ours=(50, 0), theirs=(450, 0)) for at in range(1, 10))
    assert found.action is Action.HOLD
    assert gate(found, "dwell").state is GateState.WAITING
    assert gate(found, "traffic").state is GateState.PASSED


def test_it_waits_for_its_traffic() -> None:
    found = verdict(second(BEGIN + at, ours=(1, 0), theirs=(9, 0)) for at in range(1, 40))
    assert (found.action, found.reason) == (Action.HOLD, "waits for 100 requests at this share")
    assert gate(found, "dwell").state is GateState.PASSED


def test_requests_that_were_shed_are_no_traffic_and_no_error() -> None:
    shed = VersionWindow(version=CANDIDATE, shed=50)
    found = verdict(Observation(BEGIN + at, shed, arm(STABLE, 450)) for at in range(1, 40))
    assert (found.action, found.reason) == (Action.HOLD, "waits for its first requests")


def test_a_version_without_errors_is_proven_by_its_own_ratio() -> None:
    early, late = verdict(good(20), PROVING), verdict(good(90), PROVING)
    assert (early.action, gate(early, "proof_errors").state) == (Action.HOLD, GateState.WAITING)
    assert (late.action, late.reason) == (Action.STEP, "proven to be no worse")
    numbers = gate(late, "proof_errors").numbers
    assert numbers["no_worse"] == 1 < numbers["low"]


def test_a_version_with_as_many_errors_as_the_stable_is_proven_by_the_comparison() -> None:
    policy = Policy(judge=Judging(errors=Comparison(acceptable=0.001)))
    rng = np.random.default_rng(3)
    windows = [
        second(BEGIN + at, (50, int(rng.binomial(50, 0.02))), (50, int(rng.binomial(50, 0.02)))) for at in range(1, 200)
    ]
    found = verdict(windows, replace(PROVING, percent=50), policy)
    assert found.action is Action.STEP
    numbers = gate(found, "proof_errors").numbers
    assert numbers["low"] < 1 < numbers["no_worse"]


def test_a_stage_that_is_not_judged_takes_all_traffic_at_once() -> None:
    [stage] = stages(Policy(), first=True)
    assert judge(fresh(), stage, Policy()).action is Action.STEP


def test_reachable_by_number_only_needs_no_traffic_but_time() -> None:
    preview = stages(Policy(strategy=Strategy.BLUE_GREEN, dwell_s=5), first=False)[0]
    windows = [second(BEGIN + at, ours=(0, 0)) for at in range(1, 6)]
    assert verdict(windows[:4], preview).action is Action.HOLD
    assert verdict(windows, preview).action is Action.STEP


# --- harm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [Policy(), PRESETS["fast"], PRESETS["careful"]], ids=["default", "fast", "careful"])
def test_a_version_that_only_fails_is_taken_back_within_five_seconds(policy: Policy) -> None:
    assert seconds_until(Action.ROLL_BACK, lambda at: second(at, ours=(10, 10)), policy=policy) <= 5


@pytest.mark.parametrize("policy", [Policy(), PRESETS["fast"], PRESETS["careful"]], ids=["default", "fast", "careful"])
def test_a_version_that_is_always_slow_is_taken_back_within_five_seconds(policy: Policy) -> None:
    assert seconds_until(Action.ROLL_BACK, lambda at: second(at, slow=(10, 0)), policy=policy) <= 5


def test_one_bad_second_condemns_nobody() -> None:
    found = verdict([*good(5), second(BEGIN + 6, ours=(1000, 1000), theirs=(9000, 0))])
    assert found.action is not Action.ROLL_BACK


def test_a_version_that_goes_bad_after_long_good_service_is_still_taken_back_soon() -> None:
    evidence = after(second(BEGIN + at, (500, 5 * (at % 2)), (500, 5 * (at % 2))) for at in range(1, 1000))
    start = BEGIN + 1000
    for at in range(12):
        evidence = observe(evidence, second(start + at, ours=(10, 10)), SPLIT, Policy())
    assert judge(evidence, SPLIT, Policy()).action is Action.ROLL_BACK


def test_what_befalls_both_versions_accuses_neither() -> None:
    found = verdict(second(BEGIN + at, ours=(10, 5), theirs=(90, 45), slow=(5, 45)) for at in range(1, 120))
    assert found.action is Action.HOLD
    assert gate(found, "errors").state is gate(found, "slow_p95").state is GateState.PASSED


def test_the_reason_names_the_kind_and_its_numbers() -> None:
    found = verdict(second(BEGIN + at, ours=(10, 10)) for at in range(1, 10))
    assert found.reason == "errors: worse than the stable, 90 of 90 against the stable's 0 of 810"
    numbers = gate(found, "errors").numbers
    assert numbers["evidence"] >= numbers["needed"] == pytest.approx(8 / 0.05)


def test_an_own_counter_is_a_gate_like_any_other() -> None:
    policy = Policy(counters={"refusals": Comparison()})
    windows = [
        Observation(BEGIN + at, arm(CANDIDATE, 10, counters={"refusals": 8}), arm(STABLE, 90, counters={"refusals": 1}))
        for at in range(1, 10)
    ]
    found = verdict(windows, policy=policy)
    assert found.action is Action.ROLL_BACK
    assert found.reason.startswith("refusals: worse than the stable")


def test_more_occurrences_than_requests_count_once_a_request() -> None:
    policy = Policy(counters={"tokens": Comparison()})
    windows = [Observation(BEGIN + 1, arm(CANDIDATE, 10, counters={"tokens": 500}), arm(STABLE, 90))]
    assert after(windows, policy=policy).trials["counter_tokens"].candidate == Counts(10, 10)


def test_harm_once_proven_is_not_forgotten() -> None:
    windows = [second(BEGIN + at, ours=(10, 10)) for at in range(1, 10)]
    assert verdict([*windows, *good(300, BEGIN + 10)]).action is Action.ROLL_BACK


def test_the_tolerated_odds_are_tolerated() -> None:
    rng = np.random.default_rng(5)
    windows = [
        second(BEGIN + at, (50, int(rng.binomial(50, 0.18))), (450, int(rng.binomial(450, 0.1))))
        for at in range(1, 150)
    ]
    generous = Policy(judge=Judging(errors=Comparison(tolerated=2.5, margin=4)))
    assert verdict(windows).action is Action.ROLL_BACK
    assert verdict(windows, policy=generous).action is not Action.ROLL_BACK


# --- all traffic ------------------------------------------------------------------------------------------------------


def alone(at: int, requests: int, errors: int, slow: int = 0) -> Observation:
    return second(at, (requests, errors), (0, 0), (slow, 0))


def test_with_all_traffic_a_version_is_compared_with_the_time_before() -> None:
    assert seconds_until(Action.ROLL_BACK, lambda at: alone(at, 100, 50), BAKE) <= 6
    assert seconds_until(Action.ROLL_BACK, lambda at: alone(at, 100, 0, slow=60), BAKE) <= 6


def test_times_that_are_somewhat_worse_are_not_blamed_on_the_version() -> None:
    assert seconds_until(Action.STEP, lambda at: alone(at, 100, 2, slow=3), BAKE) == 10


@pytest.mark.parametrize("errors", [0, 50])
def test_without_a_past_nobody_can_say_how_many_errors_are_too_many_so_a_person_must(errors: int) -> None:
    found = verdict((alone(BEGIN + at, 100, errors) for at in range(1, 20)), BAKE, known=Baseline())
    assert (found.action, found.page) == (Action.HOLD, True)
    assert found.reason == "errors: nothing is known of the stable's, and no limit is set; a person must say"
    assert [each.name for each in found.gates if each.state is not GateState.PASSED] == ["errors"]


def test_without_a_past_a_limit_of_errors_is_enough() -> None:
    policy = limited(max_error_ratio=0.05)
    windows = [[alone(BEGIN + at, 100, errors) for at in range(1, 20)] for errors in (0, 50)]
    found = [verdict(each, BAKE, policy, known=Baseline()).action for each in windows]
    assert found == [Action.STEP, Action.ROLL_BACK]


def test_without_a_past_latencies_need_none() -> None:
    few = baseline([Observation(1, stable=arm(STABLE, 50))])
    assert few.p95 is None
    assert verdict((alone(BEGIN + at, 100, 0, slow=60) for at in range(1, 20)), BAKE, known=few).action is Action.STEP


def test_what_takes_over_from_an_idle_stable_is_not_promoted_by_the_judge() -> None:
    policy = Policy(strategy=Strategy.BLUE_GREEN, dwell_s=5, bake_s=5, min_requests=10)
    idle = [closed(BEGIN + at) for at in range(1, 7)]
    windows = [*idle, *(closed(BEGIN + at, arm(CANDIDATE, 100)) for at in range(7, 600))]
    said = replay(windows, CANDIDATE, STABLE, policy, BEGIN, Baseline())
    assert [found.action for _, stage, found in said if stage.kind is Kind.SPLIT][-1] is Action.STEP
    assert {found.action for _, stage, found in said if stage.kind is Kind.ALL} == {Action.HOLD}


# --- limits -----------------------------------------------------------------------------------------------------------


def limited(**limits: object) -> Policy:
    return Policy(limits=Limits.model_validate(limits))


def test_a_version_beyond_a_limit_is_taken_back() -> None:
    windows = [second(BEGIN + at, ours=(10, at % 2)) for at in range(1, 4)]
    found = verdict(windows, policy=limited(max_error_ratio=0.05))
    assert (found.action, found.reason) == (Action.ROLL_BACK, "limits: more than 0.05 errors of the version's requests")


def test_a_limit_needs_its_requests() -> None:
    windows = [second(BEGIN + at, ours=(10, at % 2)) for at in range(1, 4)]
    assert verdict(windows, policy=limited(max_error_ratio=0.05, min_requests=31)).action is Action.HOLD


def test_a_limit_looks_at_the_last_seconds_only() -> None:
    windows = [second(BEGIN + 1, ours=(10, 2), theirs=(90, 9)), *good(20, BEGIN + 1)]
    assert verdict(windows, policy=limited(max_error_ratio=0.05, window_s=5)).action is Action.STEP


def test_latency_beyond_its_limit_is_taken_back_but_not_for_one_slow_answer() -> None:
    policy = limited(max_p99_ms=100.0)
    assert verdict([*good(3), second(BEGIN + 4, slow=(1, 0))], policy=policy).action is Action.HOLD
    found = verdict([*good(3), second(BEGIN + 4, slow=(5, 0))], policy=policy)
    assert (found.action, found.reason[:7]) == (Action.ROLL_BACK, "limits:")


def test_with_both_beyond_a_limit_it_waits_and_somebody_is_called() -> None:
    windows = [second(BEGIN + at, ours=(10, 2), theirs=(90, 18)) for at in range(1, 30)]
    found = verdict(windows, policy=limited(max_error_ratio=0.05))
    assert (found.action, found.page) == (Action.HOLD, True)
    assert found.reason.startswith("the stable itself is sick: more than 0.05 errors")


def test_without_limits_a_stable_that_breaks_down_is_noticed_by_its_past() -> None:
    found = verdict(second(BEGIN + at, theirs=(90, 60)) for at in range(1, 30))
    assert (found.action, found.page) == (Action.HOLD, True)
    assert verdict([*(second(BEGIN + at, theirs=(90, 60)) for at in range(1, 5)), *good(20, BEGIN + 5)]).page is False
