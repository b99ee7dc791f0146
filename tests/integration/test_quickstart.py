"""The README's first command, as a new user runs it: twice."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LEPTON = Path(sys.executable).with_name("lepton")


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a user whose only platform is the one that the quickstart starts."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("LEPTON_")}
    environment = {**ours, "LEPTON_HOME": str(tmp_path / "home")}
    yield environment
    subprocess.run([LEPTON, "down"], env=environment, check=True, timeout=60)


def quickstart(environment: dict[str, str]) -> str:
    command = [sys.executable, "examples/digits/quickstart.py"]
    ended = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=400
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.timeout(900)  # Two platforms' lives, on a machine that may be busy with other tests.
def test_the_quickstart_tells_its_story_and_a_second_one_starts_over(environment: dict[str, str]) -> None:
    first, second = quickstart(environment), quickstart(environment)
    assert "It was running already" not in first
    assert "It was running already" in second
    for story, better, broken in ((first, 2, 3), (second, 4, 5)):
        (percent,) = re.findall(r"([\d.]+)% are read right", story)
        assert float(percent) >= 95
        assert "version 1, " in story
        assert len(re.findall(r"a (\d) is read as \1", story)) == 2, "by gRPC and by Kafka"
        earned, lost = story.split(f"Roll  version {better} ")[1].split(f"Roll  version {broken} ")
        assert "100 % of the users" in earned
        assert "promoted" in earned
        assert "failures: 0" in earned
        assert f"by version {better}" in earned
        assert "taken back" in lost
        assert re.search(r"[1-9]\d* of [\d,]+ users saw a bad answer", lost)
        assert re.search(rf"Version {better} went on: [\d,]+ answers, failures: 0", lost)
        for version in (better, broken):
            assert "<svg" in (REPOSITORY / f"examples/digits/out/digits-v{version}-rollout.html").read_text("utf-8")

    curl = re.search(r"curl (\S+) -d @(\S+)", second)
    assert curl is not None
    with urllib.request.urlopen(curl[1], (REPOSITORY / curl[2]).read_bytes(), timeout=10) as answer:
        assert json.load(answer)["outputs"][0]["data"] == [7]
