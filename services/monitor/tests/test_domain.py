import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lepton_common.errors import Limited
from lepton_common.events import InferenceWindow, ShadowWindow, Tally, VersionWindow
from lepton_common.sketch import quantile_ms
from lepton_monitor.domain import (
    CALLERS,
    KNOWN_S,
    LONGEST_WAIT_S,
    MARKER,
    MOST_COUNTERS,
    MOST_VERSIONS,
    Content,
    Progress,
    after_closing,
    attributed,
    bounded,
    by_minute,
    closable,
    counted,
    due_s,
    heard,
    merge,
    to_mark,
)

from .stand_ins import START, version, window

counts = st.integers(0, 1000)
sketches = st.dictionaries(st.integers(0, 1100), st.integers(1, 1000), max_size=5)
names = st.sampled_from(["complaints", "empty", "refunds"])
tallies = st.builds(
    Tally, ok=counts, client_errors=counts, server_errors=counts, timeouts=counts, shed=counts, latency=sketches
)
version_windows = st.builds(
    VersionWindow,
    version=st.integers(0, 3),
    pool=st.sampled_from(["cpu", "gpu"]),
    forced=st.booleans(),
    ok=counts,
    client_errors=counts,
    server_errors=counts,
    timeouts=counts,
    shed=counts,
    latency=sketches,
    users=st.none() | tallies,
    counters=st.dictionaries(names, st.integers(1, 100), max_size=3),
)
shadow_windows = st.builds(
    ShadowWindow, version=st.integers(1, 3), agreed=counts, disagreed=counts, failed=counts, latency=sketches
)
contents = st.builds(
    lambda versions, shadow, in_flight: merge([Content(tuple(versions), shadow, in_flight)]),
    st.lists(version_windows, max_size=4),
    st.none() | shadow_windows,
    counts,
)


class Stream:
    """A model's stream as it is read: what closes, without any database."""

    def __init__(self) -> None:
        self.progress = Progress()
        self.inputs: dict[int, dict[tuple[str, int], Content]] = {}
        self.closed: list[tuple[int, int, Content]] = []
        self.late = 0

    def read(self, event: InferenceWindow) -> None:
        if event.gateway != MARKER:
            content = Content(event.versions, event.shadow, event.in_flight)
            told = self.inputs.setdefault(event.second, {})
            before = told.get((event.gateway, event.epoch))
            if event.second <= self.progress.closed:
                self.late += before is None or before.requests < content.requests
                return
            if before is None or before.requests <= content.requests:
                told[event.gateway, event.epoch] = content
        is_final = event.at.timestamp() >= event.second + 1
        self.progress = heard(self.progress, event.gateway, event.second, is_final=is_final)
        seconds = closable(self.progress, sorted(each for each in self.inputs if each > self.progress.closed))
        for number, second in enumerate(seconds, 1):
            content = merge(self.inputs[second].values())
            self.closed.append((second, self.progress.sequence + number, content))
        if seconds:
            oldest = min((each for each in self.inputs if each > seconds[-1]), default=None)
            self.progress = after_closing(self.progress, seconds[-1], len(seconds), oldest)


def marker(second: int) -> InferenceWindow:
    return window(second, MARKER).model_copy(update={"versions": ()})


def interleaved(streams: Sequence[Sequence[InferenceWindow]], chance: random.Random) -> list[InferenceWindow]:
    """All of it, each stream in its own order."""
    order = [number for number, stream in enumerate(streams) for _ in stream]
    chance.shuffle(order)
    left = [iter(stream) for stream in streams]
    return [next(left[number]) for number in order]


@given(contents, contents, contents)
def test_merging_is_associative_and_commutative(a: Content, b: Content, c: Content) -> None:
    assert merge([a, b]) == merge([b, a])
    assert merge([merge([a, b]), c]) == merge([a, merge([b, c])]) == merge([c, b, a])
    assert merge([a, Content()]) == a


@given(contents, contents)
def test_merging_loses_no_request(a: Content, b: Content) -> None:
    assert merge([a, b]).requests == a.requests + b.requests


@given(st.lists(st.tuples(st.integers(0, 200), contents), max_size=8), st.integers(0, 8))
def test_minutes_are_the_same_however_they_are_rolled_up(seconds: list[tuple[int, Content]], cut: int) -> None:
    whole = by_minute(seconds)
    first, second = by_minute(seconds[:cut]), by_minute(seconds[cut:])
    both = {
        minute: merge([*(each[minute] for each in (first, second) if minute in each)])
        for minute in first.keys() | second.keys()
    }
    assert both == whole


@given(
    st.lists(st.lists(st.booleans(), min_size=30, max_size=30), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_repeated_and_reordered_windows_close_the_same_seconds(told: list[list[bool]], chance: random.Random) -> None:
    gateways = "abcd"[: len(told)]
    first = [window(START, gateway) for gateway in gateways]
    streams = [
        [
            window(START + 1 + second, gateway, version(1, ok=second + 1))
            for second, is_told in enumerate(each)
            if is_told
        ]
        for gateway, each in zip(gateways, told, strict=True)
    ]
    end = marker(START + 100)
    everything = [event for stream in streams for event in stream]

    plain = Stream()
    for event in (*first, marker(START), *sorted(everything, key=lambda event: event.second), end):
        plain.read(event)

    disturbed = Stream()
    later = interleaved(streams, chance)
    for event in later[:]:
        later.insert(chance.randrange(later.index(event), len(later)) + 1, event)
    for event in (*first, marker(START), *later, end):
        disturbed.read(event)

    assert disturbed.closed == plain.closed
    assert plain.late == disturbed.late == 0
    assert [second for second, _, _ in plain.closed] == sorted({event.second for event in (*first, *everything)})
    assert [sequence for _, sequence, _ in plain.closed] == list(range(1, len(plain.closed) + 1))


def test_who_is_known_is_waited_for_and_forgotten_after_a_while() -> None:
    progress = after_closing(heard(Progress(), "a", START, is_final=True), START, 1, None)
    progress = heard(progress, "b", START - KNOWN_S, is_final=True)
    near, far = START + 1, START + KNOWN_S + 1
    assert closable(heard(progress, "a", near, is_final=True), [near]) == [near]
    known = heard(progress, "b", START, is_final=True)
    assert closable(heard(known, "a", near, is_final=True), [near]) == []
    # After so long, it is not known whether others come back as well.
    assert closable(heard(known, "a", far, is_final=True), [far]) == []
    gone = after_closing(heard(known, "a", far, is_final=True), far, 1, None)
    assert set(gone.done) == {"a"}


def test_callers_counters_are_no_gateway_to_wait_for() -> None:
    progress = heard(Progress(closed=START, done={"a": START}), CALLERS, START + 1, is_final=True)
    assert (progress.oldest, dict(progress.done)) == (START + 1, {"a": START})
    assert closable(progress, [START + 1]) == []
    assert closable(heard(progress, "a", START + 1, is_final=True), [START + 1]) == [START + 1]


def test_the_wait_is_as_long_as_the_first_window_took_within_bounds() -> None:
    end = START + 1
    assert due_s(START, end + 0.05) == pytest.approx(end + 0.95)
    assert due_s(START, end + 2) == end + 4
    assert due_s(START, end + 3600) == end + 3600 + LONGEST_WAIT_S
    # A counter that a caller told in the middle of the second does not end it.
    assert due_s(START, START + 0.1) == START + 1.5


def test_only_seconds_before_the_first_that_must_wait_are_marked() -> None:
    arrivals = [(START, START + 1.0), (START + 1, START + 2.0), (START + 2, START + 3.0), (START + 3, START + 3.0)]
    assert to_mark(arrivals, START + 3.0) == (START + 1, START + 3.9)
    assert to_mark(arrivals, START + 1.0) == (None, START + 1.9)
    assert to_mark([], START) == (None, None)


def test_counters_that_callers_told_join_the_live_traffic_of_their_version() -> None:
    live, tested = version(1, ok=5, pool="cpu"), version(1, ok=9, pool="cpu", forced=True)
    content = counted(counted(Content((live, tested)), 1, "complaints", 2), 2, "complaints", 1)
    joined = attributed(content)
    assert [(each.version, each.forced, each.counters) for each in joined.versions] == [
        (1, False, {"complaints": 2}),
        (1, True, {}),
        (2, False, {"complaints": 1}),
    ]


def test_a_second_has_room_for_so_many_counters() -> None:
    content = Content()
    for number in range(MOST_COUNTERS):
        content = counted(content, 1, f"c{number}", 1)
    with pytest.raises(Limited, match="counter 'one_more': at most 50 counters of 16 versions in a second"):
        counted(content, 1, "one_more", 1)
    assert counted(content, 1, "c1", 4).versions[0].counters["c1"] == 5


def test_of_too_many_versions_the_busiest_are_told() -> None:
    content = Content(tuple(version(number, ok=number) for number in range(1, MOST_VERSIONS + 4)))
    assert [each.version for each in bounded(content).versions] == list(range(4, MOST_VERSIONS + 4))


def test_percentiles_of_merged_latencies_are_within_one_percent_of_the_true_ones() -> None:
    chance = random.Random(1)
    latencies = [chance.lognormvariate(3, 1) for _ in range(10_000)]
    merged = merge(Content((version(1, ms, ok=1),)) for ms in latencies).versions[0].latency
    for quantile in (0.5, 0.95, 0.99):
        true = sorted(latencies)[int(quantile * (len(latencies) - 1))]
        assert quantile_ms(merged, quantile) == pytest.approx(true, rel=0.0101)
