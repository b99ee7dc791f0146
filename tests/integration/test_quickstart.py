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
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=100
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_quickstart_starts_serves_and_tells_and_a_second_one_changes_nothing(environment: dict[str, str]) -> None:
    first, second = quickstart(environment), quickstart(environment)
    assert "It was running already" not in first
    assert "It was running already" in second
    for story in (first, second):
        (percent,) = re.findall(r"([\d.]+)% are read right", story)
        assert float(percent) >= 95
        assert "version 1, " in story

    curl = re.search(r"curl (\S+) -d @(\S+)", second)
    assert curl is not None
    with urllib.request.urlopen(curl[1], (REPOSITORY / curl[2]).read_bytes(), timeout=10) as answer:
        assert json.load(answer)["outputs"][0]["data"] == [7]
