import pytest
from hypothesis import given
from hypothesis import strategies as st
from lepton.models import ModelLimits
from lepton.policies import Policy
from lepton_common.errors import Conflict, Invalid, NotFound
from lepton_common.records import Cache, Limits, Serving, Share
from lepton_common.types import ModelRef
from lepton_rollout.policy import Kind, Stage
from lepton_rollout.record import (
    TOTAL_WEIGHT,
    abandoned,
    caching,
    cooled,
    limited,
    moved,
    promoted,
    returned,
    staged,
    unserved,
    warmed,
    weights,
    withdrawn,
)
from lepton_rollout.views import serving_view

from .stand_ins import assigned

MODEL = ModelRef("default", "digits")


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


def test_a_cache_stays_on_whatever_is_served_until_it_is_turned_off() -> None:
    on = Cache(ttl_s=60, max_bytes=1000)
    serving = withdrawn(promoted(warmed(caching(deployed(1), on), assigned(2)), 2))
    assert serving.cache == on
    off = caching(serving, None)
    assert (off.cache, off.generation) == (None, serving.generation + 1)
    with pytest.raises(NotFound, match="not served"):
        caching(unserved(MODEL), on)


def test_limits_hold_whatever_is_served_until_they_are_changed() -> None:
    strict = Limits(rate_per_s=2, burst=5)
    serving = withdrawn(promoted(warmed(limited(deployed(1), strict), assigned(2)), 2))
    assert serving.limits == strict
    back = limited(serving, Limits())
    assert (back.limits, back.generation) == (Limits(), serving.generation + 1)
    with pytest.raises(Invalid, match="rate_per_s"):
        limited(serving, Limits(burst=5))
    with pytest.raises(NotFound, match="not served"):
        limited(unserved(MODEL), strict)


_COUNTS = st.none() | st.integers(1, 2**31 - 1)
_RATES = st.none() | st.floats(0, exclude_min=True, allow_infinity=False)
_LIMITS = st.builds(
    ModelLimits,
    rate_per_s=_RATES,
    burst=_COUNTS,
    max_concurrency=_COUNTS,
    timeout_ms=st.none() | st.integers(1, 3_600_000),
).filter(lambda wanted: wanted.burst is None or wanted.rate_per_s is not None)


@given(_LIMITS)
def test_limits_hold_as_asked_for_and_asked_for_again_as_shown_change_nothing(wanted: ModelLimits) -> None:
    asked = wanted.model_dump(exclude_none=True)
    serving = limited(deployed(1), Limits(**asked))
    shown = serving_view(serving, ()).limits.model_dump(exclude_none=True)
    assert shown == {"max_concurrency": 1024, "timeout_ms": 30_000, **asked}
    assert limited(serving, Limits(**shown)) is serving


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


def test_a_version_that_is_where_it_shall_be_is_not_moved_whatever_was_warmed_after_it() -> None:
    serving = warmed(deployed(1), assigned(2))
    assert moved(serving, assigned(1)) is serving
    both = warmed(serving, assigned(2, "gpu"))
    assert [(each.version, each.pool) for each in moved(both, assigned(2, "gpu")).versions] == [(1, "cpu"), (2, "gpu")]


def test_the_version_that_traffic_returns_to_is_not_cooled() -> None:
    baking = staged(warmed(deployed(1), assigned(2)), 2, Stage(2, Kind.ALL, 100.0, bake=True), Policy(), "salt")
    assert split(baking) == {2: 100}
    with pytest.raises(Conflict, match="returns to"):
        cooled(baking, 1)


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
