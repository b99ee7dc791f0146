"""The command line: what it prints, and how it ends."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import pytest
from lepton.policies import PRESETS
from lepton.rollouts import RolloutState
from lepton_common.signature import Signature

from libs.sdk.tests.conftest import KEY_ID, NEW_KEY_ID, NEW_SECRET, NOW, SECRET, SPECS, Platform, Run, ok
from libs.sdk.tests.traffic import Answer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [-1, 2])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [-1, 2])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "same", [value], [result])), path)
    return path


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_model_is_pushed_listed_deployed_and_rolled_back(run: Run, model: Path, tmp_path: Path) -> None:
    assert "digits version 1" in ok(run("push", model, "--name", "digits"))
    second = tmp_path / "second.onnx"
    second.write_bytes(model.read_bytes() + onnx.ModelProto(doc_string="second").SerializeToString())
    assert "`lepton deploy digits 2` serves it" in ok(run("push", second, "--name", "digits", "--no-deploy"))
    assert "digits version 2 serves all traffic." in ok(run("deploy", "digits", 2))
    assert "digits is back at version 1." in ok(run("rollback", "digits"))
    assert ok(run("models")).split("\n")[1].split()[:3] == ["digits", "1", "2"]
    shown = [line.split()[:2] for line in ok(run("versions", "digits")).splitlines()]
    assert shown == [["VERSION", "STATE"], ["1", "live"], ["2", "registered"]]
    assert [line.split()[:3] for line in ok(run("rollouts", "digits")).splitlines()[1:]] == [
        ["digits", "1", "promoted"],
        ["digits", "2", "promoted"],
        ["digits", "1", "promoted"],
    ]
    assert ok(run("timeline", "digits")).count("VersionRegistered") == 2


@pytest.mark.parametrize("command", ["models", "versions m", "rollouts", "timeline m", "keys list"])
def test_every_list_is_json_for_programs(run: Run, model: Path, command: str) -> None:
    ok(run("push", model, "--name", "m"))
    assert isinstance(json.loads(ok(run(*command.split(), "--json"))), list)


def test_what_acts_answers_in_json_too(run: Run, model: Path) -> None:
    pushed = json.loads(ok(run("push", model, "--name", "m", "--label", "a=b=c", "--metric", "acc=0.5", "--json")))
    assert (pushed["version"], pushed["labels"], pushed["metrics"]) == (1, {"a": "b=c"}, {"acc": 0.5})
    assert json.loads(ok(run("deploy", "m", 1, "--json")))["state"] == "promoted"
    assert json.loads(ok(run("keys", "create", "robot", "--json")))["secret"] == SECRET
    assert json.loads(ok(run("keys", "revoke", KEY_ID, "--json"))) == {"revoked": KEY_ID}


def test_a_push_without_wait_returns_at_once_and_says_where_to_look(run: Run, model: Path) -> None:
    assert "`lepton rollout watch m` shows how far" in ok(run("push", model, "--name", "m", "--no-wait"))


def test_a_push_by_a_policy_says_that_it_is_registered_and_on_its_way_and_waits_only_when_told_to(
    run: Run, platform: Platform, model: Path, tmp_path: Path
) -> None:
    ok(run("push", model, "--name", "m"))
    platform.policies["m"] = PRESETS["fast"]
    second = tmp_path / "second.onnx"
    second.write_bytes(model.read_bytes() + onnx.ModelProto(doc_string="second").SerializeToString())
    told = " ".join(ok(run("push", second, "--name", "m")).split())
    registered, _, rest = told.partition(" is registered. ")
    assert registered.startswith("m version 2 (")
    assert rest == (
        "Its rollout by canary: 5, 25, 50, 100 %, at least 4 s each is on its way."
        " `lepton rollout watch m` shows how it goes."
    )
    assert platform.rollouts[0].state == RolloutState.LOADING
    assert "m version 2 serves all traffic." in ok(run("push", second, "--name", "m", "--wait"))


def test_a_pushed_version_is_told_although_its_rollout_fails(run: Run, platform: Platform, model: Path) -> None:
    platform.outcome = RolloutState.FAILED
    result = run("push", model, "--name", "m")
    assert (result.exit_code, "m version 1" in result.stdout) == (1, True)


def test_an_empty_list_says_how_to_fill_it(run: Run) -> None:
    assert "`lepton push FILE --name MODEL`" in ok(run("models"))


def test_a_models_limits_are_shown_changed_one_by_one_and_taken_back(run: Run, platform: Platform) -> None:
    def told(*options: object) -> str:
        return " ".join(ok(run("limits", "m", *options)).split())

    platform.stable["m"] = 1
    unlimited = "m takes any rate at each gateway, 1024 under way at a time, each for 30000 ms at most."
    assert told().startswith(f"{unlimited} `lepton limits m --rate 100")
    told("--rate", 2.5, "--burst", 5)
    limits = json.loads(ok(run("limits", "m", "--concurrency", 8, "--timeout", 500, "--json")))
    assert limits == {
        "model": "m",
        "limits": {"rate_per_s": 2.5, "burst": 5, "max_concurrency": 8, "timeout_ms": 500},
    }
    assert told("--rate", 3) == (
        "m takes 3 requests/s (5 at once) at each gateway, 8 under way at a time, each for 500 ms at most."
    )
    assert told("--off") == unlimited


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--off", "--rate", 1), 2, "--off"),
        (("--rate", 0), 2, "--rate"),
        (("--burst", 5), 1, "set rate_per_s too"),
        (("--timeout", 3_600_001), 2, "--timeout"),
    ],
)
def test_limits_that_make_no_sense_change_nothing(
    run: Run, platform: Platform, options: tuple[object, ...], code: int, said: str
) -> None:
    platform.stable["m"] = 1
    result = run("limits", "m", *options)
    assert (result.exit_code, said in result.stderr) == (code, True)
    assert platform.limits == {}


@pytest.mark.parametrize("options", [(), ("--off",)])
def test_memory_for_a_cache_that_is_not_turned_on_is_wrong_usage(run: Run, options: tuple[str, ...]) -> None:
    result = run("cache", "m", "--max-mb", 10, *options)
    assert (result.exit_code, "--max-mb needs --ttl" in result.stderr) == (2, True)


def test_a_new_keys_secret_is_all_there_is_on_stdout(run: Run) -> None:
    result = run("keys", "create", "robot", "--scope", "infer", "--scope", "read", "--days", 2)
    assert ok(result) == SECRET + "\n"
    assert "not shown again" in result.stderr


def test_a_key_is_revoked_by_its_name_too(run: Run, platform: Platform) -> None:
    ok(run("keys", "create", "robot"))
    assert "Revoked robot." in ok(run("keys", "revoke", "robot"))
    assert platform.counted(f"DELETE /v1/keys/{KEY_ID}") == 1


def test_a_key_has_models_limits_and_an_end_of_its_own(run: Run, platform: Platform) -> None:
    ok(
        run(
            *("keys", "create", "robot", "--tenant", "acme", "--scopes", "infer,deploy", "--models", "fraud-*,loan"),
            *("--expires", "30d", "--rate", 100, "--burst", 20, "--concurrency", 10, "--per-day", 100_000),
        )
    )
    [key] = platform.keys
    assert (key.scopes, key.models) == (["infer", "deploy"], ["fraud-*", "loan"])
    assert key.limits.model_dump() == {"rate_per_s": 100, "burst": 20, "max_concurrency": 10, "per_day": 100_000}
    assert key.expires_at is not None
    assert timedelta(days=29) < key.expires_at - datetime.now(UTC) < timedelta(days=30)
    head, *lines = ok(run("keys", "list")).splitlines()
    shown = " ".join(line[head.index("FOR") :].strip() for line in lines)
    assert shown == "deploy infer on fraud-* loan, 100/s, burst 20, 10 at once, 100000/day"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--expires", "a while"), "such as 30d"),
        (("--expires", "1d", "--days", "1"), "not both"),
        (("--models", "Fraud"), "models"),
        (("--rate", "-1"), "--rate"),
        (("--rate", "nan"), "--rate"),
    ],
)
def test_a_key_that_makes_no_sense_is_refused_naming_the_option(run: Run, options: tuple[str, ...], told: str) -> None:
    result = run("keys", "create", "robot", *options)
    assert result.exit_code in (1, 2)
    assert told in " ".join(result.stderr.replace("│", " ").split())


def test_a_key_is_rotated_by_its_name_and_revoked_with_what_is_left_of_it(run: Run, platform: Platform) -> None:
    ok(run("keys", "create", "robot"))
    result = run("keys", "rotate", "robot", "--overlap", "2h")
    assert ok(result) == NEW_SECRET + "\n"
    assert platform.keys[0].expires_at == NOW + timedelta(hours=2)
    twice = run("keys", "rotate", KEY_ID)
    assert (twice.exit_code, "`replaced_by`" in twice.stderr) == (1, True)
    ok(run("keys", "revoke", "robot"))
    assert platform.requests[-2:] == [f"DELETE /v1/keys/{each}" for each in (KEY_ID, NEW_KEY_ID)]


def test_tenants_are_made_and_listed(run: Run) -> None:
    assert "acme" in ok(run("tenants", "create", "acme"))
    assert json.loads(ok(run("tenants", "create", "other", "--json")))["name"] == "other"
    assert [line.split()[0] for line in ok(run("tenants", "list")).splitlines()] == ["NAME", "acme", "other"]
    assert [each["name"] for each in json.loads(ok(run("tenants", "list", "--json")))] == ["acme", "other"]


@pytest.mark.parametrize("key", ["nobody", "f" * 16])
def test_an_unknown_key_is_told_with_where_the_keys_are(run: Run, key: str) -> None:
    result = run("keys", "revoke", key)
    assert result.exit_code == 4
    assert "`lepton keys list`" in result.stderr


# --- infer ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "[[1, 2], [3, 4]]",
        '{"x": [[1, 2], [3, 4]]}',
        '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]}]}',
    ],
)
def test_json_of_every_form_is_an_input(run: Run, tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    answer = json.loads(ok(run("infer", "m", "--input", path, "--json")))
    assert answer == {"model": "m", "version": "7", "outputs": {"x": [[1.0, 2.0], [3.0, 4.0]]}}
    assert json.loads(ok(run("infer", "m", "--input", "-", "--json", stdin=text))) == answer


def test_numpy_files_are_inputs_in_the_models_own_datatypes(run: Run, platform: Platform, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[1, 2]]))
    assert "[[1. 2.]]" in ok(run("infer", "m", "--input", tmp_path / "x.npy", "--version", 3))
    platform.signature = Signature(SPECS, SPECS)
    np.savez(tmp_path / "x.npz", x=np.ones((1, 2)), text=np.array(["é"]), n=np.array([1], np.int8))
    shown = json.loads(ok(run("infer", "m", "--input", tmp_path / "x.npz", "--output", "text", "--json")))
    assert shown["outputs"] == {"text": ["é"]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("3", "no inputs"),
        ('{"y": [[1, 2]]}', "no input 'y'"),
        ('{"x": [[1, "a"]]}', "not FP32 data"),
        ('{"x": [[1, 2], [3]]}', "not FP32 data"),
        ('{"inputs": [{"name": "x"}]}', "no name or no data"),
    ],
)
def test_an_input_that_does_not_fit_is_told_with_its_name(run: Run, text: str, said: str) -> None:
    result = run("infer", "m", "--input", "-", stdin=text)
    assert result.exit_code == 1
    assert said in " ".join(result.stderr.split())


def test_a_pickle_in_a_numpy_file_is_never_loaded(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object))
    result = run("infer", "m", "--input", tmp_path / "x.npy")
    assert result.exit_code == 1
    assert "plain arrays" in result.stderr


# --- how it ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code"), [(400, 1), (401, 5), (403, 5), (404, 4), (409, 1), (429, 6), (500, 1), (504, 6)]
)
def test_the_exit_code_tells_the_kind_of_error(run: Run, platform: Platform, status: int, code: int) -> None:
    platform.answers = [Answer(status, {"title": "No", "status": status, "detail": "[so] it is"})] * 4
    result = run("models")
    assert result.exit_code == code
    assert "Error: [so] it is" in result.stderr
    assert not result.stdout


@pytest.mark.parametrize(
    ("detail", "command"),
    [
        ("model 'm' is not known", "lepton models"),
        ("model 'm' has no version 9", "lepton versions MODEL"),
        ("version 9 of model 'm' is not loaded", "lepton versions MODEL"),
        ("no trace of request 'x': it was not traced", "lepton trace"),
        ("no tenant 'acme'", "lepton tenants list"),
        ("no rollout 7", "lepton rollouts"),
        ("no artifact 7", None),
        ("model 'm' has no policy of its own", None),
        ("Not Found", None),
    ],
)
def test_what_is_not_found_is_told_with_what_lists_its_kind(
    run: Run, platform: Platform, detail: str, command: str | None
) -> None:
    platform.answers = [Answer(404, {"title": "Not Found", "status": 404, "detail": detail})]
    hint = f"`{command}` lists what there is.\n" if command else ""
    assert run("models").stderr == f"Error: {detail}\n{hint}"


def test_a_used_up_day_is_told_with_when_to_try_again(run: Run, platform: Platform) -> None:
    platform.answers = [Answer(429, {"error": "the day ends at midnight UTC"}, {"retry-after": "26341"})]
    assert "\nTry again in 7 h 20 min.\n" in run("infer", "m", "--input", "-", stdin="[[1, 2]]").stderr


def test_a_platform_that_does_not_run_ends_with_3_and_says_how_to_start_it(run: Run) -> None:
    result = run("--url", "http://127.0.0.1:9", "models")
    assert result.exit_code == 3
    assert "lepton up" in result.stderr


@pytest.mark.parametrize(
    "args",
    [["push", "x.onnx"], ["nothing"], ["push", "x.onnx", "--name", "m", "--metric", "a=b"], ["deploy", "m", "0"]],
)
def test_wrong_usage_ends_with_2(run: Run, args: list[str]) -> None:
    assert run(*args).exit_code == 2


def test_a_file_that_is_no_model_is_an_error_without_a_traceback(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"\x99no")
    result = run("push", tmp_path / "x.onnx", "--name", "m")
    assert result.exit_code == 1
    assert "is not an ONNX file" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_lists_the_exit_codes_and_imports_nothing_slow() -> None:
    code = "import sys, lepton.cli; lepton.cli.app(['--help'], standalone_mode=False); print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert "Exit codes" in shown
    assert not {"httpx", "numpy", "onnx", "pydantic", "asyncio"} & set(shown.splitlines()[-1].split())
