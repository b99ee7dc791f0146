"""Columns of Arrow as numpy arrays, and back. No files."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lepton.errors import Invalid
from lepton.models import TensorSpec
from lepton.tensors import Array, dtype_of

_TYPES = {
    "BOOL": pa.bool_(),
    "UINT8": pa.uint8(),
    "UINT16": pa.uint16(),
    "UINT32": pa.uint32(),
    "UINT64": pa.uint64(),
    "INT8": pa.int8(),
    "INT16": pa.int16(),
    "INT32": pa.int32(),
    "INT64": pa.int64(),
    "FP16": pa.float32(),
    "BF16": pa.float32(),
    "FP32": pa.float32(),
    "FP64": pa.float64(),
    "BYTES": pa.string(),
}


def array_of(name: str, column: pa.ChunkedArray, datatype: str) -> Array:
    """The column in the datatype, without losing anything but the digits that a shorter float does not have."""
    try:
        array = _values(column.combine_chunks())
        if (array.dtype == object) != (datatype == "BYTES"):
            raise ValueError(f"{column.type} is not {datatype} data")
        return array if array.dtype == object else _cast(array, dtype_of(datatype))
    except ValueError as error:
        raise Invalid(f"column {name!r}: {error}.") from error


def _values(column: Any) -> Array:
    """Objects for text and bytes, numbers for all else; lists become dimensions."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _values(column.dictionary_decode())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        _check_full(column)
        lengths = pc.unique(pc.list_value_length(column)).to_pylist() or [0]
        if len(lengths) > 1:
            raise ValueError(f"its rows have {min(lengths)} to {max(lengths)} values, they must have equally many")
        inner = _values(column.flatten())
        return inner.reshape(len(column), lengths[0], *inner.shape[1:])
    if pa.types.is_floating(kind):
        return np.asarray(column.to_numpy(zero_copy_only=False))  # What is missing is NaN.
    _check_full(column)
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return np.asarray(column.to_numpy(zero_copy_only=False))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        return np.array(column.to_pylist(), dtype=object)
    raise ValueError(f"{kind} is neither numbers, text nor lists of them")


def _check_full(column: Any) -> None:
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py()
        raise ValueError(f"{column.null_count} of {len(column)} rows have no value, the first is number {row} of them")


def _cast(array: Array, dtype: "np.dtype[Any]") -> Array:
    with np.errstate(all="ignore"):
        cast = array.astype(dtype)
        if dtype.kind in "biu" and not np.array_equal(cast.astype(array.dtype), array):
            raise ValueError(f"not every value is {'true or false' if dtype.kind == 'b' else f'a whole {dtype.name}'}")
    return cast


def type_of_output(spec: TensorSpec) -> Any:
    kind = _TYPES[spec.datatype]
    for _ in spec.shape[1:]:
        kind = pa.list_(kind)
    return kind


def depth_of(kind: Any) -> int:
    return 1 + depth_of(kind.value_type) if pa.types.is_list(kind) else 0


def type_of_array(array: Array) -> Any:
    kind = pa.string() if array.dtype.kind in "SU" else pa.from_numpy_dtype(array.dtype)
    for _ in array.shape[1:]:
        kind = pa.list_(kind)
    return kind


def column_of(array: Array, kind: Any) -> Any:
    """The array as a column: its first dimension is the rows, the others become lists. What is no text has U+FFFD."""
    lengths = array.shape[1:]
    depth = len(lengths)
    element = kind
    for _ in range(depth):
        element = element.value_type
    flat: Any = array.ravel()
    if array.dtype.kind in "OS":
        flat = [each.decode(errors="replace") if isinstance(each, bytes) else str(each) for each in flat.tolist()]
    elif array.dtype.name in ("bfloat16", "float16"):
        flat = flat.astype(np.float32)
    column = pa.array(flat, element)
    for length in reversed(lengths):
        count = len(column) // length if length else int(np.prod(array.shape[:depth]))
        column = pa.ListArray.from_arrays(pa.array(np.arange(count + 1) * length, pa.int32()), column)
        depth -= 1
    return column
