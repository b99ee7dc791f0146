"""One tensor of the Open Inference Protocol: from and to its JSON data and its binary form, checked against a spec.

Shapes are checked with Python integers before anything is allocated, so no header can ask for more memory than its body
holds. Integers are exact and in range or refused; nothing wraps or is rounded silently.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from operator import countOf
from struct import Struct
from typing import Any

import numpy as np
import orjson

from lepton_common.errors import Invalid, TooLarge
from lepton_common.signature import DTYPES, TensorSpec

Array = np.ndarray[Any, np.dtype[Any]]

MAX_ELEMENTS = 1 << 28
_LENGTH_BYTES = 4  # of the little-endian length in front of each BYTES element
# How `struct` packs Python floats: checked for overflow, in half the time that numpy takes.
_PACKED = {"FP16": "e", "FP32": "f", "FP64": "d"}


def checked_shape(spec: TensorSpec, shape: object) -> tuple[int, ...]:
    """The shape as a tuple that fits the spec. Raises Invalid naming the input, TooLarge beyond MAX_ELEMENTS."""
    if type(shape) is not list:
        raise Invalid(f"input {spec.name!r}: shape must be a list of non-negative integers")
    elements = 1
    for dim in shape:
        if type(dim) is not int or dim < 0:
            raise Invalid(f"input {spec.name!r}: shape must be a list of non-negative integers")
        elements *= dim or 1  # An empty dimension counts as one: numpy refuses (0, 2**62) too.
    checked = tuple(shape)
    if not spec.fits(checked):
        raise Invalid(f"input {spec.name!r}: got shape {_shown(checked)}, expected {list(spec.shape)}")
    if elements > MAX_ELEMENTS:
        raise TooLarge(f"input {spec.name!r}: shape {_shown(checked)} has more than {MAX_ELEMENTS} elements")
    return checked


def from_json(spec: TensorSpec, shape: tuple[int, ...], data: object) -> Array:
    """The tensor of JSON `data`, flat or nested in row-major order. Raises Invalid naming the input."""
    flat = _flatten(spec.name, data)
    if len(flat) != math.prod(shape):
        raise Invalid(f"input {spec.name!r}: shape {_shown(shape)} needs {math.prod(shape)} elements, got {len(flat)}")
    try:
        if spec.datatype in _PACKED and countOf(map(type, flat), float) == len(flat):
            array = np.frombuffer(_packing(_PACKED[spec.datatype], len(flat)).pack(*flat), DTYPES[spec.datatype])
        else:
            array = _CONVERT.get(spec.datatype, _integers)(spec, flat, set(map(type, flat)))
    except (OverflowError, FloatingPointError) as error:
        raise Invalid(f"input {spec.name!r}: a value does not fit {spec.datatype}") from error
    return array.reshape(shape)


def from_binary(spec: TensorSpec, shape: tuple[int, ...], data: memoryview) -> Array:
    """The tensor of its binary form (little-endian, no padding), a view where alignment allows. Raises Invalid."""
    count = math.prod(shape)
    if spec.datatype == "BYTES":
        return _elements(spec, count, data).reshape(shape)
    dtype = DTYPES[spec.datatype]
    if len(data) != count * dtype.itemsize:
        raise Invalid(
            f"input {spec.name!r}: unexpected size {len(data)} bytes, "
            f"expected {count * dtype.itemsize} for {spec.datatype} of shape {_shown(shape)}"
        )
    if spec.datatype == "BOOL" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise Invalid(f"input {spec.name!r}: a BOOL byte must be 0 or 1")
    array = np.frombuffer(data, dtype).reshape(shape)
    return array if array.flags.aligned else array.copy()


def to_json(name: str, datatype: str, array: Array) -> bytes:
    """The flat JSON list of the array's elements; NaN and infinities are null. Raises Invalid for BYTES not UTF-8."""
    if datatype == "BYTES":
        try:
            return orjson.dumps([item if type(item) is str else item.decode() for item in array.flat])
        except UnicodeDecodeError as error:
            raise Invalid(f"output {name!r} is not UTF-8 text: ask for it with binary_data") from error
    if datatype == "BF16":
        array = array.astype(np.float32)
    return orjson.dumps(array.ravel(), option=orjson.OPT_SERIALIZE_NUMPY)


def to_binary(datatype: str, array: Array) -> bytes | memoryview:
    """The binary form of the array: a view of its memory, except for BYTES."""
    if datatype != "BYTES":
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    parts: list[bytes] = []
    for item in array.flat:
        element = item.encode() if type(item) is str else item
        parts += (len(element).to_bytes(_LENGTH_BYTES, "little"), element)
    return b"".join(parts)


def classify(name: str, array: Array, batched: bool, top: int, labels: Sequence[str]) -> Array:
    """The `top` greatest of each row as BYTES `value:index[:label]`, as Triton writes them; ties in index order.

    A batched output of shape [n, ...] gives [n, top], any other [top]; `top` is clamped to the classes there are.
    Raises Invalid for an output that has no order.
    """
    if array.dtype == object:
        raise Invalid(f"output {name!r}: classification needs numbers, not BYTES")
    rows = array.reshape(len(array), math.prod(array.shape[1:])) if batched else array.reshape(1, -1)
    # Negated as floats only to sort: NaN goes last, and a stable sort keeps ties in index order.
    order = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :top]
    as_text = "{:f}".format if array.dtype.kind in "fV" else "{:d}".format
    number = float if array.dtype.kind in "fV" else int
    classes = np.empty(order.shape, object)
    for row, indices in enumerate(order.tolist()):
        for rank, index in enumerate(indices):
            label = f":{labels[index]}" if index < len(labels) else ""
            classes[row, rank] = f"{as_text(number(rows[row, index]))}:{index}{label}".encode()
    return classes if batched else classes[0]


@lru_cache(maxsize=256)
def _packing(code: str, count: int) -> Struct:
    return Struct(f"<{count}{code}")


def _shown(shape: tuple[int, ...]) -> str:
    return str(list(shape))[:200]


def _flatten(name: str, data: object) -> list[Any]:
    """One list of the elements of evenly nested lists."""
    if type(data) is not list:
        raise Invalid(f"input {name!r}: data must be a list")
    while data and type(data[0]) is list:
        if set(map(type, data)) != {list} or len(set(map(len, data))) != 1:
            raise Invalid(f"input {name!r}: data is nested unevenly")
        data = list(chain.from_iterable(data))
    return data


def _floats(spec: TensorSpec, flat: list[Any], kinds: set[type]) -> Array:
    # null is NaN, as in our own answers.
    if not kinds <= {float, int, type(None)}:
        raise _unexpected(spec, "numbers", kinds)
    with np.errstate(over="raise"):
        if spec.datatype == "BF16":  # ml_dtypes reports no overflow from Python floats
            return np.array(flat, np.float64).astype(DTYPES["BF16"])
        return np.array(flat, DTYPES[spec.datatype])


def _integers(spec: TensorSpec, flat: list[Any], kinds: set[type]) -> Array:
    if float in kinds:
        fractional = next((item for item in flat if type(item) is float and not item.is_integer()), None)
        if fractional is not None:
            raise Invalid(f"input {spec.name!r}: {fractional} is not an integer, {spec.datatype} expected")
        flat = [_exact(item) if type(item) is float else item for item in flat]
    if not kinds <= {int, float}:
        raise _unexpected(spec, "integers", kinds)
    return np.array(flat, DTYPES[spec.datatype])


def _exact(number: float) -> int:
    """The integer. Raises OverflowError for one that may have been rounded, as the parser does beyond 64 bits."""
    if abs(number) >= 2**53:
        raise OverflowError
    return int(number)


def _bools(spec: TensorSpec, flat: list[Any], kinds: set[type]) -> Array:
    if not kinds <= {bool, int} or not set(flat) <= {0, 1}:
        raise _unexpected(spec, "true, false, 0 or 1", kinds)
    return np.array(flat, np.bool_)


def _strings(spec: TensorSpec, flat: list[Any], kinds: set[type]) -> Array:
    if not kinds <= {str}:
        raise _unexpected(spec, "strings", kinds)
    array = np.empty(len(flat), object)
    array[:] = [item.encode() for item in flat]
    return array


_CONVERT = {"FP16": _floats, "FP32": _floats, "FP64": _floats, "BF16": _floats, "BOOL": _bools, "BYTES": _strings}


def _unexpected(spec: TensorSpec, expected: str, kinds: set[type]) -> Invalid:
    words = {type(None): "null", str: "strings", bool: "booleans", dict: "objects", list: "lists"}
    got = " and ".join(sorted(words.get(kind, "numbers") for kind in kinds))
    return Invalid(f"input {spec.name!r}: {spec.datatype} takes {expected}, got {got}")


def _elements(spec: TensorSpec, count: int, data: memoryview) -> Array:
    """BYTES elements, each behind its length."""
    if count * _LENGTH_BYTES > len(data):
        raise Invalid(f"input {spec.name!r}: unexpected size {len(data)} bytes, too few for {count} BYTES elements")
    array = np.empty(count, object)
    offset = 0
    for index in range(count):
        start = offset + _LENGTH_BYTES
        offset = start + int.from_bytes(data[offset:start], "little")
        if start > len(data) or offset > len(data):
            raise Invalid(f"input {spec.name!r}: unexpected end of data in BYTES element {index}")
        array[index] = bytes(data[start:offset])
    if offset != len(data):
        raise Invalid(f"input {spec.name!r}: {len(data) - offset} bytes after the last of {count} BYTES elements")
    return array
