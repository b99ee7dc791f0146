"""Whose answers count: the split that was set, users who stay on a version, copies that nobody sees."""

from dataclasses import replace

import numpy as np
import pytest
from lepton.policies import Policy, Shadowing, Strategy
from lepton.rollouts import Action, GateState
from lepton_common.events import ShadowWindow, Tally, VersionWindow
from lepton_rollout.judge import (
    Observation,
    judge,
    observation,
    observe,
)
from lepton_rollout.policy import Kind, Stage, stages
from lepton_rollout.trials import ERRORS, Counts

from .judging import (
    BEFORE,
    BEGIN,
    CANDIDATE,
    FAST,
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
