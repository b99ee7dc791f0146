"""What a rollout looks like live."""

import io
from collections.abc import Iterator

import pytest
from lepton import Client
from lepton.errors import Unavailable
from lepton.evidence import Evidence, Side, evidence_of
from lepton.rollouts import Gate, GateState
from lepton.watch import Look, looks, view, watch
from rich.console import Console

from libs.sdk.tests import stories
from libs.sdk.tests.conftest import Platform
from libs.sdk.tests.traffic import problem


def shown(look: Look, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(view(look, stories.at(9)))
    text = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert isinstance(text, str)
    return "\n".join(line.strip() for line in text.splitlines()).strip()


def test_a_canary_under_way_shows_all_there_is_to_know_in_80_columns() -> None:
    story = stories.good()
    assert shown(Look(story.looks[2], story.decisions[:6])) == WALKING


WALKING = """\
digits version 2 against version 1   shifting · step 2 of 4 · canary · by
alice · 9 s

TRAFFIC                       SHARE  REQ/S  ERRORS (95 %)      P50 / P99 MS
version 1     ██████████░░░░  75 %   450    1.1 % (0.88-1.37)  2.1 / 8.4
version 2     ████░░░░░░░░░░  25 %   150    0.9 % (0.72-1.12)  2.1 / 8.4

EVIDENCE AGAINST
errors            ░░░░░░░░░░░░░░  0.3 of 120  1 of 118; the stable 21 of 2,240
slow p95          ░░░░░░░░░░░░░░  0.6 of 120  1 of 118; the stable 21 of 2,240
slow p99          ░░░░░░░░░░░░░░  0.8 of 120  1 of 118; the stable 21 of 2,240

EVIDENCE FOR
errors        ████████████░░  12 of 20    not proven yet
slow p95      ██████████████  61.5 of 20  proven

GATES
traffic       ✓ passed   41 of 30 requests
dwell         … waiting  2 of 4 s

WAITS         proof of errors

DECISIONS
03:04:07      shifted  5 %   the mesh acknowledged 5 %
03:04:08      hold     5 %   4 s at this step are not over
03:04:12      step     5 %   4 s and 118 requests without harm
03:04:12      shifted  25 %  the mesh acknowledged 25 %
03:04:14      hold     25 %  errors are not proved yet"""


def test_before_there_is_traffic_the_shares_alone_are_shown() -> None:
    text = shown(Look(stories.good().looks[0], ()))
    assert "version 1     ██████████████  100 %" in text
    assert "version 2     ░░░░░░░░░░░░░░  0 %" in text
    assert "EVIDENCE" not in text
    assert "WAITS         a worker that has version 2 ready" in text


def test_harm_fills_its_bar_and_names_the_counts() -> None:
    text = shown(Look(stories.bad().looks[1], ()), width=100)
    assert "errors            ██████████████  41,250 of 120  31 of 94; the stable 9 of 1,790" in text
    assert "failing" in text


def test_who_paused_it_or_took_the_wheel_is_seen() -> None:
    rollout = stories.good().looks[1].model_copy(update={"paused": True, "by_hand": True})
    text = shown(Look(rollout, (), "The platform does not answer."), width=140)
    assert "paused · moved by hand" in text
    assert text.endswith("The platform does not answer.")


@pytest.fixture(autouse=True)
def in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Times are shown where the reader is."""
    import time

    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


# --- evidence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "progress"),
    [(0.0, 0), (1.0, 0), (10.0, 0.5), (100.0, 1), (1e9, 1), (float("inf"), 1), (float("nan"), 0)],
)
def test_the_way_to_a_threshold_is_logarithmic_and_nothing_is_no_evidence(value: float, progress: float) -> None:
    assert Evidence(Side.AGAINST, "errors", value, 100).progress == progress


def test_a_gate_tells_its_evidence_beside_the_stable_and_by_the_past() -> None:
    counts = {"candidate_bad": 3.0, "candidate_of": 50.0, "stable_bad": 0.0, "stable_of": 0.0}
    past = {"evidence_against_past": 7.0, "needed_against_past": 240.0}
    harm = Gate(
        name="errors", state=GateState.PASSED, detail="", numbers={"evidence": 1.0, "needed": 120.0, **counts, **past}
    )
    split = Gate(name="split", state=GateState.PASSED, detail="", numbers={"evidence": 2.0, "needed": 100.0})
    proof = Gate(name="proof_errors", state=GateState.WAITING, detail="", numbers={"evidence": 4.0, "needed": 20.0})
    found = [(each.side, each.about + each.beside, each.threshold) for each in evidence_of([proof, harm, split])]
    assert found == [
        (Side.AGAINST, "errors", 120.0),
        (Side.AGAINST, "errors, by the past", 240.0),
        (Side.FOR, "errors", 20.0),
    ]


# --- while it goes ----------------------------------------------------------------------------------------------------


def test_a_platform_that_is_away_for_a_while_is_waited_for(client: Client, platform: Platform) -> None:
    rollout = platform.tell(stories.good())
    platform.answers = [problem(503, "Away", "rollout is away")] * 4
    seen = list(looks(client, rollout, poll_s=0.01))
    assert "rollout is away" in seen[0].trouble
    assert [each.rollout.percent for each in seen] == [0, 0, 5, 25, 100]


def test_a_platform_that_stays_away_ends_the_watching(client: Client, platform: Platform) -> None:
    rollout = platform.tell(stories.good())
    platform.answers = [problem(503, "Away", "rollout is away")] * 8
    found = looks(client, rollout, poll_s=0.01, patience_s=0.0)
    with pytest.raises(Unavailable, match="rollout is away"):
        list(found)


def test_in_a_terminal_the_view_is_live_and_the_last_look_stays() -> None:
    story = stories.bad()
    console = Console(width=100, file=io.StringIO(), force_terminal=True, color_system=None)
    last = watch(iter([Look(each, story.decisions) for each in story.looks]), console)
    assert last == story.looks[-1]
    assert "rolled back" in console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
