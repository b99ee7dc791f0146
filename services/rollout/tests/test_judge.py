import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from math import nan
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lepton.policies import PRESETS, Comparison, Judging, Limits, Policy, Shadowing, Strategy
from lepton.rollouts import Action, Gate, GateState, Verdict
from lepton_common.errors import Invalid
from lepton_common.events import ShadowWindow, Tally, VersionWindow, WindowClosed
from lepton_rollout.bets import Bet
from lepton_rollout.judge import (
    Baseline,
    Evidence,
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
from lepton_rollout.policy import Kind, Stage, stages
from lepton_rollout.trials import ERRORS, Counts, Trial

STABLE, CANDIDATE = 1, 2
FAST, SLOW, SLOWEST = 500, 540, 700
BEGIN = 1000
SPLIT = Stage(0, Kind.SPLIT, 10.0, dwell_s=10, min_requests=100)
PROVING = replace(SPLIT, prove=True)
BAKE = Stage(1, Kind.ALL, 100.0, dwell_s=10, min_requests=100, bake=True)


def arm(version: int, requests: int, errors: int = 0, slow: int = 0, **more: object) -> VersionWindow:
    ok = requests - errors
    latency = {bucket: count for bucket, count in ((FAST, ok - slow), (SLOWEST, slow)) if count}
    return VersionWindow.model_validate(
        {"version": version, "ok": ok, "server_errors": errors, "latency": latency, **more}
    )


def second(
    at: int, ours: tuple[int, int] = (10, 0), theirs: tuple[int, int] = (90, 0), slow: tuple[int, int] = (0, 0)
) -> Observation:
    """A second of (requests, errors) for the candidate and for the stable, and of their slow answers."""
    return Observation(
        at, arm(CANDIDATE, *ours, slow[0]) if ours[0] else None, arm(STABLE, *theirs, slow[1]) if theirs[0] else None
    )


# Two minutes of the stable before any step: 1 % errors, 5 % slower than most.
BEFORE = baseline(
    [Observation(0, stable=VersionWindow(version=STABLE, ok=9900, server_errors=100, latency={FAST: 9400, SLOW: 600}))]
)


def after(
    windows: Iterable[Observation], stage: Stage = SPLIT, policy: Policy | None = None, known: Baseline = BEFORE
) -> Evidence:
    evidence = entered(fresh(), stage, BEGIN, known)
    for window in windows:
        evidence = observe(evidence, window, stage, policy or Policy())
    return evidence


def verdict(
    windows: Iterable[Observation], stage: Stage = SPLIT, policy: Policy | None = None, known: Baseline = BEFORE
) -> Verdict:
    return judge(after(windows, stage, policy, known), stage, policy or Policy())


def gate(given_verdict: Verdict, name: str) -> Gate:
    return next(each for each in given_verdict.gates if each.name == name)


def good(seconds: int, start: int = BEGIN) -> list[Observation]:
    return [second(start + 1 + at) for at in range(seconds)]


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


def seconds_until(
    action: Action, window: Callable[[int], Observation], stage: Stage = SPLIT, policy: Policy | None = None
) -> int:
    evidence = entered(fresh(), stage, BEGIN, BEFORE)
    for at in range(1, 600):
        evidence = observe(evidence, window(BEGIN + at), stage, policy or Policy())
        if judge(evidence, stage, policy or Policy()).action is action:
            return at
    raise AssertionError(f"no {action} in ten minutes")


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


# --- the split --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [0, 1, 40])
def test_a_split_that_did_not_take_effect_is_noticed_and_somebody_is_called(ours: int) -> None:
    found = verdict(second(BEGIN + at, ours=(ours, 0)) for at in range(1, 30))
    assert (found.action, found.reason, found.page) == (Action.HOLD, "the split did not take effect", True)


def test_a_version_that_stops_to_answer_is_noticed_by_its_share_before_it_looks_worse() -> None:
    leaving = [second(BEGIN + 10 + at, ours=(0, 0)) for at in range(1, 60)]
    found = verdict([*good(10), *leaving])
    assert (found.action, found.reason, found.page) == (Action.HOLD, "the split did not take effect", True)


def test_somebody_is_called_for_the_split_while_other_things_are_waited_for_as_well() -> None:
    # Its errors look worse, but that is not proven.
    windows = [second(BEGIN + at, ours=(1, 1)) for at in range(1, 4)]
    found = verdict([*windows, *(second(BEGIN + at, ours=(0, 0)) for at in range(4, 90))])
    assert gate(found, "errors").state is GateState.WAITING
    assert (found.action, found.reason, found.page) == (Action.HOLD, "the split did not take effect", True)


def test_harm_is_proven_whatever_the_split_is() -> None:
    found = verdict(second(BEGIN + at, ours=(60, 60)) for at in range(1, 10))
    assert found.action is Action.ROLL_BACK


def test_answers_to_what_was_asked_before_the_step_are_no_part_of_the_split() -> None:
    slow = replace(BEFORE, p99=710)
    windows = [second(BEGIN + at, ours=(0, 0), theirs=(900, 0)) for at in range(1, 3)]
    assert gate(verdict(windows, known=slow), "split").state is GateState.PASSED
    assert gate(verdict(windows, known=BEFORE), "split").state is GateState.WAITING


def test_requests_matched_by_header_have_no_share_to_keep() -> None:
    matched = Stage(0, Kind.MATCH, 0.0, dwell_s=10, min_requests=100)
    assert verdict((second(BEGIN + at, ours=(60, 0)) for at in range(1, 20)), matched).action is Action.STEP


def sticky(at: int, ours: Tally, theirs: Tally) -> Observation:
    return Observation(at, arm(CANDIDATE, 500, 400, users=ours), arm(STABLE, 500, users=theirs))


def test_with_sticky_users_a_user_counts_once_a_second() -> None:
    policy, few = Policy(sticky="x-user"), Tally(ok=9, server_errors=1, latency={FAST: 10})
    windows = [sticky(BEGIN + at, few, Tally(ok=90, latency={FAST: 90})) for at in range(1, 3)]
    evidence = after(windows, policy=policy)
    assert evidence.trials[ERRORS].candidate == Counts(2, 20)
    assert gate(judge(evidence, SPLIT, policy), "split").state is GateState.PASSED


def refusing(at: int, ours: int, theirs: int) -> Observation:
    """A second in which so many requests of 10 and of 90 were the caller's mistake, as the versions have it."""
    return Observation(
        at,
        VersionWindow(version=CANDIDATE, ok=10 - ours, client_errors=ours, latency={FAST: 10}),
        VersionWindow(version=STABLE, ok=90 - theirs, client_errors=theirs, latency={FAST: 90}),
    )


def test_a_version_that_refuses_what_the_stable_takes_is_taken_back() -> None:
    assert seconds_until(Action.ROLL_BACK, lambda at: refusing(at, 10, 0)) <= 5
    assert "refused" in verdict(refusing(BEGIN + at, 10, 0) for at in range(1, 9)).reason


def test_callers_who_ask_wrongly_accuse_no_version() -> None:
    found = verdict(refusing(BEGIN + at, 5, 45) for at in range(1, 300))
    assert gate(found, "refused").state is GateState.PASSED


def test_a_sticky_user_who_asks_wrongly_accuses_no_version() -> None:
    ours, theirs = Tally(ok=9, client_errors=1, latency={FAST: 10}), Tally(ok=90, latency={FAST: 90})
    windows = [sticky(BEGIN + at, ours, theirs) for at in range(1, 300)]
    assert gate(verdict(windows, policy=Policy(sticky="x-user")), "refused").state is GateState.PASSED


def test_the_same_users_again_are_no_new_evidence_against_the_split() -> None:
    policy = Policy(sticky="x-user")
    ours, theirs = Tally(ok=6, latency={FAST: 6}), Tally(ok=94, latency={FAST: 94})
    windows = [sticky(BEGIN + at, ours, theirs) for at in range(1, 300)]
    assert gate(verdict(windows, policy=policy), "split").state is GateState.PASSED
    wrong = [sticky(BEGIN + at, Tally(ok=50), Tally(ok=50)) for at in range(1, 5)]
    assert gate(verdict(wrong, policy=policy), "split").state is GateState.WAITING


def anonymous(at: int, ours: tuple[int, int], theirs: tuple[int, int], named: int = 0) -> Observation:
    """A second of (requests, errors) by callers who are users of their own, and so many named users of each version
    who ask ten times."""
    (of, bad), (their_of, their_bad) = ours, theirs
    users = (
        Tally(ok=of - bad + named, server_errors=bad, latency={FAST: of + named}),
        Tally(ok=their_of - their_bad + named, server_errors=their_bad, latency={FAST: their_of + named}),
    )
    return Observation(
        at,
        arm(CANDIDATE, of + 10 * named, bad, users=users[0]),
        arm(STABLE, their_of + 10 * named, their_bad, users=users[1]),
    )


STICKY = Policy(sticky="x-user")


@pytest.mark.parametrize("named", [0, 1])
def test_errors_of_callers_who_do_not_say_who_they_are_count_where_users_are_sticky(named: int) -> None:
    windows = [anonymous(BEGIN + at, (10, 10), (90, 0), named) for at in range(1, 6)]
    assert verdict(windows, policy=STICKY).action is Action.ROLL_BACK
    assert after(windows, policy=STICKY).trials[ERRORS].candidate == Counts(50, 50 + 5 * named)


def test_where_nobody_told_of_users_the_requests_count() -> None:
    windows = [second(BEGIN + at, ours=(10, 10)) for at in range(1, 6)]
    assert verdict(windows, policy=STICKY).action is Action.ROLL_BACK
    assert verdict(good(300), PROVING, STICKY).action is Action.STEP
    wrong = (second(BEGIN + at, ours=(0, 0), theirs=(500, 0)) for at in range(1, 5))
    assert gate(verdict(wrong, policy=STICKY), "split").state is GateState.WAITING


def test_users_are_those_of_all_pools_or_not_known() -> None:
    some, more = Tally(ok=3, latency={FAST: 3}), Tally(ok=2, server_errors=1, latency={FAST: 3})
    counters = VersionWindow(version=CANDIDATE, counters={"refusals": 1})
    parts = [arm(CANDIDATE, 10, users=some, pool="cpu"), arm(CANDIDATE, 20, users=more, pool="gpu"), counters]
    seen = observation(closed(7, *parts), CANDIDATE, STABLE).candidate
    assert seen is not None
    assert seen.users == Tally(ok=5, server_errors=1, latency={FAST: 6})
    seen = observation(closed(7, *parts, arm(CANDIDATE, 1, pool="tpu")), CANDIDATE, STABLE).candidate
    assert seen is not None
    assert seen.users is None


def test_users_of_one_version_are_not_compared_with_requests_of_the_other() -> None:
    ours = arm(CANDIDATE, 100, users=Tally(server_errors=2, ok=8, latency={FAST: 10}))
    windows = [Observation(BEGIN + at, ours, arm(STABLE, 900)) for at in range(1, 30)]
    evidence = after(windows, policy=STICKY)
    assert evidence.trials[ERRORS].candidate == Counts(0, 29 * 100)
    assert gate(judge(evidence, SPLIT, STICKY), "split").state is GateState.PASSED


def test_a_split_of_callers_who_do_not_say_who_they_are_is_rarely_called_a_mismatch() -> None:
    rng, alarms = np.random.default_rng(17), 0
    for _ in range(100):
        evidence = after([], policy=STICKY)
        # Each named user is on one version for good; the others are split anew every time.
        named = int(rng.binomial(20, 0.1))
        for at in range(1, 41):
            ours = int(rng.binomial(80, 0.1))
            users = (ours + named, 100 - ours - named)
            window = sticky(BEGIN + at, *(Tally(ok=each, latency={FAST: each}) for each in users))
            evidence = observe(evidence, window, SPLIT, STICKY)
        alarms += gate(judge(evidence, SPLIT, STICKY), "split").state is not GateState.PASSED
    assert alarms <= 1 + 3


# --- shadows ----------------------------------------------------------------------------------------------------------

SHADOW = Policy(strategy=Strategy.SHADOW, shadow=Shadowing(dwell_s=10, min_pairs=100))
COPIES = stages(SHADOW, first=False)[0]


def copies(at: int, **counts: int) -> Observation:
    return Observation(at, None, arm(STABLE, 100), ShadowWindow(version=CANDIDATE, **counts))


def test_a_shadow_goes_on_after_enough_pairs_that_agree() -> None:
    assert (
        verdict((copies(BEGIN + at, agreed=19, disagreed=1) for at in range(1, 11)), COPIES, SHADOW).action
        is Action.STEP
    )


@pytest.mark.parametrize(("seconds", "counts"), [(9, {"agreed": 20}), (20, {"agreed": 4}), (20, {"dropped": 50})])
def test_a_shadow_waits_for_time_and_pairs(seconds: int, counts: dict[str, int]) -> None:
    windows = [copies(BEGIN + at, **counts) for at in range(1, seconds + 1)]
    assert verdict(windows, COPIES, SHADOW).action is Action.HOLD


def test_a_shadow_that_disagrees_waits() -> None:
    found = verdict((copies(BEGIN + at, agreed=8, disagreed=2) for at in range(1, 60)), COPIES, SHADOW)
    assert (found.action, found.reason) == (Action.HOLD, "waits until 90% of its answers agree with the stable's")


def test_a_shadow_that_is_wrong_more_often_is_taken_back() -> None:
    window = {"agreed": 97, "disagreed": 3, "only_stable_right": 3}
    found = verdict((copies(BEGIN + at, **window) for at in range(1, 30)), COPIES, SHADOW)
    assert found.action is Action.ROLL_BACK
    even = {"agreed": 96, "disagreed": 4, "only_stable_right": 2, "only_shadow_right": 2}
    assert verdict((copies(BEGIN + at, **even) for at in range(1, 30)), COPIES, SHADOW).action is Action.STEP


def test_a_shadow_that_fails_is_taken_back() -> None:
    found = verdict((copies(BEGIN + at, agreed=50, failed=50) for at in range(1, 10)), COPIES, SHADOW)
    assert found.action is Action.ROLL_BACK
    assert found.reason.startswith("failed answers to copies")


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


@settings(deadline=None, max_examples=40)
@given(WINDOWS, st.randoms(use_true_random=False))
def test_repeated_and_reordered_windows_change_nothing(windows: list[Observation], chance: Random) -> None:
    once: list[Observation] = []
    for window in windows:
        if not once or window.second > once[-1].second:
            once.append(window)
    again = [each for window in once for each in (window,) * chance.randint(1, 3)]
    late = [each for index, window in enumerate(once) for each in (window, *once[: chance.randint(0, index)])]
    assert after(once) == after(again) == after(late)


@settings(deadline=None)
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


@settings(deadline=None)
@given(WINDOWS)
def test_nothing_goes_on_without_time_traffic_and_proof(windows: list[Observation]) -> None:
    evidence = after(windows, PROVING)
    if judge(evidence, PROVING, Policy()).action is Action.STEP:
        seen = [each for each in windows if each.candidate]
        assert seen[-1].second - BEGIN >= PROVING.dwell_s
        assert evidence.requests >= PROVING.min_requests
        assert all(evidence.trials[kind].proof >= 20 for kind in ("errors", "slow_p95"))


@settings(deadline=None)
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
    trial = replace(evidence.trials[ERRORS], **broken)  # type: ignore[arg-type]
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


def closed(at: int, *versions: VersionWindow, shadow: ShadowWindow | None = None) -> WindowClosed:
    return WindowClosed(tenant="t", model="m", second=at, sequence=at, gateways=1, versions=versions, shadow=shadow)


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
