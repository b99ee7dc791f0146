"""What clients other than tritonclient insist on: KServe's and MLServer's, curl, load balancers."""

import json

import httpx
import numpy as np
import pytest

from .local_platform import Platform, until
from .oip_requests import GOOD, ROW, infer
from .onnx_models import mlp as mlp_model
from .onnx_models import mlp_scores


@pytest.mark.parametrize("path", ["/v2", "/v2/"])
def test_server_metadata_is_there_with_and_without_a_slash(http: httpx.Client, path: str) -> None:
    answer = http.get(path)
    assert answer.status_code == 200
    assert {"name", "version", "extensions"} <= set(answer.json())


def test_health_says_live_and_ready_in_its_body(http: httpx.Client, mlp: str) -> None:
    assert http.get("/v2/health/live").json()["live"] is True
    assert http.get("/v2/health/ready").json()["ready"] is True
    assert http.get(f"/v2/models/{mlp}/ready").json() == {"name": mlp, "ready": True}
    assert http.get(f"/v2/models/{mlp}/versions/1/ready").json()["ready"] is True


@pytest.mark.parametrize(
    "path", ["/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/mlp", "/v2/models/mlp/ready"]
)
def test_head_is_get_without_the_body(http: httpx.Client, mlp: str, path: str) -> None:
    answer = http.head(path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert http.get(path).status_code == 200


@pytest.mark.parametrize("content_type", ["application/json", "application/x-www-form-urlencoded", "text/plain", None])
def test_content_type_does_not_matter(http: httpx.Client, mlp: str, content_type: str | None) -> None:
    # curl -d says it sends a form.
    headers = {} if content_type is None else {"content-type": content_type}
    answer = infer(http, mlp, GOOD, **headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("application/json")
    assert "inference-header-content-length" not in answer.headers


def test_answer_has_what_the_protocol_requires(http: httpx.Client, mlp: str) -> None:
    without_id = {key: value for key, value in GOOD.items() if key != "id"}
    for body in (without_id, {**without_id, "id": None}, {**without_id, "outputs": []}):
        answer = infer(http, mlp, body).json()
        assert answer["model_name"] == mlp
        assert answer["model_version"] == "1"
        assert isinstance(answer["id"], str)
        assert [(each["name"], each["datatype"], each["shape"]) for each in answer["outputs"]] == [
            ("scores", "FP32", [1, 3]),
            ("label", "INT64", [1]),
        ]
        np.testing.assert_allclose(
            answer["outputs"][0]["data"], mlp_scores(np.array([ROW], np.float32)).ravel(), rtol=1e-4
        )


def test_nested_data_and_unknown_keys_are_taken(http: httpx.Client, mlp: str) -> None:
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [ROW], "colour": "red"}
    answer = infer(http, mlp, {"model_name": mlp, "inputs": [tensor], "extra": {"a": 1}})
    assert answer.json()["outputs"] == infer(http, mlp, GOOD).json()["outputs"]


def test_raw_binary_body_is_the_only_input(http: httpx.Client, mlp: str) -> None:
    x = np.array([ROW, ROW], np.float32)
    answer = infer(http, mlp, x.tobytes(), inference_header_content_length="0")
    length = int(answer.headers["inference-header-content-length"])
    assert answer.headers["content-type"] == "application/octet-stream"
    scores, label = json.loads(answer.content[:length])["outputs"]
    assert scores["parameters"] == {"binary_data_size": 24}
    assert label["parameters"] == {"binary_data_size": 16}
    got = np.frombuffer(answer.content[length : length + 24], np.float32).reshape(2, 3)
    np.testing.assert_allclose(got, mlp_scores(x), rtol=1e-4)
    assert len(answer.content) == length + 24 + 16


def test_index_can_be_asked_for_what_is_ready_only(platform: Platform, http: httpx.Client, name: str) -> None:
    platform.serve(name, mlp_model(111))
    with platform.http() as operator:
        assert operator.post(f"/v2/repository/models/{name}/unload").status_code == 200
        everything = http.post("/v2/repository/index").json()
        ready = http.post("/v2/repository/index", json={"ready": True}).json()
    assert {each["name"] for each in everything} - {each["name"] for each in ready} >= {name}
    assert {each["state"] for each in ready} == {"READY"}
    for each in everything:
        assert set(each) <= {"name", "version", "state", "reason"}
        assert each["state"] in {"READY", "UNAVAILABLE", "LOADING", "UNLOADING"}


def test_unready_model_says_when_to_try_again(platform: Platform, http: httpx.Client, name: str) -> None:
    platform.serve(name, mlp_model(112))
    with platform.http() as operator:
        assert operator.post(f"/v2/repository/models/{name}/unload").status_code == 200
    for answer in (http.get(f"/v2/models/{name}/ready"), infer(http, name, GOOD)):
        assert answer.status_code == 503
        assert name in answer.json()["error"]
        assert int(answer.headers["retry-after"]) >= 1


def test_one_version_can_be_warmed_and_cooled(platform: Platform, http: httpx.Client, name: str) -> None:
    platform.serve(name, mlp_model(113))
    with platform.client() as client:
        client.push(mlp_model(114), name=name, deploy=False)
    path = f"/v2/models/{name}/versions/2"
    assert http.get(f"{path}/ready").status_code == 404
    with platform.http() as operator:
        # rollout hears of a new version over Kafka.
        until(lambda: operator.post(f"/v2/repository/models/{name}/load?version=2").status_code == 200)
        assert http.get(f"{path}/ready").status_code == 200
        assert http.post(f"{path}/infer", json=GOOD).json()["model_version"] == "2"
        assert infer(http, name, GOOD).json()["model_version"] == "1"
        assert http.get(f"/v2/models/{name}").json()["versions"] == ["1", "2"]
        body = {"parameters": {"version": 2}}
        assert operator.post(f"/v2/repository/models/{name}/unload", json=body).status_code == 200
        assert http.get(f"{path}/ready").status_code == 404
        # The one that takes the traffic cannot be taken away by its number.
        answer = operator.post(f"/v2/repository/models/{name}/unload?version=1")
        assert answer.status_code == 409
        assert "traffic" in answer.json()["error"]
