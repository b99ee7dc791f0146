"""The commands about rollouts, policies and the mesh: what they print, and how they end."""

import json
from pathlib import Path
from typing import Any

import pytest
from lepton.documents import read_documents
from lepton.models import Version
from lepton.policies import PRESETS, Policy
from lepton.rollouts import RolloutState

from libs.sdk.tests import stories
from libs.sdk.tests.conftest import NOW, Platform, Run, ok


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def versions(platform: Platform) -> None:
    """Three versions of digits, of which the first serves."""
    platform.stable["digits"] = 1
    platform.versions["digits"] = [
        Version(
            tenant="default",
            model="digits",
            version=number,
            sha256=f"{number:064}",
            size_bytes=1,
            format="onnx",
            signature={"inputs": [], "outputs": []},
            batching={},
            metrics={},
            labels={},
            state="registered",
            created_at=NOW,
            created_by="alice",
        )
        for number in (1, 2, 3)
    ]


# --- start and wait ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("versions")
def test_a_rollout_that_starts_says_by_which_policy_and_where_to_look(run: Run, platform: Platform) -> None:
    shown = words(ok(run("rollout", "start", "digits", 2, "--policy", "fast", "--with", "tokenizer=4", "--force")))
    assert "digits version 2 is on its way by canary: 5, 25, 50, 100 %, at least 4 s each." in shown
    assert "`lepton rollout watch digits`" in shown
    (wanted,) = platform.started
    assert (wanted.policy, wanted.force, wanted.together[0].model) == ("fast", True, "tokenizer")


@pytest.mark.usefixtures("versions")
def test_waiting_for_a_rollout_ends_with_its_outcome(run: Run, platform: Platform) -> None:
    assert "digits version 2 has all of the traffic" in ok(run("rollout", "start", "digits", 2, "--wait"))
    platform.outcome = RolloutState.ROLLED_BACK
    result = run("rollout", "start", "digits", 3, "--wait")
    assert result.exit_code == 1
    assert "Error: digits version 3 was taken back: as told" in result.stderr
    assert "`lepton rollout explain " in result.stderr
    platform.outcome = RolloutState.SHIFTING
    assert run("rollout", "start", "digits", 3, "--wait", "--timeout", 0.1).exit_code == 6


@pytest.mark.parametrize("member", ["tokenizer", "tokenizer=", "=4", "tokenizer=x", "tokenizer=0"])
def test_a_member_that_is_no_version_is_wrong_usage(run: Run, member: str) -> None:
    result = run("rollout", "start", "digits", 2, "--with", member)
    assert result.exit_code == 2
    assert "OTHER=VERSION" in result.stderr


def test_a_wrong_policy_file_is_told_with_line_and_field(run: Run, platform: Platform, tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("strategy: canary\nsteps: [5, 25]\nbake: 3\n")
    result = run("rollout", "start", "digits", 2, "--policy", file)
    assert result.exit_code == 1
    assert f"{file}, line 3: a policy has no field `bake`." in result.stderr
    assert platform.counted("POST") == 0


def test_an_unknown_policy_says_which_there_are(run: Run) -> None:
    result = run("rollout", "start", "digits", 2, "--policy", "fats")
    assert result.exit_code == 4
    assert "immediate, fast, careful, shadow-first" in result.stderr


# --- status, history, watch -------------------------------------------------------------------------------------------


def test_status_shows_traffic_evidence_and_what_it_waits_for(run: Run, platform: Platform) -> None:
    story = stories.good()
    platform.tell(stories.Story(story.looks[2:3], story.decisions, story.windows))
    shown = words(ok(run("rollout", "status", "digits")))
    assert "version 1" in shown
    assert "EVIDENCE FOR" in shown
    assert "digits version 2 is shifting at 25 % of the traffic; it waits: proof of errors." in shown
    assert json.loads(ok(run("rollout", "status", "digits", "--json")))["percent"] == 25


def test_history_lists_the_rollouts_and_says_how_to_make_the_first(run: Run, platform: Platform) -> None:
    assert "`lepton rollout start digits VERSION`" in ok(run("rollout", "history", "digits"))
    platform.tell(stories.Story(stories.good().looks[-1:], (), ()))
    platform.tell(stories.bad())
    lines = [line.split() for line in ok(run("rollout", "history", "digits")).splitlines()]
    assert lines[0] == ["ID", "VERSION", "STATE", "STRATEGY", "STARTED", "TOOK", "BY", "WHY"]
    assert [line[:4] for line in lines[1:3]] == [
        ["22222222", "3", "shifting", "canary"],
        ["11111111", "2", "promoted", "canary"],
    ]
    assert len(json.loads(ok(run("rollout", "history", "digits", "--json")))) == 2


def test_a_watched_rollout_ends_with_a_sentence(run: Run, platform: Platform, quick: None) -> None:
    rollout = platform.tell(stories.bad())
    lines = ok(run("rollout", "watch", "digits")).splitlines()
    assert lines[-2].startswith("digits version 3 was taken back after 6 s: errors: 31 of 94 requests failed")
    assert lines[-1] == f"`lepton rollout explain {rollout.id}` tells why."
    assert sum("roll back at 5 %" in line for line in lines) == 1


def test_a_watched_rollout_is_a_document_at_each_change_for_programs(run: Run, platform: Platform, quick: None) -> None:
    platform.tell(stories.good())
    documents = [json.loads(line) for line in ok(run("rollout", "watch", "digits", "--json")).splitlines()]
    assert [each["rollout"]["percent"] for each in documents] == [5, 25, 100]
    numbers = [decision["number"] for each in documents for decision in each["decisions"]]
    assert numbers == list(range(1, 12)), "each decision is told once"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEPTON_WATCH_S", "0.01")


# --- steer ------------------------------------------------------------------------------------------------------------


def test_a_rollout_is_steered_and_says_what_follows(run: Run, platform: Platform) -> None:
    platform.tell(stories.good())
    paused = ok(run("rollout", "pause", "digits"))
    assert "digits version 2 stays at 5 % until `lepton rollout resume digits`." in words(paused)
    assert "goes on." in ok(run("rollout", "resume", "digits"))
    assert "takes all traffic." in ok(run("rollout", "promote", "digits", "--full", "--reason", "fine"))
    assert "has its approval" in ok(run("rollout", "approve", "digits", "--reason", "seen"))
    assert "version 1 takes all traffic again" in words(ok(run("rollout", "abort", "digits", "--reason", "enough")))
    assert "once more" in ok(run("rollout", "retry", "digits"))
    assert [command for command, _ in platform.steered] == ["pause", "resume", "promote", "approve", "abort", "retry"]
    assert json.loads(ok(run("rollout", "pause", "digits", "--json")))["paused"]


@pytest.mark.parametrize("command", ["promote", "abort", "approve"])
def test_who_forgets_the_reason_is_told(run: Run, platform: Platform, command: str) -> None:
    platform.tell(stories.good())
    result = run("rollout", command, "digits")
    assert result.exit_code == 2
    assert "--reason" in result.stderr


def test_a_model_without_rollouts_says_where_they_are_listed(run: Run) -> None:
    result = run("rollout", "status", "letters")
    assert result.exit_code == 4
    assert "`lepton rollouts`" in result.stderr


# --- explain, replay, report ------------------------------------------------------------------------------------------


def test_each_decision_is_explained_with_its_numbers(run: Run, platform: Platform) -> None:
    rollout = platform.tell(stories.bad())
    platform.looked[str(rollout.id)] = 1
    shown = words(ok(run("rollout", "explain", rollout.id)))
    assert "digits version 3 compared with version 2, started by alice, by canary" in shown
    for decision in stories.bad().decisions:
        assert f"#{decision.number} " in shown
    assert "evidence 41,250 of 120 needed, 31 of 94; the stable 9 of 1,790" in shown.replace("│ ", "")
    told = json.loads(ok(run("rollout", "explain", "digits", "--json")))
    assert [each["number"] for each in told["decisions"]] == [1, 2, 3, 4, 5, 6]


def test_a_replay_tells_what_another_policy_would_have_done_and_what_happened(run: Run, platform: Platform) -> None:
    rollout = platform.tell(stories.bad())
    platform.looked[str(rollout.id)] = 1
    shown = words(ok(run("rollout", "replay", rollout.id, "--policy", "careful")))
    assert "careful would have taken it back 5 s after the start, judging 8 seconds of traffic." in shown
    assert "In fact: digits version 3 was taken back after 6 s" in shown
    assert json.loads(ok(run("rollout", "replay", "digits", "--policy", "fast", "--json")))["outcome"] == "roll_back"
    assert platform.replayed == [PRESETS["careful"], PRESETS["fast"]]


def test_a_report_is_written_where_it_is_wanted(run: Run, platform: Platform, tmp_path: Path) -> None:
    platform.tell(stories.good())
    path = tmp_path / "report.html"
    assert "tells the story of digits version 2" in words(ok(run("rollout", "report", "digits", "-o", path)))
    assert path.read_text().startswith("<!DOCTYPE html>")


# --- policies ---------------------------------------------------------------------------------------------------------


def test_a_policy_is_shown_changed_and_set_again(run: Run, platform: Platform, tmp_path: Path) -> None:
    assert "Versions of digits now come to live traffic by canary" in words(ok(run("policy", "set", "digits", "fast")))
    file = tmp_path / "p.yaml"
    file.write_text(ok(run("policy", "show", "digits")).replace("dwell_s: 4", "dwell_s: 9"))
    ok(run("policy", "set", "digits", file))
    assert platform.policies["digits"] == PRESETS["fast"].model_copy(update={"dwell_s": 9})
    ok(run("policy", "unset", "digits"))
    assert not platform.policies
    assert ok(run("policy", "show", "digits")).startswith("# digits: the default, no policy is set\n")


def test_presets_are_listed_and_shown(run: Run, tmp_path: Path) -> None:
    shown = ok(run("policy", "list"))
    assert [line.split()[0] for line in shown.splitlines() if line[0] != " "] == ["NAME", *PRESETS]
    assert list(json.loads(ok(run("policy", "list", "--json")))) == list(PRESETS)
    (tmp_path / "p.yaml").write_text(ok(run("policy", "show", "careful")))
    assert read_documents(tmp_path / "p.yaml")[0].parsed(Policy, "policy") == PRESETS["careful"]
    assert Policy.model_validate_json(ok(run("policy", "show", "careful", "--json"))) == PRESETS["careful"]


def test_the_schema_is_printed_without_a_platform(run: Run, platform: Platform) -> None:
    assert json.loads(ok(run("policy", "schema"))) == Policy.model_json_schema()
    assert not platform.requests


# --- the mesh ---------------------------------------------------------------------------------------------------------


def test_what_the_mesh_shows_can_be_changed_and_applied(run: Run, platform: Platform, tmp_path: Path) -> None:
    platform.stable["digits"] = 1
    file = tmp_path / "vs.yaml"
    file.write_text(
        ok(run("mesh", "show", "digits")).replace("weight: 95\n", "weight: 90\n").replace("weight: 5\n", "weight: 10\n")
    )
    result = run("mesh", "apply", "-f", file, "--reason", "a test")
    assert "The traffic of digits is moved by hand, by alice; the judge only watches." in words(ok(result))
    assert "DestinationRule in" in words(result.stderr)
    applied = platform.hands["digits"]
    spec: Any = applied.virtual_service["spec"]
    assert [each["weight"] for each in spec["http"][0]["route"]] == [90, 10]
    assert applied.reason == "a test"
    assert "The traffic of digits is rollout's again." in words(ok(run("mesh", "release", "digits")))
    assert run("mesh", "release", "digits").exit_code == 1


def test_the_mesh_is_json_for_programs(run: Run, platform: Platform) -> None:
    platform.stable["digits"] = 1
    for form in (["--json"], ["-o", "json"]):
        assert json.loads(ok(run("mesh", "show", "digits", *form)))["held_by"] == "rollout"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: DestinationRule\n", "no VirtualService, expected one"),
        ("kind: VirtualService\n---\nkind: VirtualService\n", "2 VirtualServices, expected one"),
        ("kind: VirtualService\nspec: {}\n", "does not say which model"),
        ("kind: VirtualService\n  spec: {}\n", "line 2: mapping values are not allowed here"),
    ],
)
def test_a_file_that_is_not_one_models_virtual_service_is_refused(
    run: Run, platform: Platform, tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "vs.yaml").write_text(text)
    result = run("mesh", "apply", "-f", tmp_path / "vs.yaml")
    assert result.exit_code == 1
    assert said in words(result.stderr)
    assert not platform.requests


@pytest.mark.parametrize(
    ("text", "args"),
    [
        ("{kind: VirtualService, metadata: {name: digits}, spec: {hosts: [elsewhere]}}", []),
        ("{kind: VirtualService, spec: {hosts: [digits.default.models.lepton]}}", []),
        ("{kind: VirtualService, spec: {}}", ["--model", "digits"]),
    ],
)
def test_the_model_is_the_files_host_or_name_or_the_one_that_is_named(
    run: Run, platform: Platform, tmp_path: Path, text: str, args: list[str]
) -> None:
    (tmp_path / "vs.yaml").write_text(text)
    ok(run("mesh", "apply", "-f", tmp_path / "vs.yaml", *args))
    assert list(platform.hands) == ["digits"]


def test_resume_gives_the_wheel_back_when_somebody_has_it(run: Run, platform: Platform, tmp_path: Path) -> None:
    platform.stable["digits"] = 1
    platform.tell(stories.good())
    (tmp_path / "vs.yaml").write_text("{kind: VirtualService, metadata: {name: digits}}")
    ok(run("mesh", "apply", "-f", tmp_path / "vs.yaml"))
    assert "The traffic of digits is rollout's again." in ok(run("rollout", "resume", "digits"))
    assert not platform.hands
    assert not platform.steered
    assert "goes on" in ok(run("rollout", "resume", "digits"))
