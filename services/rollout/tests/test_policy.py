from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from lepton.policies import PRESETS, Afterwards, FreezeWindow, HeaderMatch, Policy, Step, Strategy, Weekday
from lepton_common.errors import Invalid
from lepton_rollout.policy import Kind, Stage, frozen, stages

ZURICH = ZoneInfo("Europe/Zurich")


def way(policy: Policy) -> list[tuple[Kind, float]]:
    return [(stage.kind, stage.percent) for stage in stages(policy, first=False)]


def canary(*steps: float | Step, **changes: object) -> Policy:
    return Policy.model_validate({"steps": list(steps), **changes})


# --- stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [*PRESETS.values(), Policy(strategy=Strategy.AB)], ids=[*PRESETS, "ab"])
def test_a_models_first_version_takes_all_traffic_at_once(policy: Policy) -> None:
    assert stages(policy, first=True) == (Stage(0, Kind.ALL, 100.0),)


def test_immediate_is_one_stage_that_nobody_judges() -> None:
    assert stages(PRESETS["immediate"], first=False) == (Stage(0, Kind.ALL, 100.0),)


def test_a_canary_takes_its_steps_and_then_bakes() -> None:
    policy = canary(1, 5, 25, 50)
    assert way(policy) == [(Kind.SPLIT, 1), (Kind.SPLIT, 5), (Kind.SPLIT, 25), (Kind.SPLIT, 50), (Kind.ALL, 100)]
    *split, last = stages(policy, first=False)
    assert [stage.number for stage in (*split, last)] == [0, 1, 2, 3, 4]
    assert all(stage.dwell_s == policy.dwell_s and stage.min_requests == policy.min_requests for stage in split)
    assert (last.dwell_s, last.bake) == (policy.bake_s, True)


def test_a_step_may_have_its_own_time_and_traffic_and_approval() -> None:
    first, second, *_ = stages(canary(1, Step(percent=5, dwell_s=0, min_requests=7, approval=True)), first=False)
    assert not first.approval
    assert (second.dwell_s, second.min_requests, second.approval) == (0, 7, True)


def test_proof_is_asked_for_from_the_policys_share_on() -> None:
    assert [stage.prove for stage in stages(canary(1, 5, 25, 50), first=False)] == [False, False, True, True, False]


def test_the_last_step_proves_however_small_it_is() -> None:
    assert [stage.prove for stage in stages(canary(1, 5), first=False)] == [False, True, False]


def test_a_last_step_of_all_traffic_is_the_bake() -> None:
    policy = canary(10, Step(percent=100, dwell_s=900, approval=True), bake_s=60)
    only, last = stages(policy, first=False)
    assert (only.percent, only.prove) == (10, True)
    assert (last.kind, last.dwell_s, last.approval, last.bake) == (Kind.ALL, 900, True, True)


def test_a_promotion_may_need_a_person() -> None:
    assert [stage.approval for stage in stages(canary(10, approve_promotion=True), first=False)] == [False, True]


def test_blue_green_is_reachable_by_number_before_it_takes_everything() -> None:
    policy = Policy(strategy=Strategy.BLUE_GREEN, dwell_s=30)
    preview, all_of_it = stages(policy, first=False)
    assert preview == Stage(0, Kind.SPLIT, 0.0, 30.0)
    assert (all_of_it.kind, all_of_it.bake) == (Kind.ALL, True)


def test_a_shadow_has_no_live_traffic_before_it_steps() -> None:
    policy = Policy(strategy=Strategy.SHADOW, steps=[10.0])
    assert way(policy) == [(Kind.SHADOW, 0), (Kind.SPLIT, 10), (Kind.ALL, 100)]
    first = stages(policy, first=False)[0]
    assert (first.dwell_s, first.min_requests) == (policy.shadow.dwell_s, policy.shadow.min_pairs)


@pytest.mark.parametrize(
    ("afterwards", "kinds", "proves", "asks"),
    [
        (Afterwards.PROMOTE, [Kind.SPLIT, Kind.ALL], True, False),
        (Afterwards.ASK, [Kind.SPLIT, Kind.ALL], False, True),
        (Afterwards.RETURN, [Kind.SPLIT], False, False),
    ],
)
def test_an_ab_test_is_followed_by_what_the_policy_says(
    afterwards: Afterwards, kinds: list[Kind], proves: bool, asks: bool
) -> None:
    policy = Policy(strategy=Strategy.AB, steps=[20.0], duration_s=3600, afterwards=afterwards)
    found = stages(policy, first=False)
    assert [stage.kind for stage in found] == kinds
    assert (found[0].percent, found[0].dwell_s, found[0].prove) == (20, 3600, proves)
    assert any(stage.approval for stage in found) is asks


def test_an_ab_test_by_header_takes_no_share_of_the_traffic() -> None:
    policy = Policy(strategy=Strategy.AB, match=[HeaderMatch(header="x-beta", value="yes")])
    assert way(policy)[0] == (Kind.MATCH, 0)


# --- freeze windows ---------------------------------------------------------------------------------------------------


def holds(window: FreezeWindow, now: datetime) -> bool:
    return frozen(Policy(freeze=[window]), now) == window


def test_without_freeze_windows_nothing_is_frozen() -> None:
    assert frozen(Policy(), datetime(2026, 11, 27, tzinfo=UTC)) is None


def test_a_time_without_a_zone_is_refused() -> None:
    with pytest.raises(Invalid, match="no time zone"):
        frozen(Policy(), datetime(2026, 11, 27))


@pytest.mark.parametrize(
    ("hour", "minute", "expected"), [(16, 59, False), (17, 0, True), (23, 0, True), (23, 30, False)]
)
def test_a_window_holds_from_its_start_until_its_end(hour: int, minute: int, expected: bool) -> None:
    window = FreezeWindow.model_validate({"start": "17:00", "end": "23:30"})
    assert holds(window, datetime(2026, 11, 27, hour, minute, tzinfo=UTC)) is expected


def test_the_window_that_holds_is_told() -> None:
    night = FreezeWindow.model_validate({"start": "22:00", "end": "06:00", "reason": "nobody is awake"})
    year_end = FreezeWindow.model_validate({"first": "2026-12-20", "last": "2027-01-03"})
    policy = Policy(freeze=[night, year_end])
    assert frozen(policy, datetime(2026, 12, 24, 12, tzinfo=UTC)) == year_end
    assert frozen(policy, datetime(2026, 12, 24, 23, tzinfo=UTC)) == night


def test_a_window_without_times_holds_all_day_in_its_own_time_zone() -> None:
    friday = FreezeWindow(timezone="Asia/Tokyo", days=[Weekday.FRI])
    assert not holds(friday, datetime(2026, 11, 26, 14, 59, tzinfo=UTC))
    assert holds(friday, datetime(2026, 11, 26, 15, 0, tzinfo=UTC))
    assert holds(friday, datetime(2026, 11, 27, 14, 59, tzinfo=UTC))
    assert not holds(friday, datetime(2026, 11, 27, 15, 0, tzinfo=UTC))


def test_a_window_that_ends_the_next_day_belongs_to_the_day_it_began() -> None:
    window = FreezeWindow.model_validate({"days": ["fri"], "start": "18:00", "end": "08:00"})
    assert not holds(window, datetime(2026, 11, 27, 7, tzinfo=UTC))
    assert holds(window, datetime(2026, 11, 27, 18, tzinfo=UTC))
    assert holds(window, datetime(2026, 11, 28, 7, 59, tzinfo=UTC))
    assert not holds(window, datetime(2026, 11, 28, 8, tzinfo=UTC))
    assert not holds(window, datetime(2026, 11, 28, 19, tzinfo=UTC))


def test_the_last_date_may_end_on_the_morning_after() -> None:
    window = FreezeWindow.model_validate(
        {"first": "2026-12-24", "last": "2026-12-25", "start": "18:00", "end": "08:00"}
    )
    assert not holds(window, datetime(2026, 12, 24, 7, tzinfo=UTC))
    assert holds(window, datetime(2026, 12, 26, 7, tzinfo=UTC))
    assert not holds(window, datetime(2026, 12, 26, 18, tzinfo=UTC))


def test_a_window_follows_the_clocks_of_its_zone_in_summer_and_winter() -> None:
    window = FreezeWindow.model_validate({"timezone": "Europe/Zurich", "start": "09:00", "end": "10:00"})
    assert holds(window, datetime(2026, 7, 1, 7, 30, tzinfo=UTC))
    assert not holds(window, datetime(2026, 7, 1, 8, 30, tzinfo=UTC))
    assert holds(window, datetime(2026, 12, 1, 8, 30, tzinfo=UTC))
    assert not holds(window, datetime(2026, 12, 1, 7, 30, tzinfo=UTC))


def test_an_hour_that_comes_twice_is_frozen_both_times() -> None:
    # On 25 October 2026 the clocks in Zurich go from 03:00 back to 02:00, at 01:00 UTC.
    window = FreezeWindow.model_validate({"timezone": "Europe/Zurich", "start": "02:15", "end": "02:45"})
    assert holds(window, datetime(2026, 10, 25, 2, 30, tzinfo=ZURICH, fold=0))
    assert holds(window, datetime(2026, 10, 25, 2, 30, tzinfo=ZURICH, fold=1))
    assert not holds(window, datetime(2026, 10, 25, 1, 46, tzinfo=UTC))


def test_a_window_that_ends_in_an_hour_that_never_comes_still_ends() -> None:
    # On 29 March 2026 the clocks in Zurich go from 02:00 to 03:00, at 01:00 UTC.
    window = FreezeWindow.model_validate({"timezone": "Europe/Zurich", "start": "01:00", "end": "02:30"})
    assert holds(window, datetime(2026, 3, 29, 0, 59, tzinfo=UTC))
    assert holds(window, datetime(2026, 3, 29, 1, 29, tzinfo=UTC))
    assert not holds(window, datetime(2026, 3, 29, 1, 30, tzinfo=UTC))
