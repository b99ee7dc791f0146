"""The worker as its callers see it: tritonclient and plain HTTP against a worker process on a real etcd."""

import asyncio
import gzip
import http.client
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from lepton.processes import running
from lepton.servers import Etcd
from lepton_common.errors import Overloaded
from lepton_common.etcd import EtcdClient
from lepton_common.health import Readiness
from lepton_common.http11_request import Buffer, Head, Request
from lepton_common.signature import DTYPES
from lepton_common.types import ModelRef
from lepton_worker.api import Api
from lepton_worker.assignments import Assignments
from lepton_worker.lane import Lane

from .conftest import DOUBLE, WorkerRecipe, onnx_bytes, serve

# Datatypes by their names in ONNX's text form.
DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8",
    "int16": "INT16", "int32": "INT32", "int64": "INT64", "float16": "FP16", "float": "FP32", "double": "FP64",
    "string": "BYTES",
}  # fmt: skip


def echo() -> str:
    """A graph with an input x_t and the same output y_t for every type t."""
    inputs = ", ".join(f"{each}[N] x_{each}" for each in DATATYPES)
    outputs = ", ".join(f"{each}[N] y_{each}" for each in DATATYPES)
    nodes = " ".join(f"y_{each} = Identity(x_{each})" for each in DATATYPES)
    return f"g ({inputs}) => ({outputs}) {{ {nodes} }}"


MODELS = {
    "double": onnx_bytes(DOUBLE),
    "two": onnx_bytes("g (float[N] a, float[N] b) => (float[N] s, float[N] d) { s = Add(a, b) d = Sub(a, b) }"),
    "classes": onnx_bytes("g (float[N, 3] x) => (float[N, 3] y) { y = Identity(x) }", labels='["cat", "dog", "cow"]'),
    "lookup": onnx_bytes("g (int64[N] x) => (float[N] y) <float[2] w = {1, 2}> { y = Gather(w, x) }"),
    "breaks": onnx_bytes("g (int32[N] x) => (int32[N] y) { z = Sub(x, x) y = Div(x, z) }"),
    "fixed": onnx_bytes("g (float[1, 2] x) => (float[1, 2] y) { y = Identity(x) }"),
    "echo": onnx_bytes(echo()),
}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerRecipe]:
    """A worker that holds MODELS, and one version that is no model."""
    etcd = Etcd(tmp_path_factory.mktemp("etcd"))
    recipe = WorkerRecipe(tmp_path_factory.mktemp("worker"), etcd.address)

    async def assign() -> None:
        client = EtcdClient(etcd.address)
        for model, data in MODELS.items():
            await serve(client, recipe, model, data)
        await serve(client, recipe, "broken", b"not onnx")
        await client.close()

    with running(etcd):
        asyncio.run(assign())
        with running(recipe, timeout_s=90):
            yield recipe


@pytest.fixture
def client(worker: WorkerRecipe) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(worker.address) as client:
        yield client


def ask(
    worker: WorkerRecipe, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers with lower-case names, and body of the answer."""
    connection = http.client.HTTPConnection(worker.address, timeout=20)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def infer(worker: WorkerRecipe, model: str, document: Any, **headers: str) -> tuple[int, dict[str, str], Any]:
    status, got, body = ask(worker, "POST", f"/v2/models/{model}/infer", json.dumps(document).encode(), **headers)
    return status, got, json.loads(body)


def tensor(data: Any, shape: list[int], datatype: str = "FP32", name: str = "x") -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": datatype, "data": data}


def values_of(datatype: str) -> Any:
    if datatype == "BYTES":
        return np.array(["é".encode(), b""], object)
    return np.array([0, 1]).astype(DTYPES[datatype])


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_sends_and_gets_every_datatype(binary: bool, client: triton.InferenceServerClient) -> None:
    inputs, outputs = [], []
    for onnx_type, datatype in DATATYPES.items():
        given = triton.InferInput(f"x_{onnx_type}", [2], datatype)
        # tritonclient sends FP16 as binary only.
        given.set_data_from_numpy(values_of(datatype), binary_data=binary or datatype == "FP16")
        inputs.append(given)
        outputs.append(triton.InferRequestedOutput(f"y_{onnx_type}", binary_data=binary or datatype == "FP16"))
    answer = client.infer("echo", inputs, outputs=outputs)
    for onnx_type, datatype in DATATYPES.items():
        got = answer.as_numpy(f"y_{onnx_type}").tolist()
        if datatype == "BYTES":
            got = [value if isinstance(value, bytes) else value.encode() for value in got]
        assert got == values_of(datatype).tolist()


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_tritonclient_compresses_both_ways(encoding: str, client: triton.InferenceServerClient) -> None:
    given = np.ones((4, 2), np.float32)
    wanted = triton.InferInput("x", [4, 2], "FP32")
    wanted.set_data_from_numpy(given)
    got = client.infer(
        "double", [wanted], request_compression_algorithm=encoding, response_compression_algorithm=encoding
    )
    assert got.as_numpy("y").tolist() == (2 * given).tolist()


def test_tritonclient_sees_the_model(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("double")
    assert client.is_model_ready("double", "1")
    assert not client.is_model_ready("broken")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert client.get_model_metadata("double") == {
        "name": "double",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
    }
    config = client.get_model_config("double")
    assert (config["max_batch_size"], config["input"][0]["dims"]) == (64, [2])
    assert config["parameters"]["batching"]["string_value"] == "on"


def test_the_configuration_says_why_a_model_is_not_batched(client: triton.InferenceServerClient) -> None:
    config = client.get_model_config("fixed")
    assert config["max_batch_size"] == 0
    assert "dynamic_batching" not in config
    assert config["parameters"]["batching"]["string_value"] == "off: input 'x' has no free first dimension"


def test_statistics_count_rows_and_runs(client: triton.InferenceServerClient) -> None:
    wanted = triton.InferInput("b", [3], "FP32")
    wanted.set_data_from_numpy(np.ones(3, np.float32))
    other = triton.InferInput("a", [3], "FP32")
    other.set_data_from_numpy(np.ones(3, np.float32))
    before = client.get_inference_statistics("two")["model_stats"][0]
    client.infer("two", [wanted, other])
    after = client.get_inference_statistics("two")["model_stats"][0]
    assert after["inference_count"] - before["inference_count"] == 3
    assert after["execution_count"] - before["execution_count"] == 1
    assert after["inference_stats"]["success"]["count"] - before["inference_stats"]["success"]["count"] == 1
    assert {each["name"] for each in client.get_inference_statistics()["model_stats"]} == set(MODELS)


def test_json_answers_echo_the_id_and_name_model_and_version(worker: WorkerRecipe) -> None:
    status, headers, answer = infer(worker, "double", {"id": "a1", "inputs": [tensor([[1, 2], [3, 4]], [2, 2])]})
    assert status == 200
    assert headers["x-lepton-version"] == "1"
    assert "inference-header-content-length" not in headers
    assert answer == {
        "model_name": "double",
        "model_version": "1",
        "id": "a1",
        "outputs": [tensor([2.0, 4.0, 6.0, 8.0], [2, 2], name="y")],
    }


def test_only_the_wanted_outputs_come_in_the_wanted_order(worker: WorkerRecipe) -> None:
    inputs = [tensor([5], [1], name="a"), tensor([3], [1], name="b")]
    _, _, answer = infer(worker, "two", {"inputs": inputs, "outputs": [{"name": "d"}, {"name": "s"}]})
    assert [(output["name"], output["data"]) for output in answer["outputs"]] == [("d", [2.0]), ("s", [8.0])]
    _, _, answer = infer(worker, "two", {"inputs": inputs, "outputs": [{"name": "d"}]})
    assert [output["name"] for output in answer["outputs"]] == ["d"]


def test_classification_uses_the_models_labels(worker: WorkerRecipe) -> None:
    wanted = {"name": "y", "parameters": {"classification": 2}}
    _, _, answer = infer(worker, "classes", {"inputs": [tensor([1, 3, 2], [1, 3])], "outputs": [wanted]})
    assert answer["outputs"] == [tensor(["3.000000:1:dog", "2.000000:2:cow"], [1, 2], "BYTES", "y")]


def test_a_raw_binary_body_is_the_input(worker: WorkerRecipe) -> None:
    given = np.array([[1, 2]], np.float32)
    status, headers, body = ask(
        worker, "POST", "/v2/models/double/infer", given.tobytes(), Inference_Header_Content_Length="0"
    )
    assert status == 200
    assert body[int(headers["inference-header-content-length"]) :] == (2 * given).tobytes()


def test_the_meshs_choice_of_a_version_is_followed(worker: WorkerRecipe) -> None:
    document = {"inputs": [tensor([1, 2], [1, 2])]}
    assert infer(worker, "double", document, x_lepton_version="1")[0] == 200
    status, headers, answer = infer(worker, "double", document, x_lepton_version="9")
    assert (status, headers["x-lepton-version"]) == (404, "9")
    assert answer == {"error": "model 'double' version 9 is not served"}
    assert infer(worker, "double", document, x_lepton_version="nine")[0] == 400


def test_the_meshs_host_names_the_tenant(worker: WorkerRecipe) -> None:
    document = {"inputs": [tensor([1, 2], [1, 2])]}
    assert infer(worker, "double", document, Host="double.default.models.lepton")[0] == 200
    assert infer(worker, "double", document, Host="double.other.models.lepton")[0] == 404


def test_a_version_that_failed_to_load_is_unavailable_with_the_reason(worker: WorkerRecipe) -> None:
    status, headers, answer = infer(worker, "broken", {"inputs": []})
    assert (status, headers["x-lepton-reason"], headers["retry-after"]) == (503, "not-loaded", "1")
    assert "version 1 is failed: onnxruntime cannot load the model" in answer["error"]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"inputs": [tensor([1], [1, 1])]}, "input 'x': got shape [1, 1], expected [-1, 2]"),
        ({"inputs": [tensor([1, 2], [1, 2], "INT8")]}, "input 'x': got datatype INT8, expected FP32"),
        ({"inputs": [tensor([1, 2], [1, 2], name="z")]}, "input 'z' is unknown: the model takes 'x'"),
        ({"inputs": []}, "input 'x' is missing: FP32 [-1, 2]"),
        ({"inputs": [tensor([1, 2], [1, 2])], "parameters": {"timeout": "x"}}, "parameter timeout must be"),
        ([], "the request must be a JSON object"),
    ],
)
def test_a_wrong_input_is_named(document: Any, message: str, worker: WorkerRecipe) -> None:
    status, headers, answer = infer(worker, "double", document)
    assert (status, headers["x-lepton-version"]) == (400, "1")
    assert message in answer["error"]


@pytest.mark.parametrize("timeout", [10**7, 2**63, 10**400])
def test_a_timeout_longer_than_any_is_none(timeout: int, worker: WorkerRecipe) -> None:
    status, _, _ = infer(worker, "double", {"inputs": [tensor([1, 2], [1, 2])], "parameters": {"timeout": timeout}})
    assert status == 200


def test_an_empty_body_is_refused(worker: WorkerRecipe) -> None:
    status, _, body = ask(worker, "POST", "/v2/models/double/infer")
    assert (status, json.loads(body)) == (400, {"error": "the request is not JSON: the body is empty"})


def test_a_value_that_the_model_refuses_is_the_callers_error(worker: WorkerRecipe) -> None:
    status, _, answer = infer(worker, "lookup", {"inputs": [tensor([7], [1], "INT64")]})
    assert status == 400
    assert "out of data bounds, idx=7" in answer["error"]


def test_values_that_a_model_fails_on_are_named_without_a_traceback(worker: WorkerRecipe) -> None:
    status, headers, answer = infer(worker, "breaks", {"inputs": [tensor([1], [1], "INT32")]})
    assert (status, headers["x-lepton-version"]) == (400, "1")
    assert answer["error"].startswith("the model fails on these values of 'x': ")
    assert "/" not in answer["error"]


def test_a_deadline_that_passed_is_answered_as_such(worker: WorkerRecipe) -> None:
    document = {"inputs": [tensor([1, 2], [1, 2])]}
    status, _, answer = infer(worker, "double", document, x_request_timeout_ms="0")
    assert (status, answer["error"]) == (504, "the deadline passed before the request could run")
    assert infer(worker, "double", document, x_request_timeout_ms="-1")[0] == 400


def test_a_sampled_request_is_told_where_its_time_went(worker: WorkerRecipe) -> None:
    traced = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    document = {"inputs": [tensor([1, 2], [1, 2])]}
    told = infer(worker, "double", document, traceparent=traced)[1]["server-timing"]
    stage = r"(decode|queue|run|encode);dur=[0-9]+\.[0-9]{3}"
    parts = told.split(", ")
    assert all(re.match(stage, each) for each in parts)
    assert [each.partition(";")[0] for each in parts] == ["decode", "queue", "run", "encode"]
    assert parts[2].endswith(';desc="1 rows of 1 requests"')
    late = infer(worker, "double", document, traceparent=traced, x_request_timeout_ms="0")[1]["server-timing"]
    assert [each.partition(";")[0] for each in late.split(", ")] == ["decode", "queue"]
    wrong = infer(worker, "double", {}, traceparent=traced)[1]["server-timing"]
    assert re.fullmatch(stage, wrong)
    assert "server-timing" not in infer(worker, "double", document, traceparent=traced[:-1] + "0")[1]
    assert "server-timing" not in infer(worker, "double", document)[1]


def test_compressed_bodies_are_bounded_and_other_encodings_refused(worker: WorkerRecipe) -> None:
    bomb = gzip.compress(b" " * (258 << 20), 1)
    path = "/v2/models/double/infer"
    assert ask(worker, "POST", path, bomb, Content_Encoding="gzip")[0] == 413
    assert ask(worker, "POST", path, b"{}", Content_Encoding="br")[0] == 415
    assert ask(worker, "POST", path, b"{}", Content_Encoding="gzip")[0] == 400


class Full(Assignments):
    """Versions whose queues are full."""

    def __init__(self) -> None: ...

    def lane(self, model: ModelRef, version: int | None) -> Lane:
        raise Overloaded("the queue is full: 9 rows wait", retry_after_s=2)


class Peer:
    """Remembers what it is answered."""

    peer = "127.0.0.1"

    def answer(self, head: Head, status: int, headers: bytes, body: Buffer | Sequence[Buffer]) -> None:
        self.status, self.headers = status, headers


def test_the_mesh_retries_what_is_not_loaded_elsewhere_but_no_overload(worker: WorkerRecipe) -> None:
    peer = Peer()
    head = Head("POST", b"/v2/models/m/infer", {}, 0, keep_alive=True, old=False)
    Api(Full(), Readiness(), bytes, "cpu", 1).handle(Request(peer, head, b""))
    assert peer.status == 503
    assert b"x-envoy-ratelimited: true\r\n" in peer.headers
    assert b"retry-after: 2\r\n" in peer.headers
    status, headers, _ = infer(worker, "broken", {})
    assert (status, headers["x-lepton-reason"]) == (503, "not-loaded")
    assert "x-envoy-ratelimited" not in headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/double/infer", 405),
        ("POST", "/v2/models/double", 405),
        ("DELETE", "/v2/models/double", 405),
        ("GET", "/v2/models/nothing", 404),
        ("GET", "/v2/models/double/versions/7", 404),
        ("GET", "/v2/models/double/versions/x", 404),
        ("GET", "/nowhere", 404),
        ("POST", "/nowhere", 404),
    ],
)
def test_what_is_not_there_is_an_oip_error(method: str, path: str, status: int, worker: WorkerRecipe) -> None:
    got, headers, body = ask(worker, method, path)
    assert got == status
    assert headers["content-type"] == "application/json"
    assert isinstance(json.loads(body)["error"], str)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
def test_no_page_in_a_browser_is_answered(method: str, worker: WorkerRecipe) -> None:
    for origin in ("https://evil.example", "null", "http://127.0.0.1"):
        assert ask(worker, method, "/v2/models/double/infer", origin=origin)[0] == 403


def test_health_and_metrics_are_on_the_same_port(worker: WorkerRecipe) -> None:
    assert ask(worker, "GET", "/health/live")[0] == 200
    assert ask(worker, "GET", "/health/ready")[0] == 200
    assert json.loads(ask(worker, "GET", "/v2/health/ready")[2]) == {"ready": True}
    assert json.loads(ask(worker, "GET", "/v2/")[2])["name"] == "lepton"
    status, _, body = ask(worker, "GET", "/metrics")
    assert status == 200
    assert 'lepton_worker_versions{model="broken",state="failed",tenant="default",version="1"} 1.0' in body.decode()
    assert "lepton_worker_requests_total" in body.decode()
