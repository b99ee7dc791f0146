"""tritonclient's inputs from numpy arrays, values at the edges of each datatype, and the errors it raises."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from tritonclient.http import InferInput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from .onnx_models import DATATYPES, Array


def tensor(name: str, array: Array, *, binary: bool = True) -> InferInput:
    """The array as an input of that name."""
    given = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    given.set_data_from_numpy(array, binary_data=binary)
    return given


def edges(datatype: str) -> Array:
    """[2, 2] of the datatype: the smallest and greatest values, and what tends to be mangled on the way."""
    dtype: Any = np.dtype(DATATYPES[datatype][1])
    match dtype.kind:
        case "b":
            values: list[Any] = [True, False, False, True]
        case "O":
            values = [b"", b"plain", "Grüße, 世界".encode(), b'"quoted" \\ \x00 \n']
        case "i" | "u":
            values = [np.iinfo(dtype).min, np.iinfo(dtype).max, 0, 1]
        case _:
            values = [1 / 3, -0.0, 1.5e-5, -65504.0]
    return np.array(values, dtype).reshape(2, 2)


def every_input(datatypes: Iterable[str], given: dict[str, Array], *, binary: bool) -> list[InferInput]:
    """The inputs of `identities(datatypes)`: what is given, and zeros of as many rows for the others."""
    rows = len(next(iter(given.values())))
    arrays = {each: given[each] if each in given else _zeros(each, rows) for each in datatypes}
    # tritonclient itself refuses to send BF16 as JSON.
    return [tensor(f"in_{each}", array, binary=binary or each == "BF16") for each, array in arrays.items()]


def _zeros(datatype: str, rows: int) -> Array:
    return np.full((rows, 2), b"" if datatype == "BYTES" else 0, DATATYPES[datatype][1])


def refusal(status: int, call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The message with which the call failed. tritonclient raises TypeError for one that is not a string."""
    with pytest.raises(InferenceServerException) as raised:
        call(*arguments, **options)
    assert raised.value.status() == str(status), str(raised.value)
    message = str(raised.value.message())
    assert message in str(raised.value)
    assert message
    assert "exception occurred in the client" not in message
    return message
