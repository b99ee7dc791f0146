"""NVIDIA's own asyncio client, unmodified, through the front door, where it differs on the wire from the blocking one.

It sends `Content-Type: application/octet-stream` with every body, JSON or not, and aiohttp's Accept-Encoding with every
request.
"""

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import numpy as np
import pytest
from tritonclient.http import InferRequestedOutput
from tritonclient.http.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from .local_platform import Platform
from .onnx_models import DATATYPES, WITH_BF16, WITHOUT_BF16, mlp_scores
from .onnx_models import mlp as mlp_model
from .triton import edges, every_input, tensor

X = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)


@pytest.fixture
async def triton(platform: Platform) -> AsyncIterator[InferenceServerClient]:
    async with InferenceServerClient(platform.address) as client:
        yield client


async def test_server_and_model_are_ready(triton: InferenceServerClient, mlp: str) -> None:
    assert await triton.is_server_live()
    assert await triton.is_server_ready()
    assert await triton.is_model_ready(mlp)
    assert await triton.is_model_ready(mlp, "1")
    assert not await triton.is_model_ready("nothing")


async def test_server_and_model_describe_themselves(triton: InferenceServerClient, mlp: str) -> None:
    assert (await triton.get_server_metadata())["name"] == "lepton"
    assert (await triton.get_model_metadata(mlp))["inputs"][0]["name"] == "x"
    assert (await triton.get_model_config(mlp))["name"] == mlp
    assert mlp in {each["name"] for each in await triton.get_model_repository_index()}


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("datatype", DATATYPES)
async def test_datatype_survives_the_way_there_and_back(
    triton: InferenceServerClient, every_datatype: str, bfloat16: str, datatype: str, binary: bool
) -> None:
    model, among = (bfloat16, WITH_BF16) if datatype == "BF16" else (every_datatype, WITHOUT_BF16)
    given = edges(datatype)
    result = await triton.infer(
        model,
        every_input(among, {datatype: given}, binary=binary),
        outputs=[InferRequestedOutput(f"out_{datatype}", binary_data=binary)],
    )
    answer = result.as_numpy(f"out_{datatype}")
    if datatype == "BYTES" and not binary:
        answer = np.array([each.encode() for each in answer.ravel()], object).reshape(answer.shape)
    np.testing.assert_array_equal(answer, given)


@pytest.mark.parametrize("answered", ["gzip", "deflate", None])
@pytest.mark.parametrize("asked", ["gzip", "deflate", None])
async def test_bodies_may_be_compressed_both_ways(
    triton: InferenceServerClient, mlp: str, asked: str | None, answered: str | None
) -> None:
    result = await triton.infer(
        mlp, [tensor("x", X)], request_compression_algorithm=asked, response_compression_algorithm=answered
    )
    np.testing.assert_allclose(result.as_numpy("scores"), mlp_scores(X), rtol=1e-4, atol=1e-5)


async def test_answer_is_compressed_only_for_who_asks_for_exactly_that(platform: Platform, mlp: str) -> None:
    body = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
    async with aiohttp.ClientSession(platform.url, auto_decompress=False) as http:
        for accepted, encoding in (
            ("gzip, deflate, br", None),
            ("br", None),
            ("identity", None),
            ("gzip", "gzip"),
            ("deflate", "deflate"),
        ):
            async with http.post(
                f"/v2/models/{mlp}/infer", json=body, headers={"Accept-Encoding": accepted}
            ) as response:
                assert response.status == 200
                assert response.headers.get("Content-Encoding") == encoding


async def test_many_callers_at_once_get_each_their_own_answer(triton: InferenceServerClient, mlp: str) -> None:
    inputs = [X + n for n in range(64)]
    results = await asyncio.gather(*(triton.infer(mlp, [tensor("x", x)]) for x in inputs))
    for x, result in zip(inputs, results, strict=True):
        np.testing.assert_allclose(result.as_numpy("scores"), mlp_scores(x), rtol=1e-4, atol=1e-4)


async def test_model_can_be_unloaded_and_loaded(
    triton: InferenceServerClient, platform: Platform, operator: dict[str, str], name: str
) -> None:
    await asyncio.to_thread(platform.serve, name, mlp_model(4))
    await triton.unload_model(name, headers=operator)
    await triton.load_model(name, headers=operator)
    assert await triton.is_model_ready(name)
    result = await triton.infer(name, [tensor("x", X)])
    np.testing.assert_allclose(result.as_numpy("scores"), mlp_scores(X, 4), rtol=1e-4, atol=1e-5)


async def test_settings_and_statistics_can_be_read_and_changed(
    triton: InferenceServerClient, mlp: str, operator: dict[str, str]
) -> None:
    await triton.infer(mlp, [tensor("x", X)])
    [stats] = (await triton.get_inference_statistics(mlp))["model_stats"]
    assert stats["inference_stats"]["success"]["count"] >= 1
    before = await triton.get_trace_settings()
    assert (await triton.update_trace_settings(settings={"trace_rate": "9"}, headers=operator))["trace_rate"] == "9"
    assert await triton.update_trace_settings(settings={"trace_rate": None}, headers=operator) == before
    log = await triton.get_log_settings()
    assert await triton.update_log_settings({"log_info": log["log_info"]}, headers=operator) == log


async def test_errors_are_readable(triton: InferenceServerClient, mlp: str) -> None:
    with pytest.raises(InferenceServerException, match="'x'") as wrong:
        await triton.infer(mlp, [tensor("x", np.zeros((1, 5), np.float32))])
    assert wrong.value.status() == "400"
    with pytest.raises(InferenceServerException, match="nothing") as unknown:
        await triton.infer("nothing", [tensor("x", X)])
    assert unknown.value.status() == "404"
    with pytest.raises(InferenceServerException, match="API key") as stranger:
        await triton.infer(mlp, [tensor("x", X)], headers={"Authorization": "Bearer nobody"})
    assert stranger.value.status() == "401"
