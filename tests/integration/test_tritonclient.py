"""NVIDIA's own HTTP client, unmodified, through the front door: what it can ask of the server and its models."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tritonclient.http import InferenceServerClient, InferenceServerClientPlugin
from tritonclient.utils import InferenceServerException

from .local_platform import Platform, until
from .onnx_models import mlp as mlp_model
from .onnx_models import mlp_scores
from .triton import refusal, tensor

X = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)

# --- the server and its models ----------------------------------------------------------------------------------------


def test_server_is_live_and_ready(triton: InferenceServerClient) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()


def test_model_is_ready_in_the_versions_that_serve(triton: InferenceServerClient, mlp: str) -> None:
    assert triton.is_model_ready(mlp)
    assert triton.is_model_ready(mlp, "1")
    assert not triton.is_model_ready(mlp, "9")
    assert not triton.is_model_ready("nothing")


def test_server_metadata_names_its_extensions(triton: InferenceServerClient) -> None:
    metadata = triton.get_server_metadata()
    assert metadata["name"] == "lepton"
    assert isinstance(metadata["version"], str)
    assert {
        "classification",
        "model_repository",
        "model_repository(unload_dependents)",
        "model_configuration",
        "binary_tensor_data",
        "parameters",
        "statistics",
        "trace",
        "logging",
    } <= set(metadata["extensions"])


@pytest.mark.parametrize("version", ["", "1"])
def test_model_metadata_tells_its_signature(triton: InferenceServerClient, mlp: str, version: str) -> None:
    metadata = triton.get_model_metadata(mlp, version)
    assert metadata["name"] == mlp
    assert metadata["versions"] == ["1"]
    assert isinstance(metadata["platform"], str)
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert metadata["outputs"] == [
        {"name": "scores", "datatype": "FP32", "shape": [-1, 3]},
        {"name": "label", "datatype": "INT64", "shape": [-1]},
    ]


@pytest.mark.parametrize("version", ["", "1"])
def test_model_config_tells_its_batching(triton: InferenceServerClient, mlp: str, version: str) -> None:
    config = triton.get_model_config(mlp, version)
    assert config["name"] == mlp
    assert config["max_batch_size"] == 64
    assert "dynamic_batching" in config
    # Where there is a batch, Triton's dims leave it out.
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [4]}]
    assert [each["name"] for each in config["output"]] == ["scores", "label"]


def test_config_of_a_model_whose_rows_depend_on_each_other_has_no_batching(
    triton: InferenceServerClient, neighbourly: str
) -> None:
    config = triton.get_model_config(neighbourly)
    assert config["max_batch_size"] == 0
    assert "dynamic_batching" not in config
    assert config["input"][0]["dims"] == [-1, 2]


def test_repository_index_lists_what_serves(triton: InferenceServerClient, mlp: str, text: str) -> None:
    index = {each["name"]: each for each in triton.get_model_repository_index()}
    for name in (mlp, text):
        assert index[name]["version"] == "1"
        assert index[name]["state"] == "READY"


def test_unloaded_model_is_gone_until_it_is_loaded_again(
    triton: InferenceServerClient, platform: Platform, operator: dict[str, str], name: str
) -> None:
    platform.serve(name, mlp_model(2))
    triton.unload_model(name, headers=operator)
    until(lambda: not triton.is_model_ready(name))
    index = {each["name"]: each["state"] for each in triton.get_model_repository_index()}
    assert index.get(name) != "READY"
    with pytest.raises(InferenceServerException) as raised:
        triton.infer(name, [tensor("x", X)])
    assert raised.value.status() in {"404", "503"}
    assert name in raised.value.message()
    triton.load_model(name, headers=operator)
    assert triton.is_model_ready(name)
    np.testing.assert_allclose(
        triton.infer(name, [tensor("x", X)]).as_numpy("scores"), mlp_scores(X, 2), rtol=1e-4, atol=1e-5
    )
    triton.unload_model(name, headers=operator, unload_dependents=True)


def test_repository_changes_need_the_scope_deploy(
    triton: InferenceServerClient, mlp: str, make_key: Callable[..., str]
) -> None:
    for headers in ({}, {"Authorization": f"Bearer {make_key('infer')}"}):
        assert "deploy" in refusal(403, triton.unload_model, mlp, headers=headers)
        assert "deploy" in refusal(403, triton.load_model, mlp, headers=headers)
    assert triton.is_model_ready(mlp)


def test_unknown_model_cannot_be_loaded(triton: InferenceServerClient, operator: dict[str, str]) -> None:
    assert "nothing" in refusal(404, triton.load_model, "nothing", headers=operator)
    assert "nothing" in refusal(404, triton.unload_model, "nothing", headers=operator)


def test_statistics_count_requests_and_rows_of_all_workers(
    triton: InferenceServerClient, platform: Platform, name: str
) -> None:
    platform.serve(name, mlp_model(3))
    for _ in range(10):
        triton.infer(name, [tensor("x", X)])
    for statistics in (triton.get_inference_statistics(name), triton.get_inference_statistics(name, "1")):
        [stats] = statistics["model_stats"]
        assert (stats["name"], stats["version"]) == (name, "1")
        assert stats["inference_count"] == 10 * len(X)
        assert 1 <= stats["execution_count"] <= 10
        assert stats["inference_stats"]["success"]["count"] == 10
        assert stats["inference_stats"]["success"]["ns"] > 0
        assert stats["inference_stats"]["fail"]["count"] == 0
        batches = stats["batch_stats"]
        assert sum(each["compute_infer"]["count"] for each in batches) == stats["execution_count"]
    listed = [(each["name"], each["version"]) for each in triton.get_inference_statistics()["model_stats"]]
    assert (name, "1") in listed
    assert len(listed) == len(set(listed)), "a version on several workers is one entry"


def test_trace_settings_are_kept_globally_and_per_model(
    triton: InferenceServerClient, mlp: str, operator: dict[str, str]
) -> None:
    before = triton.get_trace_settings()
    assert {"trace_level", "trace_rate", "trace_count"} <= set(before)
    after = triton.update_trace_settings(settings={"trace_rate": "500"}, headers=operator)
    assert after == triton.get_trace_settings() == {**before, "trace_rate": "500"}
    assert triton.get_trace_settings(mlp)["trace_rate"] == "500"
    own = triton.update_trace_settings(mlp, {"trace_rate": "7", "trace_level": ["TIMESTAMPS"]}, headers=operator)
    assert own["trace_rate"] == "7"
    assert own["trace_level"] == ["TIMESTAMPS"]
    assert triton.get_trace_settings()["trace_rate"] == "500"
    # None is how a setting goes back to what it is by default.
    cleared = triton.update_trace_settings(mlp, {"trace_rate": None, "trace_level": None}, headers=operator)
    assert cleared["trace_rate"] == "500"
    triton.update_trace_settings(settings={"trace_rate": None}, headers=operator)
    assert triton.get_trace_settings() == before


def test_wrong_trace_settings_are_refused(
    triton: InferenceServerClient, mlp: str, operator: dict[str, str], make_key: Callable[..., str]
) -> None:
    update = triton.update_trace_settings
    assert "nonsense" in refusal(400, update, settings={"nonsense": "1"}, headers=operator)
    assert "trace_rate" in refusal(400, update, settings={"trace_rate": "often"}, headers=operator)
    assert "nothing" in refusal(404, triton.get_trace_settings, "nothing")
    refusal(403, update, settings={"trace_rate": "1"}, headers={"Authorization": f"Bearer {make_key('infer')}"})


def test_log_settings_can_be_read_and_changed(triton: InferenceServerClient, operator: dict[str, str]) -> None:
    before = triton.get_log_settings()
    assert {"log_info", "log_warning", "log_error", "log_verbose_level", "log_format"} <= set(before)
    after = triton.update_log_settings({"log_verbose_level": 1}, headers=operator)
    assert after == triton.get_log_settings() == {**before, "log_verbose_level": 1}
    assert triton.update_log_settings({"log_verbose_level": before["log_verbose_level"]}, headers=operator) == before
    assert "log_verbose_level" in refusal(
        400, triton.update_log_settings, {"log_verbose_level": "loud"}, headers=operator
    )
    assert "log_file" in refusal(400, triton.update_log_settings, {"log_file": "/etc/passwd"}, headers=operator)


def test_shared_memory_is_refused_readably(triton: InferenceServerClient) -> None:
    assert "shared memory" in refusal(501, triton.get_system_shared_memory_status).lower()
    assert "shared memory" in refusal(501, triton.get_cuda_shared_memory_status).lower()


# --- keys and paths ---------------------------------------------------------------------------------------------------


def test_tenant_comes_from_the_key(
    triton: InferenceServerClient, platform: Platform, make_key: Callable[..., str], mlp: str, name: str
) -> None:
    deployer, caller = (make_key(scope, tenant="triton-users") for scope in ("deploy", "infer"))
    reader = make_key("read", tenant="triton-users")
    with platform.client(make_key("deploy", "read", tenant="triton-users")) as client:
        client.push(mlp_model(5), name=name)
    for headers in ({"Authorization": f"Bearer {caller}"}, {"x-api-key": caller}):
        scores = triton.infer(name, [tensor("x", X)], headers=headers).as_numpy("scores")
        np.testing.assert_allclose(scores, mlp_scores(X, 5), rtol=1e-4, atol=1e-5)
        assert [each["name"] for each in triton.get_model_repository_index(headers=headers)] == [name]
        refusal(404, triton.infer, mlp, [tensor("x", X)], headers=headers)
    refusal(404, triton.infer, name, [tensor("x", X)])
    refusal(403, triton.infer, name, [tensor("x", X)], headers={"x-api-key": reader})
    refusal(403, triton.infer, name, [tensor("x", X)], headers={"x-api-key": deployer})
    refusal(401, triton.infer, name, [tensor("x", X)], headers={"x-api-key": "lp_" + "x" * 43})
    refusal(401, triton.infer, name, [tensor("x", X)], headers={"Authorization": "Basic dXNlcjpwYXNz"})


def test_key_can_come_from_a_plugin(platform: Platform, mlp: str, make_key: Callable[..., str]) -> None:
    key = make_key("infer", tenant="triton-plugins")

    class Bearer(InferenceServerClientPlugin):  # type: ignore[misc]  # tritonclient has no types
        def __call__(self, request: Any) -> None:
            request.headers["Authorization"] = f"Bearer {key}"

    with InferenceServerClient(platform.address) as triton:
        assert triton.is_model_ready(mlp)
        triton.register_plugin(Bearer())
        assert not triton.is_model_ready(mlp), "that tenant has no such model"


def test_url_may_end_in_a_slash_but_has_no_base_path(platform: Platform, mlp: str) -> None:
    with InferenceServerClient(f"{platform.address}/") as triton:
        assert triton.is_model_ready(mlp)
        assert triton.infer(mlp, [tensor("x", X)]).as_numpy("label").shape == (len(X),)
    with InferenceServerClient(f"{platform.address}/somewhere/else") as triton:
        assert not triton.is_server_live()
        with pytest.raises(InferenceServerException, match="/v2"):
            triton.get_server_metadata()


def test_query_parameters_are_ignored(triton: InferenceServerClient, mlp: str) -> None:
    assert triton.is_model_ready(mlp, query_params={"a": "1"})
    assert triton.infer(mlp, [tensor("x", X)], query_params={"a": ["1", "2"]}).as_numpy("label").shape == (len(X),)
