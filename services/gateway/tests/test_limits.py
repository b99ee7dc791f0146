"""Rates, concurrency and daily quotas as rules."""

from hypothesis import given
from hypothesis import strategies as st
from lepton_common.records import KeyLimits
from lepton_gateway.limits import DayUse, TokenBucket, Use

rates = st.floats(0.01, 10_000)
bursts = st.integers(1, 100)
pauses = st.lists(st.floats(0, 3), max_size=200)


@given(rates, bursts, pauses)
def test_no_stretch_of_time_has_more_than_its_burst_and_rate(rate: float, burst: int, pauses: list[float]) -> None:
    bucket, now, taken = TokenBucket(rate, burst), 1000.0, []
    for pause in pauses:
        now += pause / rate
        if bucket.wait_s(now) == 0.0:
            bucket.take(now)
            taken.append(now)
    for first, start in enumerate(taken):
        for count, end in enumerate(taken[first:], start=1):
            assert count <= burst + rate * (end - start) + 1e-3


@given(rates, bursts, pauses)
def test_the_wait_that_is_told_is_the_wait_that_is_needed(rate: float, burst: int, pauses: list[float]) -> None:
    bucket, now = TokenBucket(rate, burst), 1000.0
    for pause in pauses:
        now += pause / rate
        wait_s = bucket.wait_s(now)
        if wait_s > 0:
            assert bucket.wait_s(now + wait_s * 0.99) > 0 or wait_s < 1e-6
        now += wait_s
        assert bucket.wait_s(now) == 0.0
        bucket.take(now)


def test_a_bucket_without_a_burst_holds_a_seconds_worth() -> None:
    bucket = TokenBucket(2.5, None)
    taken = 0
    while bucket.wait_s(5.0) == 0.0:
        bucket.take(5.0)
        taken += 1
    assert taken == 3


def test_the_lowest_rate_there_can_be_lets_through_its_burst_and_no_more() -> None:
    bucket = TokenBucket(5e-324, 2)
    taken = 0
    while bucket.wait_s(5.0) == 0.0:
        bucket.take(5.0)
        taken += 1
    assert (taken, bucket.wait_s(5.0)) == (2, 1e6)


def test_limits_told_again_do_not_fill_the_bucket() -> None:
    use = Use("this API key", KeyLimits(rate_per_s=1, burst=1))
    use.take(0.0)
    use.change(KeyLimits(rate_per_s=1, burst=1))
    assert use.wait_s(0.0) == 1.0
    use.change(KeyLimits(rate_per_s=2, burst=1))
    assert use.wait_s(0.0) == 0.0


def test_a_changed_quota_forgets_nothing_of_the_day() -> None:
    use = Use("this API key", KeyLimits(per_day=5))
    assert use.day is not None
    use.day.on(7)
    use.take(0.0)
    use.change(KeyLimits(per_day=6))
    assert use.day.on(7) == 1


@given(st.lists(st.sampled_from(["take", "share", "midnight"]), max_size=50))
def test_requests_of_a_day_are_counted_once_whoever_hears_of_them(steps: list[str]) -> None:
    ours, others, told, day, taken = DayUse(), 10, 0, 1, 0
    ours.on(day)
    for step in steps:
        if step == "take":
            ours.take()
            taken += 1
        elif step == "share":
            told += ours.unshared
            ours.shared(day, ours.unshared, told + others)
            assert ours.used == taken + others
        else:
            day += 1
            taken = told = 0
            assert ours.on(day) == 0
    assert ours.unshared == taken - told
