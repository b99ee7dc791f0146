"""The client, blocking and async, against a platform that breaks on purpose."""

import json
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, assert_type

import lepton
import numpy as np
import onnx
import onnx.helper
import pytest
from lepton import AsyncClient, Client, Progress
from lepton.endpoint import find_endpoint
from lepton.errors import (
    Conflict,
    DeadlineExceeded,
    Forbidden,
    Invalid,
    Limited,
    NotFound,
    RolloutFailed,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unreachable,
)
from lepton.flow import Ask, Flow, Pause, Reply, Work
from lepton.models import Model, Scope
from lepton.rollouts import RolloutState
from lepton.upload import upload
from lepton_common.signature import Signature

from libs.sdk.tests.conftest import SECRET, SPECS, Platform
from libs.sdk.tests.traffic import Answer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An ONNX file of a bit more than one upload chunk."""
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [300_000], bytes(1_200_000), raw=True)
    value = onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [300_000])
    graph = onnx.helper.make_graph([], "empty", [], [value], [weight])
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph), path)
    return path


def problem(status: int, detail: str = "as it is", **headers: str) -> Answer:
    return Answer(status, {"title": "No", "status": status, "detail": detail}, headers)


# --- uploads ----------------------------------------------------------------------------------------------------------


def test_an_upload_stores_the_file_and_reports_every_byte(client: Client, platform: Platform, model: Path) -> None:
    seen: list[Progress] = []
    sha256 = client.upload(model, progress=seen.append)
    assert platform.artifacts[sha256] == model.read_bytes()
    assert [each.done for each in seen] == sorted(each.done for each in seen)
    assert seen[-1] == Progress("upload", model.stat().st_size, model.stat().st_size)


def test_bytes_that_are_stored_already_are_not_sent(client: Client, platform: Platform, model: Path) -> None:
    assert client.upload(model) == client.upload(model.read_bytes())
    assert platform.counted("PUT") == 1


def test_a_broken_upload_resumes_where_it_broke(client: Client, platform: Platform, model: Path) -> None:
    platform.broken_uploads = [500_000, 100_000, 0]
    sha256 = client.upload(model)
    assert platform.artifacts[sha256] == model.read_bytes()
    assert platform.counted("PUT") == 4


async def test_a_broken_upload_resumes_in_the_async_client_too(platform: Platform, model: Path) -> None:
    platform.broken_uploads = [1_100_000]
    async with AsyncClient() as client:
        sha256 = await client.upload(model)
    assert list(platform.artifacts) == [sha256]


def test_an_upload_whose_last_answer_was_lost_is_finished_without_sending_it_again(
    client: Client, platform: Platform, model: Path
) -> None:
    platform.broken_uploads = [model.stat().st_size]
    sha256 = client.upload(model)
    assert platform.artifacts[sha256] == model.read_bytes()


def test_an_upload_that_gets_no_further_is_given_up_after_growing_pauses() -> None:
    pauses: list[float] = []

    def play(flow: Flow[str]) -> None:
        step = next(flow)
        while True:
            match step:
                case Work():
                    step = flow.send(step.run())
                case Ask(method="HEAD"):
                    step = flow.send(Reply(404, {"upload-offset": "2"}, b""))
                case Ask():
                    step = flow.throw(Unreachable("it broke"))
                case Pause():
                    pauses.append(step.seconds)
                    step = flow.send(0.0)

    with pytest.raises(Unreachable, match="it broke"):
        play(upload(b"model"))
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4]


def test_an_upload_outlives_a_platform_that_is_away_for_a_while(
    client: Client, platform: Platform, model: Path
) -> None:
    platform.broken_uploads = [500_000]
    # The first HEAD is answered; after the break so many calls find the platform away that one call gives up.
    platform.answers = [Answer(404), *[Answer(503)] * 5]
    sha256 = client.upload(model)
    assert platform.artifacts[sha256] == model.read_bytes()


def test_an_empty_model_is_refused_before_anything_is_sent(client: Client, platform: Platform) -> None:
    with pytest.raises(Invalid, match="empty"):
        client.upload(b"")
    assert not platform.requests


# --- push, deploy, roll back ------------------------------------------------------------------------------------------


def test_a_first_push_returns_when_the_version_serves(client: Client, platform: Platform, model: Path) -> None:
    stages: list[str] = []
    version = client.push(model, name="m", labels={"team": "a"}, progress=lambda each: stages.append(each.stage))
    assert (version.version, version.labels, platform.stable) == (1, {"team": "a"}, {"m": 1})
    assert platform.counted("POST /v1/rollouts") == 0, "a first version is rolled out by itself"
    assert [*dict.fromkeys(stages)] == ["upload", "loading", "shifting", "promoted"]


def test_a_later_push_is_rolled_out_as_soon_as_rollout_has_heard_of_it(
    client: Client, platform: Platform, model: Path
) -> None:
    client.push(model, name="m")
    platform.unheard = 2
    version = client.push(model, name="m", classes=["a", "b"])
    assert version.version == 2
    assert platform.stable == {"m": 2}
    assert platform.counted("POST /v1/rollouts") == 3


def test_a_repeated_push_returns_the_same_version_and_changes_nothing(
    client: Client, platform: Platform, model: Path
) -> None:
    first = client.push(model, name="m")
    assert client.push(model, name="m") == first
    assert len(platform.rollouts) == 1


def test_a_push_without_deploy_starts_no_rollout(client: Client, platform: Platform, model: Path) -> None:
    assert client.push(model, name="m", deploy=False).version == 1
    assert not platform.rollouts


def test_a_push_without_wait_leaves_its_rollout_running(client: Client, platform: Platform, model: Path) -> None:
    client.push(model, name="m", wait=False)
    assert platform.rollouts[0].state == RolloutState.LOADING
    assert platform.counted("GET /v1/rollouts/") == 0


def test_lepton_push_needs_no_client(platform: Platform, model: Path) -> None:
    assert lepton.push(model, name="m").version == 1


def test_a_rollout_that_fails_raises_with_its_reason(client: Client, platform: Platform, model: Path) -> None:
    platform.outcome = RolloutState.FAILED
    with pytest.raises(RolloutFailed, match="m version 1 was not deployed: as told"):
        client.push(model, name="m")


def test_waiting_ends_after_its_timeout(client: Client, platform: Platform, model: Path) -> None:
    platform.outcome = RolloutState.SHIFTING
    with pytest.raises(DeadlineExceeded, match=r"still shifting after 0\.2 s"):
        client.push(model, name="m", timeout=0.2)


def test_deploying_a_version_that_is_on_its_way_joins_its_rollout(
    client: Client, platform: Platform, model: Path
) -> None:
    client.push(model, name="m", wait=False)
    assert client.deploy("m", 1).id == platform.rollouts[0].id
    assert len(platform.rollouts) == 1


def test_deploying_beside_another_rollout_is_a_conflict(client: Client, model: Path) -> None:
    client.push(model, name="m", wait=False)
    client.push(model, name="m", classes=["a"], deploy=False)
    with pytest.raises(Conflict, match="another rollout is open"):
        client.deploy("m", 2)


def test_deploying_an_unknown_model_is_not_found_at_once(client: Client, platform: Platform) -> None:
    platform.unheard = 1
    with pytest.raises(NotFound, match="there is no model 'm'"):
        client.deploy("m", 2)


def test_a_rollback_returns_when_the_version_before_serves_again(
    client: Client, platform: Platform, model: Path
) -> None:
    client.push(model, name="m")
    client.push(model, name="m", classes=["a"])
    assert client.rollback("m").version == 1
    assert client.serving("m").stable == 1
    assert [each.version for each in client.rollouts("m")] == [1, 2, 1]


# --- lists, keys ------------------------------------------------------------------------------------------------------


def test_lists_come_from_as_many_pages_as_there_are(client: Client, platform: Platform, model: Path) -> None:
    for name in ("a", "b", "c"):
        client.push(model, name=name)
    models = client.models()
    assert_type(models, list[Model])
    assert [each.name for each in models] == ["a", "b", "c"]
    assert [each.type for each in client.timeline("a")] == ["VersionRegistered"]
    assert platform.counted("GET /v1/models?after") == 2


def test_a_new_key_shows_its_secret_once(client: Client) -> None:
    key = client.create_key("robot", scopes=["infer", Scope.DEPLOY])
    assert (key.secret, key.scopes) == (SECRET, [Scope.INFER, Scope.DEPLOY])
    (listed,) = client.keys()
    assert (listed.name, listed.id) == ("robot", key.id)
    client.revoke_key(key.id)
    with pytest.raises(NotFound, match="k2"):
        client.revoke_key("k2")


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda client: client.create_key("robot", scopes=["root"]), "scopes"),
        (lambda client: client.create_tenant("Not A Name"), "name"),
        (lambda client: client.deploy("m", 0), "version"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_sent(
    client: Client, platform: Platform, call: Callable[[Client], object], named: str
) -> None:
    with pytest.raises(Invalid, match=named):
        call(client)
    assert not platform.requests


# --- inference --------------------------------------------------------------------------------------------------------

ARRAYS = {
    "x": np.array([[1.5, np.nan], [-np.inf, 0]], dtype=np.float32),
    "text": np.array(["ä", "", "a" * 300], dtype=object),
    "n": np.array([2**62, -1], dtype=">i8"),
}


def test_arrays_go_out_and_come_back_in_binary(client: Client, platform: Platform) -> None:
    platform.signature = Signature(SPECS, SPECS)
    outputs = client.infer("m", ARRAYS)
    np.testing.assert_array_equal(outputs["x"], ARRAYS["x"])
    assert outputs["text"].tolist() == ["ä".encode(), b"", b"a" * 300]
    np.testing.assert_array_equal(outputs["n"], ARRAYS["n"])
    assert outputs.version == "7"


def test_a_version_and_outputs_are_chosen(client: Client, platform: Platform) -> None:
    platform.signature = Signature(SPECS, SPECS)
    outputs = client.infer("m", ARRAYS, version=3, outputs=["n"])
    assert list(outputs) == ["n"]
    assert outputs.version == "3"
    assert platform.requests == ["POST /v2/models/m/versions/3/infer"]


async def test_the_async_client_answers_the_same(platform: Platform) -> None:
    async with AsyncClient() as client:
        assert_type(client.models, Callable[[], Coroutine[Any, Any, list[Model]]])
        outputs = await client.infer("m", {"x": np.array([[1, 2]] * 3, dtype=np.float32)})
        assert (await client.metadata("m")).inputs[0].name == "x"
    assert outputs["x"].tolist() == [[1, 2]] * 3


def test_an_answer_in_json_is_understood_too(client: Client, platform: Platform) -> None:
    outputs: list[dict[str, Any]] = [
        {"name": "y", "shape": [2], "datatype": "FP32", "data": [None, 2.5]},
        {"name": "h", "shape": [1, 2], "datatype": "BF16", "data": [1, 2]},
        {"name": "s", "shape": [1], "datatype": "BYTES", "data": ["é"]},
    ]
    platform.answers = [Answer(200, {"model_name": "m", "model_version": "4", "outputs": outputs})]
    answer = client.infer("m", {"x": np.zeros((1, 2), np.float32)})
    np.testing.assert_array_equal(answer["y"], np.array([np.nan, 2.5], np.float32))
    assert answer["h"].dtype.name == "bfloat16"
    assert answer["s"].tolist() == ["é".encode()]


@pytest.mark.parametrize(
    ("value", "said"),
    [([[1, 2], [3]], "rows of different lengths"), (np.array([1j]), "complex128"), ([object()], "object among")],
)
def test_what_is_no_tensor_is_refused_with_the_inputs_name(client: Client, value: Any, said: str) -> None:
    with pytest.raises(Invalid, match=f"'x'.*{said}"):
        client.infer("m", {"x": value})


def test_a_wrong_input_is_named_by_the_platforms_own_words(client: Client) -> None:
    with pytest.raises(Invalid, match="x"):
        client.infer("m", {"x": np.zeros((1, 3), np.float32)})


def test_another_datatype_than_the_models_is_told_with_the_cast(client: Client) -> None:
    with pytest.raises(Invalid, match=r"FP64, expected FP32\n.*astype\(numpy\.float32\)"):
        client.infer("m", {"x": np.zeros((1, 2))})


def test_inputs_without_names_are_refused(client: Client) -> None:
    unnamed: Any = [[1.0, 2.0]]
    with pytest.raises(Invalid, match="by name"):
        client.infer("m", unnamed)


# --- errors and retries -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, Invalid), (401, Unauthenticated), (403, Forbidden), (404, NotFound), (409, Conflict), (413, TooLarge)],
)
def test_each_status_is_its_kind_and_is_not_retried(
    client: Client, platform: Platform, status: int, kind: type[lepton.LeptonError]
) -> None:
    platform.answers = [problem(status)]
    with pytest.raises(kind, match="as it is") as raised:
        client.models()
    assert raised.value.status == status
    assert len(platform.requests) == 1


def test_safe_calls_are_retried_until_the_platform_is_back(client: Client, platform: Platform) -> None:
    platform.answers = [problem(503), Answer(429, {"error": "slow"}, {"retry-after": "0"}), Answer(502, b"<html>")]
    assert client.models() == []
    assert len(platform.requests) == 4


def test_a_call_that_would_act_twice_is_not_retried(client: Client, platform: Platform) -> None:
    platform.answers = [problem(503)]
    with pytest.raises(Unavailable):
        client.create_key("robot")
    assert len(platform.requests) == 1


def test_a_long_retry_after_is_told_and_not_waited_for(client: Client, platform: Platform) -> None:
    platform.answers = [Answer(429, {"error": "slow down"}, {"retry-after": "60"})]
    with pytest.raises(Limited, match="slow down") as raised:
        client.infer("m", {"x": np.zeros((1, 2), np.float32)})
    assert raised.value.retry_after_s == 60


def test_each_wrong_input_of_a_problem_is_told(client: Client, platform: Platform) -> None:
    body = {"title": "No", "status": 400, "detail": "wrong", "errors": [{"name": "query.limit", "detail": "too large"}]}
    platform.answers = [Answer(400, body)]
    with pytest.raises(Invalid, match=r"wrong\nquery.limit: too large"):
        client.models()


@pytest.mark.parametrize("body", [b"<html>", b"[]", json.dumps({"items": 3}).encode()])
def test_an_answer_of_something_else_is_an_error_with_a_hint(client: Client, platform: Platform, body: bytes) -> None:
    platform.answers = [Answer(200, body)]
    with pytest.raises(lepton.LeptonError, match="Is the URL that of a Lepton platform"):
        client.models()


def test_a_platform_that_does_not_run_is_unreachable_and_says_how_to_start_it() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with Client(url) as client, pytest.raises(Unreachable, match=f"Nothing answers at {url}.\nStart it with"):
            client.models()


def test_a_platform_that_does_not_answer_in_time_is_a_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Client(url) as client, pytest.raises(DeadlineExceeded, match=r"within 0\.1 s"):
            client.infer("m", {"x": np.zeros((1, 2), np.float32)}, timeout=0.1)


# --- where the platform is --------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local platform's folder, and nothing in the environment but that."""
    (tmp_path / "platform.json").write_text('{"url": "http://127.0.0.1:9000/"}')
    (tmp_path / "key").write_text("lp_local\n")
    monkeypatch.setenv("LEPTON_HOME", str(tmp_path))
    monkeypatch.delenv("LEPTON_URL", raising=False)
    monkeypatch.delenv("LEPTON_API_KEY", raising=False)
    return tmp_path


def test_the_local_platform_is_found_with_its_key(home: Path) -> None:
    found = find_endpoint()
    assert (found.url, found.key) == ("http://127.0.0.1:9000", "lp_local")


def test_arguments_win_over_the_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEPTON_URL", "https://a.example")
    monkeypatch.setenv("LEPTON_API_KEY", "lp_env")
    assert (find_endpoint().url, find_endpoint().key) == ("https://a.example", "lp_env")
    found = find_endpoint("http://b.example", "lp_given")
    assert (found.url, found.key) == ("http://b.example", "lp_given")


def test_a_key_read_with_its_line_break_is_the_key(home: Path) -> None:
    assert find_endpoint(key="lp_given\n").key == "lp_given"
    with pytest.raises(Unauthenticated, match="line break"):
        find_endpoint(key="lp_given\nKeep it now")


def test_the_local_key_is_sent_to_no_other_platform(home: Path) -> None:
    assert find_endpoint("https://elsewhere.example").key is None
    assert "lp_local" not in repr(find_endpoint())


def test_where_nothing_was_started_there_is_a_hint_and_no_guess(home: Path) -> None:
    (home / "platform.json").unlink()
    with pytest.raises(Unreachable, match=r"No platform was started here yet\.\nStart it with `lepton up`"):
        find_endpoint()


@pytest.mark.parametrize("url", ["ftp://x", "127.0.0.1:8080", "http://"])
def test_what_is_no_url_is_invalid(url: str) -> None:
    with pytest.raises(Invalid, match="not a platform's URL"):
        find_endpoint(url)
