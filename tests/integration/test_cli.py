"""The `lepton` command as a person or a script runs it: a process, its output, its exit code."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from lepton.ports import free_port

from . import onnx_models
from .command import Lepton
from .local_platform import Platform, until
from .onnx_models import mlp_scores

X = np.random.default_rng(3).standard_normal((2, 4)).astype(np.float32)


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def test_commands_tell_a_models_life(lepton: Lepton, name: str, tmp_path: Path) -> None:
    pushed = lepton(
        "push", saved(onnx_models.mlp(101), tmp_path), "--name", name, "--label", "by=cli", "--metric", "accuracy=0.9"
    )
    assert (pushed.code, pushed.err) == (0, "")
    assert f"{name} version 1" in pushed.out
    assert "serves all traffic" in pushed.out

    kept = lepton("push", saved(onnx_models.mlp(102), tmp_path), "--name", name, "--no-deploy", "--json")
    assert (kept.code, kept.json["version"], kept.json["state"]) == (0, 2, "registered")

    deployed = lepton("deploy", name, 2, "--json")
    assert (deployed.code, deployed.json["state"], deployed.json["previous"]) == (0, "promoted", 1)
    returned = lepton("rollback", name)
    assert (returned.code, returned.out) == (0, f"{name} is back at version 1.\n")

    listed = lepton("versions", name, "--json")
    assert [(each["version"], each["labels"]) for each in listed.json] == [(1, {"by": "cli"}), (2, {})]
    assert listed.json[0]["metrics"] == {"accuracy": 0.9}
    table = lepton("versions", name)
    assert table.out.splitlines()[0].split()[:3] == ["VERSION", "STATE", "SIZE"]
    assert len(table.out.splitlines()) == 3
    assert name in lepton("models").out
    assert {"name": name, "latest_version": 2}.items() <= {
        key: value for each in lepton("models", "--json").json if each["name"] == name for key, value in each.items()
    }.items()
    assert [each["version"] for each in lepton("rollouts", name, "--json").json] == [1, 2, 1]

    facts = until(lambda: len(found := lepton("timeline", name, "--json").json) >= 15 and found)
    assert [each["type"] for each in facts][:2] == ["ModelCreated", "VersionRegistered"]
    told = lepton("timeline", name).out
    assert told.index("ModelCreated") < told.index("VersionRegistered") < told.index("RolloutFinished")


def test_model_is_called_with_files_of_every_kind(lepton: Lepton, mlp: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X.astype(np.float64))
    np.savez(tmp_path / "x.npz", x=X)
    (tmp_path / "x.json").write_text(json.dumps({"x": X.tolist()}))
    (tmp_path / "bare.json").write_text(json.dumps(X.tolist()))
    request = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 4], "data": X.ravel().tolist()}]}
    (tmp_path / "request.json").write_text(json.dumps(request))
    for file in ("x.npy", "x.npz", "x.json", "bare.json", "request.json"):
        answer = lepton("infer", mlp, "--input", file, "--json")
        assert (answer.code, answer.err) == (0, ""), file
        assert answer.json["version"] == "1"
        np.testing.assert_allclose(answer.json["outputs"]["scores"], mlp_scores(X), rtol=1e-4, atol=1e-4)
    piped = lepton("infer", mlp, "--input", "-", "--output", "label", "--version", 1, stdin=json.dumps(X.tolist()))
    assert piped.code == 0
    assert "label int64 (2,)" in piped.out
    assert "scores" not in piped.out
    assert "answered by version 1" in piped.out


def test_text_and_several_inputs_are_taken_by_name(lepton: Lepton, text: str, arithmetic: str, tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text(json.dumps(["Grüße", ""]))
    assert lepton("infer", text, "--input", "text.json", "--json").json["outputs"] == {"y": ["Grüße", ""]}
    np.savez(tmp_path / "ab.npz", a=np.ones((1, 2), np.float32), b=np.full((1, 2), 2, np.float32))
    answer = lepton("infer", arithmetic, "--input", "ab.npz", "--json")
    assert answer.json["outputs"] == {"sum": [[3, 3]], "difference": [[-1, -1]], "product": [[2, 2]]}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[[1, 2, 3]]", "'x'"),
        (b'{"z": [[1, 2, 3, 4]]}', "'z'"),
        (b'{"x": [[1, 2], [3]]}', "'x'"),
        (b'{"x": "four"}', "'x'"),
        (b"{", "not JSON"),
        (b"5", "no inputs"),
    ],
)
def test_wrong_input_is_named(lepton: Lepton, mlp: str, tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    ended = lepton("infer", mlp, "--input", "x.json")
    assert (ended.code, ended.out) == (1, "")
    assert told in ended.err
    assert ended.err.startswith("Error:")


def test_keys_are_made_listed_and_revoked(lepton: Lepton, mlp: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(X.tolist()))
    made = lepton("keys", "create", name, "--scope", "infer", "--days", 1)
    secret = made.out.splitlines()[0]
    assert secret.startswith("lp_")
    [key] = [each for each in lepton("keys", "list", "--json").json if each["name"] == name]
    assert key["scopes"] == ["infer"]
    assert key["expires_at"] is not None
    assert secret not in lepton("keys", "list").out
    infer = ("infer", mlp, "--input", "x.json", "--json")
    assert lepton(*infer, LEPTON_API_KEY=secret).code == 0
    refused = lepton("models", LEPTON_API_KEY=secret)
    assert (refused.code, refused.out) == (5, "")
    assert "'read'" in refused.err
    assert lepton("keys", "revoke", key["id"]).code == 0
    revoked = lepton(*infer, LEPTON_API_KEY=secret)
    assert revoked.code == 5
    assert "unknown API key" in revoked.err
    assert lepton("keys", "revoke", key["id"]).code == 4
    twice = lepton("keys", "create", "twice", "--scope", "everything")
    assert twice.code == 1
    assert "scopes" in twice.err


def test_status_shows_every_part(lepton: Lepton, platform: Platform) -> None:
    status = lepton("status", "--json")
    assert status.code == 0
    assert status.json["ready"] is True
    assert status.json["url"] == platform.url
    parts = {each["name"]: each for each in status.json["parts"]}
    assert set(parts) == {
        *("kafka", "postgres", "etcd", "envoy", "registry", "rollout", "monitor", "gateway"),
        *("worker-1", "worker-2"),
        "supervisor",
    }
    assert {name: each["pid"] for name, each in parts.items() if name != "supervisor"} == platform.pids()
    assert all(each["state"] == "ready" and each["rss_bytes"] > 0 for each in parts.values())
    told = lepton("status").out
    assert platform.url in told
    assert all(name in told for name in parts)


def test_up_finds_what_runs_and_logs_show_it(lepton: Lepton, platform: Platform) -> None:
    before = platform.pids()
    up = lepton("up", "--detach")
    assert up.code == 0
    assert "running already" in up.out
    assert platform.pids() == before
    everything = lepton("logs", "-n", 5)
    assert everything.code == 0
    assert {"registry", "worker-1", "worker-2"} <= {
        line.split()[1] for line in everything.out.splitlines() if len(line.split()) > 1
    }
    only = lepton("logs", "worker", "-n", 2)
    assert "worker-1" in only.out
    assert "registry" not in only.out
    assert lepton("logs", "nothing").code == 1


def test_doctor_finds_what_it_takes(lepton: Lepton) -> None:
    report = lepton("doctor", "--json")
    assert report.code == 0
    assert not [each for each in report.json if each["verdict"] == "missing"]
    assert {"Python", "PostgreSQL", "etcd", "Envoy", "Kafka"} <= {each["what"] for each in report.json}


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("versions", "nothing"), 4, "nothing"),
        (("timeline", "nothing"), 4, "nothing"),
        (("deploy", "nothing", 1), 4, "nothing"),
        (("rollback", "nothing"), 4, "nothing"),
        (("keys", "revoke", "0" * 16), 4, "0" * 16),
        (("push", "missing.onnx", "--name", "m"), 1, "missing.onnx"),
        (("push", "bad.onnx", "--name", "m"), 1, "bad.onnx is not an ONNX file"),
        (("push", "good.onnx", "--name", "Not A Name"), 1, "'Not A Name'"),
        (("infer", "mlp", "--input", "missing.json"), 1, "missing.json"),
        (("push", "bad.onnx"), 2, "--name"),
        (("push", "good.onnx", "--name", "m", "--metric", "accuracy=high"), 2, "accuracy"),
        (("push", "good.onnx", "--name", "m", "--label", "nothing"), 2, "KEY=VALUE"),
        (("deploy", "mlp", "latest"), 2, "'version'"),
        (("deploy", "mlp", 0), 2, "'version'"),
        (("nonsense",), 2, "nonsense"),
        (("--url", "nonsense", "models"), 1, "nonsense"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_mistake_ends_with_its_code_and_a_message(
    lepton: Lepton, mlp: str, tmp_path: Path, arguments: tuple[object, ...], code: int, told: str
) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\x08not a model")
    onnx.save(onnx_models.mlp(103), tmp_path / "good.onnx")
    ended = lepton(*arguments)
    assert (ended.code, ended.out) == (code, ""), ended
    assert told in ended.err


def test_model_that_cannot_be_loaded_is_reported(lepton: Lepton, name: str, tmp_path: Path) -> None:
    ended = lepton("push", saved(onnx_models.refused_at_load(), tmp_path), "--name", name)
    assert ended.code == 1
    assert "Pow" in ended.err
    assert "lepton rollout explain" in ended.err
    assert "failed" in lepton("versions", name).out


def test_platform_that_is_not_there_is_told(lepton: Lepton, tmp_path: Path) -> None:
    nowhere = {"LEPTON_HOME": str(tmp_path / "empty"), "LEPTON_URL": f"http://127.0.0.1:{free_port()}"}
    for command in ("models", "status"):
        ended = lepton(command, **nowhere)
        assert (ended.code, ended.out) == (3, "")
        assert "lepton up" in ended.err
    assert lepton("status", "--json", **nowhere).json["ready"] is False
    assert "Nothing was running" in lepton("down", **nowhere).out


def test_help_and_version_are_there(lepton: Lepton) -> None:
    helped = lepton("--help")
    assert helped.code == 0
    for command in (
        *("up", "down", "status", "logs", "doctor"),
        *("push", "models", "versions", "deploy", "rollback", "infer", "timeline", "keys"),
    ):
        assert command in helped.out
    assert "--name" in lepton("push", "--help").out
    assert lepton("--version").out.strip()
