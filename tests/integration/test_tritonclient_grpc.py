"""NVIDIA's own gRPC client, unmodified, at the front door's address: the cases of the HTTP client, and streams."""

import asyncio
import queue
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, InferResult, service_pb2
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from .local_platform import Platform, until
from .onnx_models import DATATYPES, WITH_BF16, WITHOUT_BF16, Array, mlp_scores
from .onnx_models import mlp as mlp_model
from .triton import edges

ROUNDS_FOR_HALF_A_SECOND = np.array([50_000])
X = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)


@pytest.fixture
def triton(platform: Platform) -> Iterator[InferenceServerClient]:
    """tritonclient.grpc without a key, which on this machine may infer."""
    with InferenceServerClient(platform.address) as client:
        yield client


def tensor(name: str, array: Array) -> InferInput:
    given = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    given.set_data_from_numpy(array)
    return given


def refusal(status: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The message with which the call failed."""
    with pytest.raises(InferenceServerException) as raised:
        call(*arguments, **options)
    assert raised.value.status() == f"StatusCode.{status}", str(raised.value)
    return str(raised.value.message())


# --- the server and its models ----------------------------------------------------------------------------------------


def test_server_and_models_are_live_and_ready(triton: InferenceServerClient, mlp: str) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready(mlp)
    assert triton.is_model_ready(mlp, "1")
    assert not triton.is_model_ready(mlp, "9")
    assert not triton.is_model_ready("nothing")


def test_metadata_and_config_are_those_of_http(triton: InferenceServerClient, mlp: str) -> None:
    server = triton.get_server_metadata(as_json=True)
    assert server["name"] == "lepton"
    assert "binary_tensor_data" in server["extensions"]
    metadata = triton.get_model_metadata(mlp, as_json=True)
    assert metadata["versions"] == ["1"]
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["-1", "4"]}]
    config = triton.get_model_config(mlp, "1").config
    assert (config.name, config.max_batch_size, config.backend) == (mlp, 64, "onnxruntime")
    assert [(each.name, list(each.dims)) for each in config.input] == [("x", [4])]
    assert config.HasField("dynamic_batching")


def test_statistics_count_requests(triton: InferenceServerClient, arithmetic: str) -> None:
    a = np.ones((3, 2), np.float32)

    def counted() -> int:
        return int(triton.get_inference_statistics(arithmetic).model_stats[0].inference_count)

    before = counted()
    triton.infer(arithmetic, [tensor("a", a), tensor("b", a)])
    assert until(lambda: counted() - before == 3)
    assert {each.name for each in triton.get_inference_statistics().model_stats} >= {arithmetic}


def test_unloaded_model_is_gone_until_it_is_loaded_again(
    platform: Platform, triton: InferenceServerClient, operator: dict[str, str], mlp: str
) -> None:
    own = platform.serve("unloadable-grpc", mlp_model())
    headers = {"authorization": operator["Authorization"]}
    triton.unload_model(own, headers=headers)
    until(lambda: not triton.is_model_ready(own))
    states = {each.name: each.state for each in triton.get_model_repository_index().models}
    assert (states[own], states[mlp]) == ("UNAVAILABLE", "READY")
    triton.load_model(own, headers=headers)
    until(lambda: triton.is_model_ready(own))
    assert "scope" in refusal("PERMISSION_DENIED", triton.unload_model, own)


def test_trace_and_log_settings_are_kept(triton: InferenceServerClient, operator: dict[str, str], mlp: str) -> None:
    headers = {"authorization": operator["Authorization"]}
    before = triton.get_trace_settings().settings["trace_rate"].value
    changed = triton.update_trace_settings(mlp, {"trace_rate": "7"}, headers=headers)
    assert list(changed.settings["trace_rate"].value) == ["7"]
    back = triton.update_trace_settings(mlp, {"trace_rate": None}, headers=headers)
    assert list(back.settings["trace_rate"].value) == list(before)
    assert (
        triton.update_log_settings({"log_verbose_level": 1}, headers=headers).settings["log_verbose_level"].uint32_param
        == 1
    )
    triton.update_log_settings({"log_verbose_level": 0}, headers=headers)
    assert triton.get_log_settings().settings["log_info"].bool_param


def test_shared_memory_is_refused_readably(triton: InferenceServerClient) -> None:
    assert "shared memory" in refusal("UNIMPLEMENTED", triton.get_system_shared_memory_status)


# --- inference --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("datatype", DATATYPES)
def test_datatype_survives_the_way_there_and_back(
    triton: InferenceServerClient, every_datatype: str, bfloat16: str, datatype: str
) -> None:
    model, names = (bfloat16, WITH_BF16) if datatype == "BF16" else (every_datatype, WITHOUT_BF16)
    array = edges(datatype)
    zeros = {each: np.full((2, 2), b"" if each == "BYTES" else 0, DATATYPES[each][1]) for each in names}
    inputs = []
    for each in names:
        given = InferInput(f"in_{each}", [2, 2], each)
        given.set_data_from_numpy(array if each == datatype else zeros[each])
        inputs.append(given)
    answer = triton.infer(model, inputs).as_numpy(f"out_{datatype}")
    assert answer is not None
    assert answer.tolist() == array.tolist()


def test_outputs_come_as_asked_for(triton: InferenceServerClient, mlp: str) -> None:
    every = triton.infer(mlp, [tensor("x", X)], request_id="mine")
    np.testing.assert_allclose(every.as_numpy("scores"), mlp_scores(X), rtol=1e-4)
    response = every.get_response()
    assert (response.model_name, response.model_version, response.id) == (mlp, "1", "mine")
    assert [each.name for each in response.outputs] == ["scores", "label"]
    some = triton.infer(mlp, [tensor("x", X)], outputs=[InferRequestedOutput("scores", class_count=2)])
    assert [each.name for each in some.get_response().outputs] == ["scores"]
    best = mlp_scores(X).argmax(1)
    assert [int(row[0].decode().split(":")[1]) for row in some.as_numpy("scores")] == best.tolist()


def test_typed_contents_are_read_and_answered_raw(triton: InferenceServerClient, mlp: str) -> None:
    # As Triton's example grpc_explicit_int_content_client.py does it.
    request = service_pb2.ModelInferRequest(model_name=mlp)
    given = request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    given.contents.fp32_contents.extend(X[0].tolist())
    response = triton._client_stub.ModelInfer(request)
    scores = np.frombuffer(response.raw_output_contents[0], np.float32)
    np.testing.assert_allclose(scores, mlp_scores(X[:1])[0], rtol=1e-4)
    request.parameters["binary_data_output"].bool_param = False
    typed = triton._client_stub.ModelInfer(request)
    np.testing.assert_allclose(typed.outputs[0].contents.fp32_contents, mlp_scores(X[:1])[0], rtol=1e-4)
    assert not typed.raw_output_contents
    request.raw_input_contents.append(X[0].tobytes())
    with pytest.raises(grpc.RpcError) as raised:
        triton._client_stub.ModelInfer(request)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    expected = f"contents field must not be specified when using raw_input_contents for 'x' for model '{mlp}'"
    assert expected in str(raised.value.details())


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_requests_may_be_compressed(triton: InferenceServerClient, mlp: str, algorithm: str) -> None:
    answer = triton.infer(mlp, [tensor("x", X)], compression_algorithm=algorithm)
    np.testing.assert_allclose(answer.as_numpy("scores"), mlp_scores(X), rtol=1e-4)


def test_version_can_be_chosen(triton: InferenceServerClient, mlp: str) -> None:
    assert triton.infer(mlp, [tensor("x", X)], "1").get_response().model_version == "1"
    assert "version 9" in refusal("NOT_FOUND", triton.infer, mlp, [tensor("x", X)], "9")


def test_many_requests_can_be_in_flight(triton: InferenceServerClient, mlp: str) -> None:
    done: queue.Queue[tuple[InferResult, InferenceServerException | None]] = queue.Queue()
    for index in range(200):
        triton.async_infer(
            mlp, [tensor("x", X)], lambda result, error: done.put((result, error)), request_id=str(index)
        )
    answers = [done.get(timeout=30) for _ in range(200)]
    assert [error for _, error in answers if error] == []
    assert {result.get_response().id for result, _ in answers} == {str(index) for index in range(200)}


def test_large_tensors_go_through(triton: InferenceServerClient, echo: str) -> None:
    x = np.random.default_rng(1).standard_normal((1 << 20, 8)).astype(np.float32)  # 32 MiB
    answer = triton.infer(echo, [tensor("x", x)]).as_numpy("y")
    assert answer is not None
    assert np.array_equal(answer, x)


def test_request_that_takes_too_long_is_given_up(triton: InferenceServerClient, slow: str) -> None:
    rounds = [tensor("rounds", ROUNDS_FOR_HALF_A_SECOND)]
    refusal("DEADLINE_EXCEEDED", triton.infer, slow, rounds, client_timeout=0.05)
    told = refusal("DEADLINE_EXCEEDED", triton.infer, slow, rounds, headers={"x-request-timeout-ms": "20"})
    assert "20 ms" in told
    assert triton.infer(slow, [tensor("rounds", np.array([1]))]).as_numpy("y") == pytest.approx(1)


@pytest.mark.parametrize(
    ("array", "name", "told"),
    [
        (X, "y", "input 'y' is unknown"),
        (X[:, :3], "x", "got shape [5, 3], expected [-1, 4]"),
        (X.astype(np.float64), "x", "got datatype FP64, expected FP32"),
    ],
)
def test_wrong_input_is_named(triton: InferenceServerClient, mlp: str, array: Array, name: str, told: str) -> None:
    assert told in refusal("INVALID_ARGUMENT", triton.infer, mlp, [tensor(name, array)])


def test_unknown_models_and_failing_ones_say_so(triton: InferenceServerClient, fragile: str) -> None:
    assert "'nothing'" in refusal("NOT_FOUND", triton.infer, "nothing", [tensor("x", X)])
    told = refusal(
        "INVALID_ARGUMENT",
        triton.infer,
        fragile,
        [tensor("x", np.ones(6, np.float32)), tensor("shape", np.array([4, 4]))],
    )
    assert "reshape" in told
    assert "Traceback" not in told


def test_tenant_comes_from_the_key(
    platform: Platform, triton: InferenceServerClient, mlp: str, make_key: Callable[..., str]
) -> None:
    foreign = {"authorization": f"Bearer {make_key('infer', tenant='grpc-guests')}"}
    assert "not known" in refusal("NOT_FOUND", triton.infer, mlp, [tensor("x", X)], headers=foreign)
    wrong = {"authorization": "Bearer lp_" + "x" * 43}
    assert "unknown API key" in refusal("UNAUTHENTICATED", triton.infer, mlp, [tensor("x", X)], headers=wrong)


# --- streams ----------------------------------------------------------------------------------------------------------


def test_answers_of_a_stream_come_in_order_and_an_error_ends_one_of_them_only(
    triton: InferenceServerClient, mlp: str
) -> None:
    done: queue.Queue[tuple[InferResult | None, InferenceServerException | None]] = queue.Queue()
    triton.start_stream(lambda result, error: done.put((result, error)))
    for index in range(300):
        rows = X[:, :3] if index == 150 else X
        triton.async_stream_infer(mlp, [tensor("x", rows)], request_id=str(index))
    answers = [done.get(timeout=30) for _ in range(300)]
    triton.stop_stream()
    assert [index for index, (_, error) in enumerate(answers) if error] == [150]
    assert "expected [-1, 4]" in str(answers[150][1])
    ids = [result.get_response().id for result, _ in answers if result is not None]
    assert ids == [str(index) for index in range(300) if index != 150]


def test_final_answer_of_a_stream_is_marked_when_asked_for(triton: InferenceServerClient, mlp: str) -> None:
    done: queue.Queue[tuple[InferResult, InferenceServerException | None]] = queue.Queue()
    triton.start_stream(lambda result, error: done.put((result, error)))
    triton.async_stream_infer(mlp, [tensor("x", X)], enable_empty_final_response=True)
    result, error = done.get(timeout=30)
    triton.stop_stream()
    assert error is None
    assert result.get_response().parameters["triton_final_response"].bool_param


async def test_async_client_infers_and_streams(platform: Platform, mlp: str) -> None:
    async with tritonclient.grpc.aio.InferenceServerClient(platform.address) as client:
        answers = await asyncio.gather(*(client.infer(mlp, [tensor("x", X)]) for _ in range(50)))
        for answer in answers:
            np.testing.assert_allclose(answer.as_numpy("scores"), mlp_scores(X), rtol=1e-4)

        async def requests() -> Any:
            for index in range(20):
                yield {"model_name": mlp, "inputs": [tensor("x", X)], "request_id": str(index)}

        streamed = [answer async for answer in client.stream_infer(requests())]
        assert [result.get_response().id for result, error in streamed if error is None] == list(map(str, range(20)))


# --- what load balancers and people's tools ask -----------------------------------------------------------------------


def test_health_and_reflection_answer_any_grpc_tool(platform: Platform) -> None:
    with grpc.insecure_channel(platform.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)  # its stubs leave out the methods
        check = partial(health.Check, timeout=10)
        serving = health_pb2.HealthCheckResponse.SERVING
        assert check(health_pb2.HealthCheckRequest()).status == serving
        assert check(health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService")).status == serving
        with pytest.raises(grpc.RpcError) as raised:
            check(health_pb2.HealthCheckRequest(service="nothing"))
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=10)
        assert next(iter(watch)).status == serving
        watch.cancel()
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "inference.GRPCInferenceService" in database.get_services()
        file = database.FindFileContainingSymbol("inference.GRPCInferenceService")
        assert {each.name for each in file.service[0].method} >= {"ModelInfer", "ModelStreamInfer"}
