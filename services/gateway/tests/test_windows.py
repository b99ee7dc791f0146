"""Windows by themselves: whatever comes when, nothing is lost, counted twice, or put into the wrong second."""

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lepton_common.sketch import bucket_of
from lepton_common.types import ModelRef
from lepton_gateway.metrics import BUCKETS_S, histogram
from lepton_gateway.reporter import event_of
from lepton_gateway.windows import ASKED, FORCED, QUEUE_FULL, SPLIT, Closed, Counts, Outcome, Windows, outcome_of

from .lab import counted

START = 1_800_000_000.0
M = ModelRef("acme", "m")


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Answer:
    """An answer and the time that passes before it; a negative one is a clock set back."""

    after_s: float
    model: str
    kind: int
    version: bytes
    status: int
    seconds: float


ANSWERS = st.lists(
    st.builds(
        Answer,
        st.one_of(st.just(0.0), st.floats(0, 0.3), st.floats(-10, 10)),
        st.sampled_from(["m", "n"]),
        st.sampled_from([SPLIT, FORCED, ASKED]),
        st.sampled_from([b"", b"1", b"2", b"x"]),
        st.sampled_from([200, 302, 400, 429, 500, 503, QUEUE_FULL, 504]),
        st.floats(0, 100),
    ),
    max_size=60,
)
FIELDS = {
    Outcome.OK: "ok",
    Outcome.CLIENT_ERROR: "client_errors",
    Outcome.SHED: "shed",
    Outcome.TIMEOUT: "timeouts",
    Outcome.SERVER_ERROR: "server_errors",
}


def request(counts: Counts) -> None:
    """A request comes in, as the proxy does it."""
    counts.in_flight += 1
    if not counts.is_awake:
        counts.wake()


def answer(
    counts: Counts, kind: int, version: bytes, status: int, seconds: float = 0.01, user: int | None = None
) -> None:
    request(counts)
    counts.add(kind, version, status, seconds, user)
    counts.in_flight -= 1


def closed_of(windows: Windows) -> list[Closed]:
    windows.close(int(windows.clock()) + 1)
    return list(windows.closed)


def replay(windows: Windows, clock: Clock, answers: list[Answer]) -> dict[str, Counts]:
    models = {name: windows.of(ModelRef("acme", name)) for name in ("m", "n")}
    for each in answers:
        clock.now += each.after_s
        answer(models[each.model], each.kind, each.version, each.status, each.seconds)
    return models


@given(ANSWERS)
def test_windows_add_up_to_the_answers(answers: list[Answer]) -> None:
    windows = Windows(clock := Clock())
    replay(windows, clock, answers)
    told = [event_of(each, "g") for each in closed_of(windows)]

    expected: Counter[tuple[int, bool, str]] = Counter()
    for each in answers:
        if each.kind != ASKED:
            version = int(each.version) if each.version.isdigit() else 0
            expected[version, each.kind == FORCED, FIELDS[outcome_of(each.status)]] += 1
            expected[version, each.kind == FORCED, "latency"] += 1
    assert counted(told) == expected
    assert len({each.id for each in told}) == len(told)


@given(ANSWERS)
def test_an_answer_is_in_the_second_in_which_it_was_given_however_the_clock_jumps(answers: list[Answer]) -> None:
    windows = Windows(clock := Clock())
    replay(windows, clock, answers)
    found: Counter[tuple[str, int]] = Counter()
    for each in closed_of(windows):
        cells = [*each.split.values(), *each.forced.values()]
        found[each.ref.model, each.second] += sum(sum(cell.counts.values()) for cell in cells)

    expected: Counter[tuple[str, int]] = Counter()
    now = START
    for given_ in answers:
        now += given_.after_s
        expected[given_.model, int(now)] += given_.kind != ASKED
    assert +found == +expected


@given(ANSWERS)
def test_prometheus_sees_every_answer_at_once_and_none_twice(answers: list[Answer]) -> None:
    windows = Windows(clock := Clock())
    models = replay(windows, clock, answers)
    for _ in range(2):
        for name, counts in models.items():
            own = [each for each in answers if each.model == name]
            totals = counts.totals()
            seen = {(version, status): n for version, cell in totals.items() for status, n in cell.by_status().items()}
            assert seen == Counter((each.version, 503 if each.status == QUEUE_FULL else each.status) for each in own)
            assert sum(cell.seconds for cell in totals.values()) == pytest.approx(sum(each.seconds for each in own))
        closed_of(windows)


@given(st.lists(st.floats(1e-5, 100), max_size=50))
def test_prometheus_buckets_hold_what_they_say_within_one_percent(latencies: list[float]) -> None:
    counts = Windows(Clock()).of(M)
    for seconds in latencies:
        answer(counts, SPLIT, b"1", 200, seconds)
    cells = counts.totals()
    found = histogram(cells[b"1"].latency()) if cells else [0] * (len(BUCKETS_S) + 1)
    for index, bound in enumerate(BUCKETS_S):
        below = sum(found[: index + 1])
        assert sum(seconds * 1.021 <= bound for seconds in latencies) <= below
        assert below <= sum(seconds <= bound * 1.021 for seconds in latencies)


@pytest.mark.parametrize("seconds", [0.0, 1e-7, 1e-6, 0.00321, 1.0, 59.9, 3599.0])
def test_the_hot_paths_arithmetic_is_that_of_the_sketch(seconds: float) -> None:
    windows = Windows(Clock())
    answer(windows.of(M), SPLIT, b"1", 200, seconds)
    (closed,) = closed_of(windows)
    assert closed.split[b"1"].latency() == {bucket_of(seconds): 1}


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        *((status, Outcome.OK) for status in (200, 204)),
        *((status, Outcome.CLIENT_ERROR) for status in (400, 404, 413, 499)),
        *((status, Outcome.SHED) for status in (429, QUEUE_FULL)),
        (504, Outcome.TIMEOUT),
        *((status, Outcome.SERVER_ERROR) for status in (302, 500, 502, 503, 599)),
    ],
)
def test_outcomes_are_told_apart_by_status(status: int, outcome: Outcome) -> None:
    assert outcome_of(status) is outcome


def test_a_model_without_requests_tells_one_empty_window_and_then_nothing() -> None:
    windows = Windows(clock := Clock())
    answer(windows.of(M), SPLIT, b"1", 200)
    for _ in range(5):
        clock.now += 1
        windows.roll()
    assert [(each.second - int(START), bool(each.split)) for each in windows.closed] == [(0, True), (1, False)]


def test_a_model_that_does_not_answer_tells_of_its_requests_under_way() -> None:
    windows = Windows(clock := Clock())
    counts = windows.of(M)
    request(counts)
    for _ in range(3):
        clock.now += 1
        windows.roll()
    counts.add(SPLIT, b"1", 504, 3.0)
    counts.in_flight -= 1
    assert [each.in_flight for each in closed_of(windows)] == [1, 1, 1, 0]
    assert event_of(windows.closed[-1], "g").versions[0].timeouts == 1


def test_an_answer_that_closes_the_second_itself_was_under_way_at_its_end() -> None:
    windows = Windows(clock := Clock())
    counts = windows.of(M)
    request(counts)
    clock.now += 7  # The process was frozen: nobody closed a second.
    counts.add(SPLIT, b"1", 200, 7.0)
    counts.in_flight -= 1
    first, last = closed_of(windows)
    assert (first.second, first.in_flight, dict(first.split)) == (int(START), 1, {})
    assert (last.second, last.in_flight, last.split[b"1"].by_status()) == (int(START) + 7, 0, {200: 1})


def test_a_clock_set_back_begins_a_new_epoch() -> None:
    windows = Windows(clock := Clock())
    counts = windows.of(M)
    for shift in (0, -1, 1):
        clock.now += shift
        answer(counts, SPLIT, b"1", 200)
    told = [event_of(each, "g") for each in closed_of(windows)]
    assert [(each.second - int(START), each.versions[0].ok) for each in told] == [(0, 1), (-1, 1), (0, 1)]
    assert told[0].epoch < told[1].epoch == told[2].epoch
    assert len({each.id for each in told}) == 3


def test_the_same_window_is_always_the_same_event() -> None:
    windows = Windows(Clock())
    answer(windows.of(M), SPLIT, b"1", 200)
    (closed,) = closed_of(windows)
    assert event_of(closed, "g") == event_of(closed, "g")
    assert event_of(closed, "g").id != event_of(closed, "h").id


def test_refused_requests_and_callers_that_left_belong_to_no_version() -> None:
    windows = Windows(Clock())
    counts = windows.of(M)
    counts.refused()
    request(counts)
    counts.left(SPLIT, 0.5)
    counts.in_flight -= 1
    (window,) = [event_of(each, "g") for each in closed_of(windows)]
    (version,) = window.versions
    assert (version.version, version.shed, version.client_errors, version.latency) == (0, 1, 1, {})
    assert counts.totals()[b""].by_status() == {499: 1}  # Prometheus counts refusals elsewhere.


def test_users_count_once_by_their_worst_and_slowest() -> None:
    windows = Windows(Clock())
    counts = windows.of(M)
    for version, status, seconds, user in [
        (b"1", 200, 0.9, 1),
        (b"1", 500, 0.1, 1),
        (b"1", 504, 0.2, 1),
        (b"1", 200, 0.3, 2),
        (b"2", 429, 0.4, 3),
        (b"2", 400, 0.4, 3),
    ]:
        answer(counts, SPLIT, version, status, seconds, user)
    (window,) = [event_of(each, "g") for each in closed_of(windows)]
    one, two = (each.users for each in window.versions)
    assert one is not None
    assert two is not None
    assert (one.server_errors, one.ok, one.requests) == (1, 1, 2)
    assert one.latency == {bucket_of(0.9): 1, bucket_of(0.3): 1}
    assert (two.shed, two.requests) == (1, 1)
    assert [each.requests for each in window.versions] == [4, 2]


def test_users_of_a_second_are_bounded() -> None:
    windows = Windows(Clock())
    counts = windows.of(M)
    for user in range(100_010):
        answer(counts, SPLIT, b"1", 200, 0.01, user)
    answer(counts, SPLIT, b"1", 500, 0.01, 5)
    # One too many: each of their requests is somebody's.
    answer(counts, SPLIT, b"1", 500, 0.01, 100_009)
    (closed,) = closed_of(windows)
    (version,) = event_of(closed, "g").versions
    assert len(closed.split[b"1"].users) == 100_000
    assert version.users is not None
    assert (version.requests, version.users.requests, version.users.server_errors) == (100_012, 100_011, 2)
    assert sum(version.users.latency.values()) == 100_011


def test_who_does_not_say_who_they_are_is_a_user_of_their_own_where_users_are_sticky() -> None:
    windows = Windows(Clock())
    counts = windows.of(M)
    counts.sticky = True
    for version, status, seconds, user in [
        (b"1", 200, 0.9, 1),
        (b"1", 500, 0.1, 1),
        (b"1", 200, 0.9, None),
        (b"1", 200, 0.9, None),
        (b"1", 500, 0.1, None),
        (b"2", 504, 0.2, None),
        (b"2", QUEUE_FULL, 0.2, None),
        (b"", 502, 0.2, None),
    ]:
        answer(counts, SPLIT, version, status, seconds, user)
    answer(counts, FORCED, b"1", 200)
    (window,) = [event_of(each, "g") for each in closed_of(windows)]
    none, one, two, forced = (each.users for each in window.versions)
    assert none is forced is None
    assert one is not None
    assert two is not None
    assert (one.ok, one.server_errors, one.requests) == (2, 2, 4)
    assert one.latency == {bucket_of(0.9): 3, bucket_of(0.1): 1}
    assert (two.timeouts, two.shed, two.requests) == (1, 1, 2)


@given(ANSWERS, st.lists(st.sampled_from([None, 1, 2, 3]), min_size=60, max_size=60))
def test_users_are_the_named_ones_and_each_request_of_anybody_else(
    answers: list[Answer], users: list[int | None]
) -> None:
    windows = Windows(Clock())
    counts = windows.of(M)
    counts.sticky = True
    for each, user in zip(answers, users, strict=False):
        answer(counts, SPLIT, each.version, each.status, each.seconds, user)
    told = [version for each in closed_of(windows) for version in event_of(each, "g").versions]
    for version in (each for each in told if each.version):
        asked = [user for each, user in zip(answers, users, strict=False) if each.version == b"%d" % version.version]
        assert version.users is not None
        named = set(asked) - {None}
        assert version.users.requests == len(named) + asked.count(None)
        assert sum(version.users.latency.values()) == version.users.requests


def test_users_are_not_told_where_they_are_not_sticky() -> None:
    windows = Windows(Clock())
    answer(windows.of(M), SPLIT, b"1", 200)
    (window,) = [event_of(each, "g") for each in closed_of(windows)]
    assert window.versions[0].users is None


def test_a_window_says_where_each_version_ran() -> None:
    windows = Windows(Clock())
    counts = windows.of(M)
    counts.pools = {1: "cpu", 2: "cuda"}
    for version in (b"1", b"2", b"3", b""):
        answer(counts, SPLIT, version, 200)
    answer(counts, FORCED, b"2", 200)
    (window,) = [event_of(each, "g") for each in closed_of(windows)]
    assert [(each.version, each.pool, each.forced) for each in window.versions] == [
        (0, "", False),
        (1, "cpu", False),
        (2, "cuda", False),
        (3, "", False),
        (2, "cuda", True),
    ]


def test_a_model_that_went_and_came_back_goes_on_counting() -> None:
    windows = Windows(Clock())
    request(before := windows.of(M))
    assert windows.of(M) is before  # Somebody still waits for an answer.
    assert windows.of(ModelRef("other", "m")) is not before


def test_windows_that_nobody_takes_are_dropped_and_counted() -> None:
    windows = Windows(clock := Clock())
    counts = windows.of(M)
    for _ in range(5_010):
        answer(counts, SPLIT, b"1", 200)
        clock.now += 1
    windows.roll()
    assert (len(windows.closed), windows.dropped) == (5_000, 10)
    assert counts.totals()[b"1"].by_status() == {200: 5_010}
