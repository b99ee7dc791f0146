"""NVIDIA's own HTTP client, unmodified, through the front door: inference in every form it knows."""

import json
from typing import Any

import numpy as np
import pytest
from tritonclient.http import InferenceServerClient, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from .load import Load
from .local_platform import Platform
from .onnx_models import CLASSES, DATATYPES, WITH_BF16, WITHOUT_BF16, mlp_scores
from .triton import edges, every_input, refusal, tensor

X = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
ROUNDS_FOR_HALF_A_SECOND = np.array([50_000])


@pytest.mark.parametrize("binary_out", [True, False], ids=["binary-out", "json-out"])
@pytest.mark.parametrize("binary_in", [True, False], ids=["binary-in", "json-in"])
@pytest.mark.parametrize("datatype", DATATYPES)
def test_datatype_survives_the_way_there_and_back(
    triton: InferenceServerClient,
    every_datatype: str,
    bfloat16: str,
    datatype: str,
    binary_in: bool,
    binary_out: bool,
) -> None:
    model, among = (bfloat16, WITH_BF16) if datatype == "BF16" else (every_datatype, WITHOUT_BF16)
    given = edges(datatype)
    wanted = InferRequestedOutput(f"out_{datatype}", binary_data=binary_out)
    result = triton.infer(model, every_input(among, {datatype: given}, binary=binary_in), outputs=[wanted])
    output = result.get_output(f"out_{datatype}")
    assert (output["datatype"], output["shape"]) == (datatype, [2, 2])
    assert ("data" in output) != binary_out
    answer = result.as_numpy(f"out_{datatype}")
    if datatype == "BYTES" and not binary_out:
        answer = np.array([each.encode() for each in answer.ravel()], object).reshape(answer.shape)
    np.testing.assert_array_equal(answer, given)
    assert answer.dtype == given.dtype


def test_all_outputs_come_in_binary_unless_some_are_asked_for(triton: InferenceServerClient, mlp: str) -> None:
    result = triton.infer(mlp, [tensor("x", X)])
    response = result.get_response()
    assert response["model_name"] == mlp
    assert response["model_version"] == "1"
    assert [each["name"] for each in response["outputs"]] == ["scores", "label"]
    assert all(each["parameters"]["binary_data_size"] > 0 for each in response["outputs"])
    np.testing.assert_allclose(result.as_numpy("scores"), mlp_scores(X), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(result.as_numpy("label"), mlp_scores(X).argmax(axis=1))


def test_binary_and_json_inputs_can_be_mixed(triton: InferenceServerClient, arithmetic: str) -> None:
    a, b = np.array([[1, 2]], np.float32), np.array([[3, 5]], np.float32)
    for a_binary, b_binary in ((True, False), (False, True)):
        result = triton.infer(arithmetic, [tensor("b", b, binary=b_binary), tensor("a", a, binary=a_binary)])
        np.testing.assert_array_equal(result.as_numpy("difference"), a - b)


def test_requested_outputs_come_in_their_order_each_in_its_form(triton: InferenceServerClient, arithmetic: str) -> None:
    a, b = np.array([[1, 2]], np.float32), np.array([[3, 5]], np.float32)
    wanted = [
        InferRequestedOutput("product", binary_data=False),
        InferRequestedOutput("sum", binary_data=True),
        InferRequestedOutput("difference", binary_data=False),
    ]
    result = triton.infer(arithmetic, [tensor("a", a), tensor("b", b)], outputs=wanted)
    outputs = result.get_response()["outputs"]
    assert [(each["name"], "data" in each) for each in outputs] == [
        ("product", True),
        ("sum", False),
        ("difference", True),
    ]
    for name, expected in (("product", a * b), ("sum", a + b), ("difference", a - b)):
        np.testing.assert_array_equal(result.as_numpy(name), expected)
    only = triton.infer(arithmetic, [tensor("a", a), tensor("b", b)], outputs=wanted[:1])
    assert [each["name"] for each in only.get_response()["outputs"]] == ["product"]
    assert only.as_numpy("sum") is None


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_classification_names_the_best_classes(triton: InferenceServerClient, mlp: str, binary: bool) -> None:
    wanted = InferRequestedOutput("scores", binary_data=binary, class_count=2)
    result = triton.infer(mlp, [tensor("x", X)], outputs=[wanted])
    assert result.get_output("scores")["datatype"] == "BYTES"
    answer = result.as_numpy("scores")
    assert answer.shape == (len(X), 2)
    scores = mlp_scores(X)
    for row, (best, second) in zip(scores, answer, strict=True):
        order = np.argsort(-row)
        for rank, each in enumerate((best, second)):
            value, index, label = (each.decode() if binary else each).split(":")
            assert int(index) == order[rank]
            assert label == CLASSES[order[rank]]
            assert float(value) == pytest.approx(row[order[rank]], rel=1e-3, abs=1e-5)


def test_more_classes_than_there_are_gives_all(triton: InferenceServerClient, mlp: str) -> None:
    wanted = InferRequestedOutput("scores", class_count=99)
    assert triton.infer(mlp, [tensor("x", X)], outputs=[wanted]).as_numpy("scores").shape == (len(X), len(CLASSES))


@pytest.mark.parametrize("answered", ["gzip", "deflate", None])
@pytest.mark.parametrize("asked", ["gzip", "deflate", None])
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_bodies_may_be_compressed_both_ways(
    triton: InferenceServerClient, mlp: str, asked: str | None, answered: str | None, binary: bool
) -> None:
    result = triton.infer(
        mlp,
        [tensor("x", X, binary=binary)],
        outputs=[InferRequestedOutput("scores", binary_data=binary)],
        request_compression_algorithm=asked,
        response_compression_algorithm=answered,
    )
    np.testing.assert_allclose(result.as_numpy("scores"), mlp_scores(X), rtol=1e-4, atol=1e-5)


def test_request_id_comes_back_and_is_made_up_when_there_is_none(triton: InferenceServerClient, mlp: str) -> None:
    given = triton.infer(mlp, [tensor("x", X)], request_id='order 66 "ü"').get_response()["id"]
    assert given == 'order 66 "ü"'
    made = {triton.infer(mlp, [tensor("x", X)]).get_response()["id"] for _ in range(3)}
    assert len(made) == 3
    assert all(made)


def test_version_can_be_chosen(triton: InferenceServerClient, mlp: str) -> None:
    assert triton.infer(mlp, [tensor("x", X)], model_version="1").get_response()["model_version"] == "1"
    assert "9" in refusal(404, triton.infer, mlp, [tensor("x", X)], model_version="9")
    assert "one" in refusal(404, triton.infer, mlp, [tensor("x", X)], model_version="one")


def test_many_requests_can_be_in_flight(platform: Platform, mlp: str) -> None:
    with InferenceServerClient(platform.address, concurrency=8) as triton:
        inputs = [X + n for n in range(40)]
        pending = [triton.async_infer(mlp, [tensor("x", x)], request_id=str(n)) for n, x in enumerate(inputs)]
        for n, (x, each) in enumerate(zip(inputs, pending, strict=True)):
            result = each.get_result(timeout=30)
            assert result.get_response()["id"] == str(n)
            np.testing.assert_allclose(result.as_numpy("scores"), mlp_scores(x), rtol=1e-4, atol=1e-4)
        with pytest.raises(InferenceServerException, match="nothing"):
            triton.async_infer("nothing", [tensor("x", X)]).get_result(timeout=30)


def test_rows_that_depend_on_each_other_are_never_mixed_with_those_of_others(
    platform: Platform, neighbourly: str
) -> None:
    with InferenceServerClient(platform.address, concurrency=8) as triton:
        x = np.array([[1, 2], [1, 2]], np.float32)
        pending = [triton.async_infer(neighbourly, [tensor("x", x + n)]) for n in range(40)]
        for each in pending:
            np.testing.assert_allclose(each.get_result(timeout=30).as_numpy("y"), np.full((2, 2), 0.5))


def test_parameters_of_a_request_are_taken(triton: InferenceServerClient, mlp: str) -> None:
    result = triton.infer(
        mlp,
        [tensor("x", X)],
        parameters={"colour": "red", "weight": 1.5, "count": 3, "fast": True},
        priority=1,
        sequence_id=7,
        sequence_start=True,
        sequence_end=True,
        timeout=10_000_000,
    )
    np.testing.assert_allclose(result.as_numpy("scores"), mlp_scores(X), rtol=1e-4, atol=1e-5)


def test_request_that_takes_too_long_is_given_up(triton: InferenceServerClient, slow: str) -> None:
    rounds = [tensor("rounds", ROUNDS_FOR_HALF_A_SECOND)]
    assert "20 ms" in refusal(504, triton.infer, slow, rounds, headers={"x-request-timeout-ms": "20"})
    assert triton.infer(slow, rounds, timeout=60_000_000).as_numpy("y") == pytest.approx(1)


def test_request_that_waits_longer_than_its_timeout_is_not_run(
    platform: Platform, triton: InferenceServerClient, slow: str
) -> None:
    body = json.dumps({"inputs": [{"name": "rounds", "shape": [1], "datatype": "INT64", "data": [20_000]}]}).encode()
    # Two workers run one each, so that others always wait.
    with Load(platform.port, f"/v2/models/{slow}/infer", body, callers=6) as load:
        load.wait_for(6)
        for _ in range(4):
            refusal(504, triton.infer, slow, [tensor("rounds", np.array([1]))], timeout=20_000)
    assert not load.failures, load.report()


def test_no_rows_are_an_answer_too(triton: InferenceServerClient, echo: str, text: str) -> None:
    result = triton.infer(echo, [tensor("x", np.zeros((0, 3), np.float32))])
    assert result.as_numpy("y").shape == (0, 3)
    assert triton.infer(text, [tensor("x", np.zeros((0,), object))]).as_numpy("y").shape == (0,)


def test_not_a_number_goes_through_in_both_forms(triton: InferenceServerClient, echo: str) -> None:
    x = np.array([[np.nan, 1, np.inf, -np.inf]], np.float32)
    for binary in (True, False):
        result = triton.infer(echo, [tensor("x", x, binary=binary)], outputs=[InferRequestedOutput("y")])
        np.testing.assert_array_equal(result.as_numpy("y"), x)
    # JSON has no infinities: they come as null, which tritonclient reads as NaN.
    as_json = triton.infer(echo, [tensor("x", x)], outputs=[InferRequestedOutput("y", binary_data=False)])
    assert as_json.get_output("y")["data"] == [None, 1.0, None, None]


def test_large_tensors_go_through(triton: InferenceServerClient, echo: str) -> None:
    x = np.random.default_rng(1).standard_normal((2000, 1000)).astype(np.float32)
    np.testing.assert_array_equal(triton.infer(echo, [tensor("x", x)]).as_numpy("y"), x)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize(
    ("inputs", "outputs", "named"),
    [
        ({"x": np.zeros((1, 5), np.float32)}, None, "'x'"),
        ({"x": np.zeros((4,), np.float32)}, None, "'x'"),
        ({"x": np.zeros((1, 4, 1), np.float32)}, None, "'x'"),
        ({"x": np.zeros((1, 4), np.float64)}, None, "'x'"),
        ({"x": np.array([["1", "2", "3", "4"]], object)}, None, "'x'"),
        ({"z": np.zeros((1, 4), np.float32)}, None, "'z'"),
        ({"x": X, "z": X}, None, "'z'"),
        ({}, None, "'x'"),
        ({"x": X}, ["scores", "nothing"], "'nothing'"),
        ({"x": X}, ["scores", "scores"], "'scores'"),
    ],
    ids=["size", "rank-1", "rank-3", "fp64", "bytes", "name", "extra", "missing", "output", "output-twice"],
)
def test_wrong_input_is_named(
    triton: InferenceServerClient,
    mlp: str,
    inputs: dict[str, Any],
    outputs: list[str] | None,
    named: str,
    binary: bool,
) -> None:
    given = [tensor(name, array, binary=binary) for name, array in inputs.items()]
    wanted = [InferRequestedOutput(each, binary_data=binary) for each in outputs or []]
    assert named in refusal(400, triton.infer, mlp, given, outputs=wanted)
    assert triton.is_model_ready(mlp)


def test_text_that_is_not_utf8_is_refused_by_name(triton: InferenceServerClient, text: str) -> None:
    assert "'x'" in refusal(400, triton.infer, text, [tensor("x", np.array([b"\xff\xfe"], object))])


def test_unknown_model_is_named(triton: InferenceServerClient) -> None:
    for call in (
        triton.get_model_metadata,
        triton.get_model_config,
        triton.get_inference_statistics,
        lambda model: triton.infer(model, [tensor("x", X)]),
    ):
        assert "nothing" in refusal(404, call, "nothing")


def test_model_that_fails_says_so_without_paths_or_tracebacks(triton: InferenceServerClient, fragile: str) -> None:
    x = np.ones(6, np.float32)
    result = triton.infer(fragile, [tensor("x", x), tensor("shape", np.array([2, 3]))])
    assert result.as_numpy("y").shape == (2, 3)
    message = refusal(400, triton.infer, fragile, [tensor("x", x), tensor("shape", np.array([4, 4]))])
    assert "these values of 'x', 'shape'" in message
    assert "reshape" in message
    assert "/" not in message.replace("{", "")
    assert "Traceback" not in message
    assert triton.infer(fragile, [tensor("x", x), tensor("shape", np.array([6, 1]))]).as_numpy("y").shape == (6, 1)


def test_client_that_gives_up_harms_nobody(platform: Platform, triton: InferenceServerClient, slow: str) -> None:
    with (
        InferenceServerClient(platform.address, network_timeout=0.05) as impatient,
        pytest.raises(OSError, match="timed out"),
    ):
        impatient.infer(slow, [tensor("rounds", ROUNDS_FOR_HALF_A_SECOND)])
    assert triton.infer(slow, [tensor("rounds", np.array([1]))]).as_numpy("y") == pytest.approx(1)
