"""A file as a model's inputs: .npy for a model of one input, .npz or JSON by name."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from lepton.errors import Invalid
from lepton.models import TensorSpec
from lepton.tensors import Array, dtype_of, from_json

_JSON_FORMS = (
    'Write {"NAME": [[…], …]}, a bare [[…], …] for a model of one input, or an Open Inference Protocol request.'
)


def read_inputs(path: Path, specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """The arrays in the file, in the datatypes that the model wants; `-` reads JSON from standard input.

    Raises Invalid, naming the input, when the file does not fit the model's inputs.
    """
    kinds = {spec.name: spec.datatype for spec in specs}
    if path.suffix in {".npy", ".npz"}:
        return {name: _cast(name, kinds, array) for name, array in _load(path, kinds).items()}
    try:
        content = json.loads(sys.stdin.read() if str(path) == "-" else path.read_text())
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{path} is not JSON: {error}.", hint=_JSON_FORMS) from error
    return _from_content(content, kinds)


def _load(path: Path, kinds: dict[str, str]) -> dict[str, Array]:
    """The arrays of the file by name; the only one of a .npy file is the model's only input."""
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            # A .npz file's arrays are read, and found damaged, only by looking at them.
            return {_only(kinds): loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (ValueError, EOFError, BadZipFile) as error:
        raise Invalid(f"{path} is not a {path.suffix} file of plain arrays.") from error


def _from_content(content: Any, kinds: dict[str, str]) -> dict[str, Array]:
    match content:
        case {"inputs": [*tensors]} if "inputs" not in kinds:
            return {name: _read(name, kinds, data, shape) for name, data, shape in map(_tensor, tensors)}
        case dict():
            return {name: _read(name, kinds, data) for name, data in content.items()}
        case list():
            return {_only(kinds): _read(_only(kinds), kinds, content)}
    raise Invalid("There are no inputs in it.", hint=_JSON_FORMS)


def _tensor(tensor: Any) -> tuple[str, Any, Sequence[int] | None]:
    match tensor:
        case {"name": str(name), "data": data}:
            return name, data, tensor.get("shape")
    raise Invalid("A tensor in it has no name or no data.", hint=_JSON_FORMS)


def _read(name: str, kinds: dict[str, str], data: Any, shape: Sequence[int] | None = None) -> Array:
    datatype = _datatype(name, kinds)
    try:
        return from_json(datatype, data, shape)
    except (TypeError, ValueError, OverflowError) as error:
        raise Invalid(f"input {name!r}: not {datatype} data of one shape ({error}).") from error


def _cast(name: str, kinds: dict[str, str], array: Array) -> Array:
    datatype = _datatype(name, kinds)
    try:
        return array if datatype == "BYTES" else array.astype(dtype_of(datatype), copy=False)
    except (TypeError, ValueError) as error:
        raise Invalid(f"input {name!r}: {array.dtype} is not {datatype} data ({error}).") from error


def _datatype(name: str, kinds: dict[str, str]) -> str:
    if name not in kinds:
        raise Invalid(f"The model has no input {name!r}.", hint=f"It has {', '.join(kinds)}.")
    return kinds[name]


def _only(kinds: dict[str, str]) -> str:
    if len(kinds) != 1:
        raise Invalid(
            f"The model has {len(kinds)} inputs: {', '.join(kinds)}.", hint="Give them by name, in .npz or JSON."
        )
    return next(iter(kinds))
