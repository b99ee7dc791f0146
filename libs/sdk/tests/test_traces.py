"""A trace as people are shown it."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from lepton.cli_traces import _WIDTH, bars

STAGES = st.lists(st.floats(0, 1e6), min_size=1, max_size=8)


@given(STAGES)
def test_bars_follow_one_another_and_fill_the_width(stages_ms: list[float]) -> None:
    drawn = bars(stages_ms)
    assert all(len(each.strip()) >= 1 and len(each) <= _WIDTH for each in drawn)
    full = [each for each in drawn if "█" in each]
    for before, after in pairwise(full):
        assert len(before) == len(after) - len(after.lstrip())
    if sum(stages_ms) > 0:
        assert len(full[-1]) == _WIDTH
