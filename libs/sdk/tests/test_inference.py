"""Arrays and what the platform makes of them, by either client."""

from collections.abc import Callable, Coroutine
from typing import Any, assert_type

import numpy as np
import pytest
from lepton import AsyncClient, Client
from lepton.errors import (
    Invalid,
)
from lepton.models import Model
from lepton_common.signature import Signature

from libs.sdk.tests.conftest import SPECS, Platform
from libs.sdk.tests.traffic import Answer

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
