from hypothesis import given
from hypothesis import strategies as st
from lepton_worker.usage import Usage

RUNS = st.lists(st.tuples(st.sampled_from("abc"), st.floats(1e-4, 1), st.floats(0, 0.5)), min_size=1, max_size=40)


def used(*runs: tuple[str, float, float]) -> tuple[Usage, float]:
    """Runs of tenants, how long they took, and how long after the one before; and when the last one ended."""
    usage, now = Usage(), 1000.0
    for tenant, seconds, pause_s in runs:
        now += pause_s
        usage.add(tenant, seconds, now)
    return usage, now


def test_alone_nobody_uses_too_much() -> None:
    usage, _ = used(*[("flood", 0.1, 0.05)] * 100)
    assert not usage.of("flood").is_large
    assert not usage.of("unknown").is_large


def test_who_uses_more_than_others_is_large_until_they_have_been_away_for_a_while() -> None:
    usage, now = used(*[("flood", 0.1, 0.03), ("polite", 0.015, 0.02)] * 50)
    flood, polite = usage.of("flood"), usage.of("polite")
    assert (flood.is_large, polite.is_large) == (True, False)
    for _ in range(600):
        now += 0.05
        flood.add(0.1, now)
    assert not flood.is_large


def test_many_short_runs_are_much() -> None:
    usage, _ = used(*[("flood", 0.0009, 0.001)] * 1000, ("polite", 0.005, 0.0))
    assert usage.of("flood").is_large
    assert not usage.of("polite").is_large


def test_what_was_used_is_forgotten() -> None:
    usage, now = used(*[("first", 0.1, 0.05)] * 50)
    for _ in range(200):
        now += 0.05
        usage.add("second", 0.05, now)
        usage.add("first", 0.01, now)
    assert usage.of("second").is_large
    assert not usage.of("first").is_large


@given(RUNS)
def test_never_all_are_large_and_who_uses_by_far_the_most_is(runs: list[tuple[str, float, float]]) -> None:
    usage, now = used(*runs)
    large = {tenant for tenant in "abc" if usage.of(tenant).is_large}
    assert large < {tenant for tenant, _, _ in runs}
    usage.add("d", 1000.0, now)
    assert [tenant for tenant in "abcd" if usage.of(tenant).is_large] == ["d"]
