from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lepton_common.sketch import (
    BUCKETS_PER_LOG,
    FIRST,
    LAST,
    ONE_SECOND,
    RELATIVE_ERROR,
    bucket_of,
    count_above,
    merged,
    milliseconds_of,
    quantile_bucket,
    quantile_ms,
)

SECONDS = st.floats(1e-6, 3600, allow_nan=False)
LATENCIES = st.lists(SECONDS, min_size=1, max_size=300)
SKETCHES = st.dictionaries(st.integers(FIRST, LAST), st.integers(1, 10**9), max_size=20)
# Rounding of logarithms may carry a value that lies on an edge to the other side of it.
ERROR = RELATIVE_ERROR + 1e-9


def sketch_of(latencies: list[float]) -> dict[int, int]:
    return merged({bucket_of(seconds): 1} for seconds in latencies)


@given(SECONDS)
def test_a_bucket_stands_for_its_latencies_within_one_percent(seconds: float) -> None:
    bucket = bucket_of(seconds)
    assert FIRST <= bucket <= LAST
    assert milliseconds_of(bucket) == pytest.approx(seconds * 1e3, rel=ERROR)


@given(SECONDS, SECONDS)
def test_the_slower_of_two_is_never_in_a_lower_bucket(one: float, other: float) -> None:
    assert bucket_of(min(one, other)) <= bucket_of(max(one, other))


@given(st.integers(FIRST + 1, LAST - 1))
def test_the_value_of_a_bucket_belongs_to_it(bucket: int) -> None:
    assert bucket_of(milliseconds_of(bucket) / 1e3) == bucket


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(0.0, FIRST), (-1.0, FIRST), (nan, FIRST), (-inf, FIRST), (1e-9, FIRST), (3600.0, LAST), (1e9, LAST), (inf, LAST)],
)
def test_what_is_outside_is_counted_at_the_edge(seconds: float, bucket: int) -> None:
    assert bucket_of(seconds) == bucket


def test_the_constants_of_the_hot_path_say_the_same() -> None:
    assert bucket_of(1.0) == round(ONE_SECOND + 0.5)
    assert bucket_of(2.718281828459045) == pytest.approx(ONE_SECOND + BUCKETS_PER_LOG, abs=1)


@given(LATENCIES, st.floats(0, 1))
def test_a_quantile_is_within_one_percent_of_the_exact_one(latencies: list[float], quantile: float) -> None:
    exact = sorted(latencies)[int(quantile * (len(latencies) - 1))]
    assert quantile_ms(sketch_of(latencies), quantile) == pytest.approx(exact * 1e3, rel=ERROR)


@given(st.lists(LATENCIES, max_size=5))
def test_merged_sketches_are_the_sketch_of_all_latencies(parts: list[list[float]]) -> None:
    together = [seconds for part in parts for seconds in part]
    assert merged(map(sketch_of, parts)) == sketch_of(together)


@given(SKETCHES, SKETCHES, SKETCHES)
def test_merging_has_no_order(one: dict[int, int], two: dict[int, int], three: dict[int, int]) -> None:
    assert merged([one, merged([two, three])]) == merged([merged([three, one]), two])
    assert merged([one]) == one


@given(SKETCHES, st.integers(FIRST - 1, LAST + 1))
def test_what_is_above_a_bucket_and_what_is_not_are_everything(sketch: dict[int, int], bucket: int) -> None:
    below = sum(count for each, count in sketch.items() if each <= bucket)
    assert count_above(sketch, bucket) + below == sum(sketch.values())


@given(SKETCHES, st.floats(0, 1), st.floats(0, 1))
def test_quantiles_are_in_order(sketch: dict[int, int], one: float, other: float) -> None:
    low, high = (quantile_bucket(sketch, each) for each in sorted((one, other)))
    if not sketch:
        assert low is high is None
        assert quantile_ms(sketch, one) is None
    else:
        assert low is not None
        assert high is not None
        assert low <= high


@given(SKETCHES.filter(bool))
def test_the_extreme_quantiles_are_the_extreme_buckets(sketch: dict[int, int]) -> None:
    assert quantile_bucket(sketch, 0) == min(sketch)
    assert quantile_bucket(sketch, 1) == max(sketch)
