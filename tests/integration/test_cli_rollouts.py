"""`lepton rollout` and `lepton mesh`, as a person brings a version to live traffic, steers it, and takes the wheel."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lepton import Client

from . import onnx_models
from .command import Lepton
from .load import Load
from .local_platform import Platform, until
from .oip_requests import GOOD

# Asks for so little proof that a version as good as the stable has it in seconds, on a busy machine too.
QUICK = """
strategy: canary
steps: [50]
dwell_s: 1
min_requests: 20
bake_s: 1
judge:
  alpha: 0.001
  errors: {margin: 20, acceptable: 0.3}
  slow: {margin: 50, acceptable: 0.49}
  slack: 10
"""
# Stays where it is for as long as a test may take.
PATIENT = "{strategy: canary, steps: [10, 50], dwell_s: 3600, judge: {alpha: 0.001, slack: 10}}"

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def policies(tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").write_text(QUICK)
    (tmp_path / "patient.yaml").write_text(PATIENT)


@pytest.fixture
def two_versions(client: Client, name: str) -> str:
    """A model whose version 1 serves and whose version 2 has no traffic."""
    client.push(onnx_models.mlp(201), name=name)
    client.push(onnx_models.mlp(202), name=name, deploy=False)
    return name


@contextmanager
def users(platform: Platform, model: str) -> Iterator[Load]:
    """Some forty requests a second, none of which may fail."""
    path = f"/v2/models/{model}/infer"
    with Load(platform.port, path, json.dumps(GOOD).encode(), callers=2, at_most_s=300, pause_s=0.05) as load:
        yield load
    assert not load.failures, load.report()


@pytest.mark.usefixtures("policies")
def test_a_rollout_is_started_told_and_judged_again(
    lepton: Lepton, platform: Platform, two_versions: str, tmp_path: Path
) -> None:
    with users(platform, two_versions):
        started = lepton(
            "rollout", "start", two_versions, 2, "--policy", "quick.yaml", "--wait", "--timeout", 80, "--json"
        )
    assert (started.code, started.err) == (0, "")
    rollout = started.json
    assert (rollout["state"], rollout["percent"], rollout["stable"]) == ("promoted", 100, 1)
    assert lepton("rollout", "status", two_versions, "--json").json["id"] == rollout["id"]
    told = lepton("rollout", "status", rollout["id"][:8])
    assert f"{two_versions} version 2 has all of the traffic" in told.out
    assert "TRAFFIC" in told.out
    watched = lepton("rollout", "watch", two_versions)
    assert "shifted at 50 %" in watched.out
    assert watched.out.splitlines()[-1] == f"`lepton rollout explain {rollout['id']}` tells why."

    history = lepton("rollout", "history", two_versions, "--json").json
    assert [(each["version"], each["strategy"]) for each in history] == [(2, "canary"), (1, "immediate")]
    decisions = lepton("rollout", "explain", two_versions, "--json").json["decisions"]
    assert [each["percent"] for each in decisions if each["action"] == "shifted"] == [50, 100]
    assert decisions[-1]["action"] == "promoted"
    explained = lepton("rollout", "explain", two_versions).out
    assert "proof errors" in explained
    assert "requests" in explained

    replayed = lepton("rollout", "replay", two_versions, "--policy", "careful", "--json").json
    assert replayed["outcome"] == "hold"
    assert replayed["seconds_judged"] > 0
    assert "careful would still hold it" in lepton("rollout", "replay", two_versions, "--policy", "careful").out

    reported = lepton("rollout", "report", two_versions, "-o", "story.html")
    assert reported.out.startswith("story.html tells the story")
    assert "<svg" in (tmp_path / "story.html").read_text("utf-8")


@pytest.mark.usefixtures("policies")
def test_a_rollout_is_paused_resumed_approved_aborted_and_retried(
    lepton: Lepton, platform: Platform, two_versions: str
) -> None:
    with users(platform, two_versions):
        started = lepton("rollout", "start", two_versions, 2, "--policy", "patient.yaml")
        assert f"{two_versions} version 2 is on its way by canary: 10, 50, 100 %" in started.out
        until(lambda: lepton("rollout", "status", two_versions, "--json").json["percent"] == 10, 60)

        assert "stays at 10 %" in lepton("rollout", "pause", two_versions, "--reason", "lunch").out
        paused = lepton("rollout", "status", two_versions, "--json").json
        assert (paused["paused"], paused["percent"]) == (True, 10)
        assert f"{two_versions} version 2 is paused at 10 %" in lepton("rollout", "status", two_versions).out
        assert f"{two_versions} version 2 goes on." in lepton("rollout", "resume", two_versions).out
        again = lepton("rollout", "resume", two_versions)
        assert (again.code, again.out) == (1, "")
        assert "neither paused nor held" in again.err
        assert "waits for no approval" in lepton("rollout", "approve", two_versions, "--reason", "fine").err
        assert "still shifting" in lepton("rollout", "retry", two_versions).err
        assert lepton("rollout", "promote", two_versions, "--reason", "hurry").code == 0
        until(lambda: lepton("rollout", "status", two_versions, "--json").json["percent"] == 50, 60)

        assert lepton("rollout", "abort", two_versions).code == 2
        assert "version 1 takes all traffic again" in lepton("rollout", "abort", two_versions, "--reason", "enough").out
        aborted = until(lambda: _ended(lepton, two_versions), 60)
        assert (aborted["state"], aborted["percent"]) == ("aborted", 0)
        assert "enough" in aborted["reason"]
        assert lepton("rollout", "pause", two_versions).code == 1
        assert "on its way once more" in lepton("rollout", "retry", two_versions).out
        assert lepton("rollout", "abort", two_versions, "--reason", "the end").code == 0
        until(lambda: _ended(lepton, two_versions), 60)
    steered = [each["action"] for each in lepton("rollout", "explain", aborted["id"], "--json").json["decisions"]]
    assert [each for each in steered if each in ("pause", "resume", "promote", "abort")] == [
        *("pause", "resume", "promote", "abort")
    ]


def _ended(lepton: Lepton, model: str) -> object:
    rollout = lepton("rollout", "status", model, "--json").json
    return rollout["finished_at"] and rollout


@pytest.mark.usefixtures("policies")
def test_the_mesh_is_taken_by_hand_and_given_back(
    lepton: Lepton, platform: Platform, two_versions: str, tmp_path: Path
) -> None:
    with users(platform, two_versions) as load:
        lepton("rollout", "start", two_versions, 2, "--policy", "patient.yaml")
        until(lambda: lepton("rollout", "status", two_versions, "--json").json["percent"] == 10, 60)
        shown = lepton("mesh", "show", two_versions).out
        assert shown.startswith(f"# The traffic of {two_versions} is moved by rollout\n")
        (tmp_path / "wrong.yaml").write_text(shown.replace("weight: 1000\n", "weight: 2000\n"))
        wrong = lepton("mesh", "apply", "-f", "wrong.yaml")
        assert (wrong.code, wrong.out) == (1, "")
        assert "the weights add up to 11000" in wrong.err
        assert lepton("mesh", "show", two_versions).out == shown

        by_hand = shown.replace("weight: 9000\n", "weight: 4000\n").replace("weight: 1000\n", "weight: 6000\n")
        (tmp_path / "hand.yaml").write_text(by_hand)
        taken = lepton("mesh", "apply", "-f", "hand.yaml", "--reason", "a try", "--json").json
        assert taken["held_by"] != "rollout"
        load.wait_for_version(2, 10)
        assert "moved by hand" in lepton("rollout", "status", two_versions).out
        refused = lepton("rollout", "start", two_versions, 1)
        assert refused.code == 1
        assert f"`lepton rollout resume {two_versions}` ends that" in refused.err

        assert lepton("rollout", "resume", two_versions).out == f"The traffic of {two_versions} is rollout's again.\n"
        until(lambda: "weight: 1000\n" in lepton("mesh", "show", two_versions).out, 60)
        twice = lepton("mesh", "release", two_versions)
        assert twice.code == 1
        assert "not moved by hand" in twice.err
        lepton("rollout", "abort", two_versions, "--reason", "the end")
        until(lambda: _ended(lepton, two_versions), 60)
    facts = [each["type"] for each in lepton("timeline", two_versions, "--json").json]
    assert {"MeshTaken", "MeshReturned", "RolloutSteered"} <= set(facts)


def test_names_that_nobody_knows_are_told(lepton: Lepton, mlp: str) -> None:
    for arguments, code, told in (
        (("rollout", "start", mlp, 99), 4, "no version 99"),
        (("rollout", "start", mlp, 1, "--policy", "nosuch"), 4, "'nosuch'"),
        (("rollout", "status", "nothing"), 4, "'nothing'"),
        (("mesh", "show", "nothing"), 4, "'nothing'"),
        (("mesh", "apply", "-f", "missing.yaml"), 2, "missing.yaml"),
    ):
        ended = lepton(*arguments)
        assert (ended.code, ended.out) == (code, ""), ended
        assert told in ended.err
