"""What people are shown."""

from datetime import UTC, datetime, timedelta

import pytest
from lepton.render import size, when

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("ahead_s", "shown"),
    [
        (0, "0 s ago"),
        (-59, "59 s ago"),
        (-60, "1 min ago"),
        (-7300, "2 h ago"),
        (-86400 * 3, "3 d ago"),
        (90, "in 1 min"),
    ],
)
def test_times_are_told_in_the_largest_unit_that_fits(ahead_s: int, shown: str) -> None:
    assert when(NOW + timedelta(seconds=ahead_s), NOW) == shown


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (999, "999 B"), (70_253, "70.3 kB"), (2_500_000, "2.5 MB"), (3e9, "3 GB")]
)
def test_sizes_are_told_in_three_digits(count: float, shown: str) -> None:
    assert size(count) == shown
