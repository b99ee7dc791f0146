from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lepton.policies import OnFailure, Policy, Step, Strategy
from lepton.rollouts import Action, Gate, GateState, Verdict
from lepton_common.errors import Conflict
from lepton_common.events import RolloutFinished, RolloutHeld, TrafficShifted, WindowClosed
from lepton_common.records import Serving
from lepton_common.types import ModelRef
from lepton_rollout.domain import (
    GAP_S,
    Rollout,
    State,
    again,
    applied,
    contiguous,
    failing,
    finished,
    held,
    is_news,
    is_stalled,
    judged,
    laggard,
    ready,
    shifting,
    stepped,
)
from lepton_rollout.judge import baseline
from lepton_rollout.orders import aborted, advanced, approved, paused, resumed
from lepton_rollout.story import events, notes

from .stand_ins import assigned

MODEL = ModelRef("default", "digits")
NOW = datetime(2026, 11, 27, 12, tzinfo=UTC)
NOTHING = baseline([])
SERVING = Serving(tenant="default", model="digits", generation=1, stable=1, previous=7)


def rollout(policy: Policy | None = None, *, stable: int | None = 1, number: int = 1) -> Rollout:
    return Rollout(
        UUID(int=number),
        MODEL,
        assigned(2),
        policy or Policy(steps=[10.0, 50.0]),
        "ann",
        started_at=NOW,
        load_by=NOW + timedelta(minutes=2),
        stable=stable,
    )


def walking(policy: Policy | None = None, stage: int = 0) -> Rollout:
    """In the stage, acknowledged by the mesh."""
    started = shifting(rollout(policy), "ready")
    for _ in range(stage):
        started = stepped(applied(started, NOW, NOTHING), "as good")
    return applied(started, NOW, NOTHING)


def verdict(action: Action, reason: str = "because", *, page: bool = False, gate: GateState | None = None) -> Verdict:
    gates = [Gate(name="errors", state=gate, detail="", numbers={"harm": 1.0})] if gate else []
    return Verdict(action=action, reason=reason, second=int(NOW.timestamp()) + 1, page=page, gates=gates)


# --- on its way -------------------------------------------------------------------------------------------------------


def test_a_rollout_that_shifted_ends_promoted_and_knows_what_served_before() -> None:
    end = finished(shifting(rollout(), "ready"), SERVING, NOW)
    assert (end.state, end.previous, end.walk.percent, end.reason) == (State.PROMOTED, 7, 100, "ready")


def test_a_rollout_that_gave_up_ends_as_it_said_with_its_reason() -> None:
    end = finished(failing(rollout(), "bad opset"), SERVING, NOW)
    assert (end.state, end.previous, end.walk.percent, end.reason) == (State.FAILED, None, 0, "bad opset")
    assert end.finished_at == NOW
    assert finished(failing(rollout(), "worse", State.ROLLED_BACK), SERVING, NOW).state is State.ROLLED_BACK


def test_the_first_reason_to_give_up_stays() -> None:
    assert failing(failing(rollout(), "worse", State.ROLLED_BACK), "another").reason == "worse"


def test_a_first_version_and_one_that_serves_already_take_all_traffic_at_once() -> None:
    assert [stage.percent for stage in rollout(stable=None).plan] == [100]
    assert [stage.percent for stage in rollout(stable=2).plan] == [100]


def test_a_stage_is_meant_before_it_is_acknowledged_and_the_share_follows_the_acknowledgement() -> None:
    first = walking()
    meant = stepped(first, "as good")
    assert (meant.walk.stage, meant.walk.applied, meant.walk.percent) == (1, False, 10)
    there = applied(meant, NOW, NOTHING)
    assert (there.walk.applied, there.walk.percent, there.walk.second) == (True, 50, int(NOW.timestamp()))


def test_a_stage_entered_again_waits_for_the_mesh_and_keeps_its_place() -> None:
    assert (again(walking(stage=1)).walk.stage, again(walking(stage=1)).walk.applied) == (1, False)


def test_a_step_without_a_decision_stalls_after_its_time() -> None:
    there = walking(Policy(steps=[10.0], dwell_s=60, max_step_s=100))
    assert not is_stalled(there, NOW + timedelta(seconds=160))
    assert is_stalled(there, NOW + timedelta(seconds=161))


# --- the judge --------------------------------------------------------------------------------------------------------


def test_harm_takes_the_traffic_back_unless_the_policy_holds() -> None:
    worse = verdict(Action.ROLL_BACK, "more errors")
    after = judged(walking(), worse)
    assert (after.state, after.outcome, after.reason) == (State.FAILING, State.ROLLED_BACK, "more errors")
    for on_failure in (OnFailure.HOLD, OnFailure.FREEZE):
        after = judged(walking(Policy(on_failure=on_failure)), worse)
        assert (after.state, after.walk.held) == (State.SHIFTING, "worse than the stable: more errors")


def test_what_is_held_stays_held_until_there_is_harm() -> None:
    before = held(walking(), "somebody look")
    after = judged(before, verdict(Action.HOLD, "all is well"))
    assert (after.walk.held, after.walk.waiting_for) == ("somebody look", "somebody look")
    assert judged(before, verdict(Action.ROLL_BACK, "more errors")).outcome is State.ROLLED_BACK
    frozen = held(walking(Policy(on_failure=OnFailure.FREEZE)), "somebody look")
    assert judged(frozen, verdict(Action.ROLL_BACK, "more errors")).walk.held == "somebody look"


def test_a_member_that_looks_worse_holds_its_group_up_again() -> None:
    other = ready(walking())
    assert laggard(walking(), [other]) is None
    assert laggard(walking(), [judged(other, verdict(Action.HOLD, "looks worse"))]) is not None
    assert laggard(walking(), [paused(other, "lunch")]) is not None


def test_what_is_being_promoted_takes_no_orders() -> None:
    through = stepped(walking(stage=2), "no proof of harm")
    assert through.is_through
    with pytest.raises(Conflict, match="is being promoted"):
        aborted(through, "too late")


def test_a_verdict_is_news_when_its_action_or_a_gate_changes() -> None:
    calm = verdict(Action.HOLD, gate=GateState.WAITING)
    assert is_news(None, calm)
    assert not is_news(calm, verdict(Action.HOLD, "in other words", gate=GateState.WAITING))
    assert is_news(calm, verdict(Action.HOLD, gate=GateState.PASSED))
    assert is_news(calm, verdict(Action.STEP, gate=GateState.WAITING))


# --- windows ----------------------------------------------------------------------------------------------------------


def window(second: int, sequence: int) -> WindowClosed:
    return WindowClosed(tenant="default", model="digits", second=second, sequence=sequence, gateways=1)


def test_a_gap_is_waited_for_but_not_for_long() -> None:
    there = walking()
    there = replace(there, walk=replace(there.walk, sequence=4))
    gap = [window(100, 5), window(102, 7)]
    assert contiguous(there, gap, 102.5) == gap[:1]
    assert contiguous(there, gap, 102 + 2 * GAP_S) == gap
    late = [*gap, window(103, 8), window(102 + GAP_S, 9)]
    assert contiguous(there, late, 102.5) == late


@given(st.integers(1, 50), st.integers(1, 20))
def test_windows_without_a_gap_are_judged_at_once(first: int, count: int) -> None:
    there = walking()
    there = replace(there, walk=replace(there.walk, sequence=first - 1))
    windows = [window(100 + n, first + n) for n in range(count)]
    assert contiguous(there, windows, 100.0) == windows


# --- groups -----------------------------------------------------------------------------------------------------------


def test_a_group_waits_for_the_member_that_is_behind() -> None:
    this, other = walking(), walking()
    assert laggard(this, [other]) is other
    assert laggard(this, [ready(other)]) is None
    assert laggard(this, [stepped(other, "as good")]) is None
    assert laggard(this, [finished(other, SERVING, NOW)]) is None
    assert laggard(this, [rollout()]) is not None


# --- persons ----------------------------------------------------------------------------------------------------------


def test_a_pause_is_undone_by_resume_and_by_nothing_else() -> None:
    with pytest.raises(Conflict, match="neither paused nor held"):
        resumed(walking())
    stopped = paused(walking(), "lunch")
    assert stopped.walk.waiting_for == "paused: lunch"
    assert not resumed(stopped).walk.paused


def test_a_pause_before_the_mesh_acknowledged_a_growth_leaves_it_to_later() -> None:
    grown = stepped(walking(), "as good")
    for meant in (grown, advanced(walking(), "it is fine", full=True)):
        stopped = paused(meant, "lunch")
        assert (stopped.walk.stage, stopped.walk.applied, stopped.walk.percent) == (0, True, 10)
        assert stopped.walk.evidence == walking().walk.evidence
    assert paused(applied(grown, NOW, NOTHING), "lunch").walk.stage == 1
    # The mesh had it all the same, so it is entered once more: what it waits for is still the person.
    assert applied(again(paused(grown, "lunch")), NOW, NOTHING).walk.waiting_for == "paused: lunch"
    # Before its first stage there is none to stay in.
    assert not paused(shifting(rollout(), "ready"), "lunch").walk.applied


def test_who_resumes_what_was_held_for_harm_lets_it_be_judged_anew() -> None:
    after = resumed(held(walking(), "more errors"))
    assert (after.walk.held, after.walk.applied, after.walk.evidence) == ("", False, rollout().walk.evidence)


def test_a_person_promotes_by_a_step_or_to_the_last_stage() -> None:
    one = advanced(walking(), "it is fine", full=False)
    assert (one.walk.stage, one.walk.applied, one.reason) == (1, False, "it is fine")
    all_of_it = advanced(walking(), "it is fine", full=True)
    assert all_of_it.stage.percent == 100
    over = advanced(walking(stage=2), "it is fine", full=True)
    assert over.is_through
    with pytest.raises(Conflict, match="no worker has its version ready yet"):
        advanced(rollout(), "now", full=False)


def test_only_a_stage_that_needs_approval_can_be_approved() -> None:
    policy = Policy(steps=[10.0, Step(percent=50, approval=True)])
    with pytest.raises(Conflict, match="waits for no approval"):
        approved(walking(policy, stage=1))
    before = walking(policy)
    assert before.lacks_approval
    assert not approved(before).lacks_approval
    assert not rollout(policy).lacks_approval


def test_a_rollout_that_is_over_or_gives_up_takes_no_orders() -> None:
    for closed in (finished(walking(), SERVING, NOW), failing(walking(), "worse", State.ROLLED_BACK)):
        for order in (resumed, approved):
            with pytest.raises(Conflict):
                order(closed)
        with pytest.raises(Conflict):
            aborted(closed, "no more")


# --- what is told -----------------------------------------------------------------------------------------------------


def test_an_acknowledged_share_is_told_and_kept() -> None:
    before = stepped(walking(), "as good")
    after = applied(before, NOW, NOTHING)
    (shifted,) = events(before, after, NOW)
    assert isinstance(shifted, TrafficShifted)
    assert (shifted.percent, shifted.reason) == (50, "as good")
    assert [note.action for note in notes(before, after)] == ["shifted"]


def test_a_rollback_is_told_with_its_numbers_and_that_the_traffic_is_back() -> None:
    before = judged(walking(), verdict(Action.ROLL_BACK, "more errors", gate=GateState.FAILED))
    after = finished(before, SERVING, NOW)
    shifted, end = events(before, after, NOW)
    assert isinstance(shifted, TrafficShifted)
    assert isinstance(end, RolloutFinished)
    assert shifted.percent == 0
    assert (end.outcome, end.reason) == ("rolled_back", "more errors")
    assert end.evidence["gates"] == {"errors": {"harm": 1.0}}
    assert [note.action for note in notes(walking(), before)] == ["roll_back"]


def test_a_page_is_sent_once() -> None:
    calm, sick = walking(), judged(walking(), verdict(Action.HOLD, "the stable is sick", page=True))
    (page,) = events(calm, sick, NOW)
    assert isinstance(page, RolloutHeld)
    assert (page.page, page.reason) == (True, "the stable is sick")
    assert list(events(sick, judged(sick, verdict(Action.HOLD, "still sick", page=True)), NOW)) == []


def test_what_the_judge_only_repeats_is_not_kept() -> None:
    first = judged(walking(), verdict(Action.HOLD, "500 requests to go", gate=GateState.WAITING))
    second = judged(first, verdict(Action.HOLD, "400 requests to go", gate=GateState.WAITING))
    assert list(notes(first, second)) == []


@pytest.mark.parametrize("strategy", list(Strategy))
def test_no_plan_gives_all_traffic_to_what_was_not_judged_before(strategy: Strategy) -> None:
    plan = rollout(Policy(strategy=strategy)).plan
    assert [stage.number for stage in plan] == list(range(len(plan)))
    if strategy is not Strategy.IMMEDIATE:
        assert plan[0].percent < 100
    if strategy in (Strategy.CANARY, Strategy.SHADOW):
        assert plan[-2].prove
