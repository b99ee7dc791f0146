"""Windows that come twice, out of order, late or never: what is decided is what the windows say, not how they came."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from lepton.policies import Comparison, Judging, Policy
from lepton.rollouts import Action
from lepton_common.events import VersionWindow, WindowClosed
from lepton_common.sketch import bucket_of
from lepton_rollout.domain import GAP_S, SILENT_S, Rollout, applied, observed, shifting, stepped
from lepton_rollout.judge import Observation, baseline

from .test_domain import NOW, rollout

BEGIN = int(NOW.timestamp())
FAST = bucket_of(0.01)
SECONDS = 40
# At its second step, where proof is asked for.
POLICY = Policy(
    steps=[10.0, 50.0],
    dwell_s=10,
    judge=Judging(errors=Comparison(margin=3, acceptable=0.05), slow=Comparison(margin=3, acceptable=0.3)),
)
Decided = tuple[Action, int]


def window(number: int, errors: int) -> WindowClosed:
    """The so-many-th second of 50 requests each; the candidate has `errors`, the stable one."""
    return WindowClosed(
        tenant="default",
        model="digits",
        second=BEGIN + number,
        sequence=number,
        gateways=1,
        versions=(
            VersionWindow(version=1, ok=49, server_errors=1, latency={FAST: 50}),
            VersionWindow(version=2, ok=50 - errors, server_errors=errors, latency={FAST: 50}),
        ),
    )


def begun() -> Rollout:
    usual = baseline([Observation(0, stable=VersionWindow(version=1, ok=1000, latency={FAST: 1000}))])
    first = applied(shifting(rollout(POLICY), "ready"), NOW, usual)
    second = applied(stepped(first, "as good"), NOW, usual)
    # The window before the first is known by its number, so that a gap at the very beginning shows.
    return replace(second, walk=replace(second.walk, sequence=1, judged=BEGIN + 1))


def decide(arrivals: Iterable[tuple[float, WindowClosed]]) -> Decided | None:
    """The first decision, with the second it was made on: the runner's loop, with a table of windows before it."""
    known: dict[int, WindowClosed] = {}
    after = begun()
    for now, arrived in [*arrivals, (float(BEGIN + 10 * SECONDS), None)]:
        if arrived is not None:
            known.setdefault(arrived.second, arrived)
        before = None
        while before != after:
            before = after
            todo = [known[second] for second in sorted(known) if second > before.walk.judged]
            after = observed(before, todo, now)
            verdict = after.walk.verdict
            if verdict is not None and verdict.action is not Action.HOLD:
                return verdict.action, verdict.second
    return None


def in_order(windows: Sequence[WindowClosed]) -> list[tuple[float, WindowClosed]]:
    """Each is there half a second after its second is over."""
    return [(each.second + 1.5, each) for each in windows]


STREAMS = st.lists(st.integers(0, 12), min_size=SECONDS, max_size=SECONDS).map(
    lambda errors: [window(number + 2, each) for number, each in enumerate(errors)]
)
GOOD = [window(number + 2, 1) for number in range(SECONDS)]
BAD = [window(number + 2, 25) for number in range(SECONDS)]


@given(STREAMS, st.lists(st.floats(0, GAP_S - 1), min_size=SECONDS, max_size=SECONDS), st.data())
def test_windows_twice_and_out_of_order_change_no_decision(
    windows: list[WindowClosed], delays: list[float], data: st.DataObject
) -> None:
    late = [(at + delay, each) for (at, each), delay in zip(in_order(windows), delays, strict=True)]
    again = data.draw(st.lists(st.sampled_from(late), max_size=SECONDS))
    twice = [(at + data.draw(st.floats(0, 20)), each) for at, each in again]
    arrivals = sorted([*late, *twice], key=lambda arrival: arrival[0])
    assert decide(arrivals) == decide(in_order(windows))


@given(st.sets(st.integers(0, SECONDS - 1)))
def test_windows_that_never_come_neither_accuse_nor_acquit(missing: set[int]) -> None:
    good = decide(in_order([each for number, each in enumerate(GOOD) if number not in missing]))
    bad = decide(in_order([each for number, each in enumerate(BAD) if number not in missing]))
    assert good is None or good[0] is Action.STEP
    assert bad is None or bad[0] is Action.ROLL_BACK


@given(STREAMS, st.sets(st.integers(0, SECONDS - 1), max_size=10))
def test_windows_that_come_when_nobody_waits_any_more_count_as_missing(
    windows: list[WindowClosed], late: set[int]
) -> None:
    on_time = [each for number, each in enumerate(windows) if number not in late]
    too_late = [(each.second + 1000.0, each) for number, each in enumerate(windows) if number in late]
    assert decide([*in_order(on_time), (BEGIN + 500.0, on_time[-1]), *too_late]) == decide(in_order(on_time))


def test_good_windows_lead_on_and_bad_ones_back() -> None:
    good, bad = decide(in_order(GOOD)), decide(in_order(BAD))
    assert good is not None
    assert bad is not None
    assert (good[0], bad[0]) == (Action.STEP, Action.ROLL_BACK)
    assert bad[1] - BEGIN <= 5


def test_after_an_outage_harm_is_found_at_once_behind_all_that_was_well() -> None:
    outage = [window(number + 2, 1) for number in range(1800)]
    harm = [window(number + 1802, 25) for number in range(SECONDS)]

    after = observed(begun(), [*outage, *harm], harm[-1].second + 1.5)

    assert after.walk.verdict is not None
    assert after.walk.verdict.action is Action.ROLL_BACK
    assert harm[0].second < after.walk.verdict.second < harm[9].second


def test_what_is_well_now_is_what_an_outage_ends_with() -> None:
    outage = [window(number + 2, 1) for number in range(1800)]

    after = observed(begun(), outage, outage[-1].second + 1.5)

    assert after.walk.verdict is not None
    assert (after.walk.verdict.action, after.walk.judged) == (Action.STEP, outage[-1].second - SILENT_S + 2)


def test_a_paused_rollout_is_judged_to_its_newest_window() -> None:
    windows = [window(number + 2, 1) for number in range(100)]
    waiting = begun()
    waiting = replace(waiting, walk=replace(waiting.walk, paused=True))

    assert observed(waiting, windows, windows[-1].second + 1.5).walk.judged == windows[-1].second
