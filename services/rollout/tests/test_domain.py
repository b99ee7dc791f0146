from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lepton_common.errors import Conflict, NotFound
from lepton_common.records import Loaded, LoadState, Serving, Share, WorkerState
from lepton_common.types import ModelRef
from lepton_rollout.domain import (
    TOTAL_WEIGHT,
    Loading,
    Rollout,
    State,
    abandoned,
    cooled,
    failing,
    finished,
    judge_loading,
    promoted,
    returned,
    shifting,
    unserved,
    warmed,
    weights,
    withdrawn,
)

from .stand_ins import assigned

MODEL = ModelRef("default", "digits")
NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


def deployed(*versions: int) -> Serving:
    """The record after these versions were deployed one after the other."""
    serving = unserved(MODEL)
    for version in versions:
        serving = promoted(warmed(serving, assigned(version)), version)
    return serving


def held(serving: Serving) -> set[int]:
    return {each.version for each in serving.versions}


def split(serving: Serving) -> dict[int, float]:
    return {share.version: share.percent for share in serving.split}


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_warmed_version_takes_no_traffic() -> None:
    serving = warmed(deployed(1), assigned(2))
    assert held(serving) == {1, 2}
    assert split(serving) == {1: 100}
    assert serving.stable == 1


def test_a_promoted_version_takes_all_traffic_and_the_one_before_stays_warm() -> None:
    serving = deployed(1, 2)
    assert split(serving) == {2: 100}
    assert (serving.stable, serving.previous) == (2, 1)
    assert held(serving) == {1, 2}


def test_the_version_before_the_previous_one_is_let_go() -> None:
    assert held(deployed(1, 2, 3)) == {2, 3}


def test_a_version_that_was_warmed_on_purpose_stays_through_a_promotion() -> None:
    serving = promoted(warmed(warmed(deployed(1), assigned(7)), assigned(2)), 2)
    assert held(serving) == {1, 2, 7}


def test_a_rollback_swaps_stable_and_previous_and_lets_nothing_go() -> None:
    serving = deployed(1, 2)
    back = promoted(serving, returned(serving))
    assert (back.stable, back.previous) == (1, 2)
    assert held(back) == {1, 2}
    assert returned(back) == 2


def test_there_is_no_way_back_from_the_first_version() -> None:
    with pytest.raises(Conflict, match="no previous version"):
        returned(deployed(1))
    with pytest.raises(NotFound, match="not served"):
        returned(unserved(MODEL))


def test_a_version_that_no_pool_holds_is_not_promoted() -> None:
    with pytest.raises(Conflict, match="version 9"):
        promoted(deployed(1), 9)


def test_an_abandoned_version_is_let_go_unless_it_serves_or_may_be_returned_to() -> None:
    serving = warmed(deployed(1, 2), assigned(3))
    assert held(abandoned(serving, 3)) == {1, 2}
    assert abandoned(serving, 2) == serving
    assert abandoned(serving, 1) == serving


def test_only_a_version_without_traffic_is_cooled() -> None:
    serving = deployed(1, 2)
    assert held(cooled(serving, 1)) == {2}
    with pytest.raises(Conflict, match="live traffic"):
        cooled(serving, 2)
    with pytest.raises(NotFound):
        cooled(serving, 3)


def test_a_withdrawn_model_remembers_what_to_restore() -> None:
    serving = withdrawn(deployed(1, 2))
    assert (held(serving), split(serving)) == (set(), {})
    restored = promoted(warmed(serving, assigned(2)), 2)
    assert (restored.stable, restored.previous) == (2, 1)
    assert split(restored) == {2: 100}


_CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("deploy"), st.integers(1, 5)),
        st.tuples(st.just("warm"), st.integers(1, 5)),
        st.tuples(st.just("cool"), st.integers(1, 5)),
        st.tuples(st.just("abandon"), st.integers(1, 5)),
        st.tuples(st.just("withdraw"), st.just(0)),
        st.tuples(st.just("return"), st.just(0)),
    ),
    max_size=30,
)


def changed(serving: Serving, change: str, version: int) -> Serving:
    match change:
        case "deploy":
            return promoted(warmed(serving, assigned(version)), version)
        case "warm":
            return warmed(serving, assigned(version))
        case "cool":
            return cooled(serving, version)
        case "abandon":
            return abandoned(serving, version)
        case "withdraw":
            return withdrawn(serving)
        case _:
            back = returned(serving)
            return promoted(warmed(serving, assigned(back)), back)


@given(_CHANGES)
def test_whatever_happens_all_traffic_goes_to_versions_that_are_held(changes: list[tuple[str, int]]) -> None:
    serving = unserved(MODEL)
    for change, version in changes:
        before = serving
        try:
            serving = changed(serving, change, version)
        except (Conflict, NotFound):
            continue
        assert set(split(serving)) <= held(serving)
        assert sum(split(serving).values()) in (0, 100)
        assert split(serving) in ({}, {serving.stable: 100})
        assert serving.previous is None or serving.previous != serving.stable
        assert serving.generation > before.generation or serving == before
        # What took traffic until now is still held, unless the model was withdrawn as a whole.
        assert change == "withdraw" or set(split(before)) <= held(serving)
        # A change made twice is a change made once.
        if change not in {"cool", "return"}:
            assert changed(serving, change, version) == serving


# --- weights ----------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.integers(1, 50), st.floats(0, 100), max_size=12))
def test_weights_total_ten_thousand_and_follow_the_shares(shares: dict[int, float]) -> None:
    found = weights(tuple(Share(version=version, percent=percent) for version, percent in shares.items()))
    positive = {version: percent for version, percent in shares.items() if percent > 0}
    assert list(found) == list(positive)
    assert sum(found.values()) == (TOTAL_WEIGHT if positive else 0)
    assert all(weight >= 1 for weight in found.values())
    total = sum(positive.values())
    for version, percent in positive.items():
        assert abs(found[version] - percent * TOTAL_WEIGHT / total) <= len(positive)


def test_hundredths_of_a_percent_are_exact() -> None:
    shares = (Share(version=1, percent=99.99), Share(version=2, percent=0.01))
    assert weights(shares) == {1: 9999, 2: 1}


# --- loading ----------------------------------------------------------------------------------------------------------


def worker(name: str, state: LoadState | None, reason: str = "", *, pool: str = "cpu", sha256: str = "") -> WorkerState:
    loaded = Loaded(
        tenant="default",
        model="digits",
        version=2,
        sha256=sha256 or assigned(2).sha256,
        state=state or LoadState.LOADING,
        reason=reason,
    )
    return WorkerState(
        id=name, pool=pool, address="127.0.0.1:1", device="cpu", versions=(loaded,) if state is not None else ()
    )


def judged(*workers: WorkerState, late: bool = False) -> tuple[Loading, str]:
    return judge_loading(MODEL, assigned(2), workers, late=late)


def test_a_pool_is_ready_when_every_live_worker_is() -> None:
    verdict, reason = judged(worker("a", LoadState.READY), worker("b", LoadState.READY))
    assert verdict is Loading.READY
    assert reason == "2 of 2 workers of pool 'cpu' are ready"


@pytest.mark.parametrize("other", [LoadState.LOADING, None])
def test_a_worker_still_at_it_is_waited_for_until_it_is_late(other: LoadState | None) -> None:
    workers = worker("a", LoadState.READY), worker("b", other)
    assert judged(*workers) == (Loading.WAIT, "")
    assert judged(*workers, late=True)[0] is Loading.READY


def test_one_ready_worker_is_enough_when_the_others_failed() -> None:
    assert judged(worker("a", LoadState.READY), worker("b", LoadState.FAILED, "no memory"))[0] is Loading.READY


def test_when_all_failed_their_reason_is_told() -> None:
    same = worker("a", LoadState.FAILED, "bad opset"), worker("b", LoadState.FAILED, "bad opset")
    assert judged(*same) == (Loading.FAILED, "bad opset")
    unlike = worker("a", LoadState.FAILED, "bad opset"), worker("b", LoadState.FAILED, "no memory")
    assert judged(*unlike) == (Loading.FAILED, "a: bad opset; b: no memory")


def test_a_pool_without_workers_is_waited_for_until_it_is_late() -> None:
    assert judged()[0] is Loading.WAIT
    assert judged(late=True) == (
        Loading.FAILED,
        "no worker of pool 'cpu' had the version ready in time (no live workers)",
    )


def test_what_holds_workers_up_is_told_once_it_is_late() -> None:
    stuck = worker("a", LoadState.LOADING, "the store is full"), worker("b", LoadState.FAILED, "bad opset")
    assert judged(*stuck)[0] is Loading.WAIT
    assert judged(*stuck, late=True) == (
        Loading.FAILED,
        "no worker of pool 'cpu' had the version ready in time (2 live workers): a: the store is full; b: bad opset",
    )


def test_other_pools_draining_workers_and_other_bytes_do_not_count() -> None:
    draining = worker("c", LoadState.READY).model_copy(update={"draining": True})
    others = worker("a", LoadState.READY, pool="gpu"), worker("b", LoadState.READY, sha256="f" * 64), draining
    assert judged(*others)[0] is Loading.WAIT
    assert judged(*others, late=True) == (
        Loading.FAILED,
        "no worker of pool 'cpu' had the version ready in time (1 live worker)",
    )


# --- a rollout's steps ------------------------------------------------------------------------------------------------


def rollout() -> Rollout:
    return Rollout(
        UUID(int=1), MODEL, assigned(2), "immediate", "ann", started_at=NOW, load_by=NOW + timedelta(minutes=2)
    )


def test_a_rollout_that_shifted_ends_promoted_and_knows_what_served_before() -> None:
    end = finished(shifting(rollout(), "ready"), deployed(1, 2), NOW)
    assert (end.state, end.previous, end.percent, end.reason) == (State.PROMOTED, 1, 100, "ready")


def test_a_rollout_that_was_failing_ends_failed_with_its_reason() -> None:
    end = finished(failing(rollout(), "bad opset"), deployed(1), NOW)
    assert (end.state, end.previous, end.percent, end.reason) == (State.FAILED, None, 0, "bad opset")
    assert end.finished_at == NOW
