"""Files of rows for batch scoring: what a model is asked of them, and its answers beside them. No network.

Parquet is read and written piece by piece; CSV and NPZ are read whole.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

from lepton.batch_columns import array_of, column_of, depth_of, type_of_array, type_of_output
from lepton.errors import Invalid
from lepton.models import TensorSpec
from lepton.tensors import Array

ERROR_COLUMN = "lepton_error"
_FORMS = "A file of rows is .parquet, .csv or .npz."


# --- rows in ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A file's rows. `pieces` reads them in their order, from the start each time it is called."""

    rows: int
    schema: pa.Schema
    _file: Path
    _table: pa.Table | None

    def pieces(self, rows: int) -> Iterator[pa.Table]:
        """All rows, in tables of so many; the last may have fewer."""
        if self._table is not None:
            for start in range(0, self.rows, rows):
                yield self._table.slice(start, rows)
            return
        with parquet.ParquetFile(self._file) as file:
            yield from _cut(file.iter_batches(batch_size=rows), self.schema, rows)


def read_source(path: Path) -> Source:
    """The file's rows. Raises Invalid when it is none of the three kinds, OSError."""
    try:
        match path.suffix:
            case ".parquet":
                with parquet.ParquetFile(path) as file:
                    return Source(file.metadata.num_rows, file.schema_arrow, path, None)
            case ".csv":
                table = csv.read_csv(path)
            case ".npz":
                table = _table_of_arrays(path)
            case _:
                raise Invalid(f"{path} is of no kind that is known.", hint=_FORMS)
    except (pa.ArrowInvalid, BadZipFile, EOFError, ValueError) as error:
        raise Invalid(f"{path} cannot be read: {error}") from error
    return Source(table.num_rows, table.schema, path, table)


def _cut(batches: Iterable[pa.RecordBatch], schema: pa.Schema, rows: int) -> Iterator[pa.Table]:
    """Whatever sizes a file's own parts have."""
    waiting: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        start = 0
        while start < batch.num_rows:
            part = batch.slice(start, rows - count)
            waiting.append(part)
            start += part.num_rows
            count += part.num_rows
            if count == rows:
                yield pa.Table.from_batches(waiting, schema)
                waiting, count = [], 0
    if waiting:
        yield pa.Table.from_batches(waiting, schema)


def _table_of_arrays(path: Path) -> pa.Table:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"its arrays have different numbers of rows: {told}")
    return pa.table({name: column_of(array, type_of_array(array)) for name, array in arrays.items()})


# --- what the model is asked ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Which columns make which input. More than one column, or one of numbers, is put side by side as a row."""

    inputs: Mapping[str, tuple[TensorSpec, tuple[str, ...]]]
    rows: int

    def arrays(self, table: pa.Table) -> dict[str, Array]:
        """The inputs for these rows. Raises Invalid naming the column that does not fit."""
        found = {}
        for name, (spec, columns) in self.inputs.items():
            arrays = [array_of(column, table.column(column), spec.datatype) for column in columns]
            array = arrays[0] if len(arrays) == 1 else np.stack(arrays, axis=1)
            found[name] = _fitted(array, spec, columns)
        return found


def plan(schema: pa.Schema, specs: Sequence[TensorSpec], columns: Sequence[str], rows: int) -> Plan:
    """How the file's columns make the model's inputs: one column each, by name; or, for a model of one input that no
    column is named after, `columns` in their order, or all. Raises Invalid naming what is missing.

    `rows` is how many go into one request at most.
    """
    names = schema.names
    for column in columns:
        if column not in names:
            raise Invalid(f"column {column!r} is missing.", hint=f"The file has {', '.join(names)}.")
    by_name = {spec.name: (spec, (spec.name,)) for spec in specs}
    missing = [name for name in by_name if name not in names]
    if columns and len(specs) != 1:
        raise Invalid(f"Columns can be chosen for a model of one input; this one has {', '.join(by_name)}.")
    if columns or (missing and len(specs) == 1):
        chosen = tuple(columns or names)
        _check_width(specs[0], chosen)
        by_name = {specs[0].name: (specs[0], chosen)}
    elif missing:
        hint = f"The model's inputs are {', '.join(by_name)}; the file has {', '.join(names)}."
        raise Invalid(f"column {missing[0]!r} is missing.", hint=hint)
    return Plan(by_name, min([rows, *map(_most_rows, specs)]))


def _check_width(spec: TensorSpec, columns: Sequence[str]) -> None:
    width = spec.shape[1] if len(spec.shape) == 2 else 1 if len(spec.shape) < 2 else -1
    if len(columns) > 1 and width not in (-1, len(columns)):
        told = ", ".join(columns[:10]) + (" …" if len(columns) > 10 else "")
        hint = "Choose them with --columns a,b,…, or name one column of lists after the input."
        raise Invalid(f"input {spec.name!r} takes {width} values a row, not {len(columns)} columns: {told}.", hint=hint)


def _most_rows(spec: TensorSpec) -> int:
    if not spec.shape:
        raise Invalid(f"input {spec.name!r} is a single value: the model does not take rows.")
    first = spec.shape[0]
    if first > 1:
        raise Invalid(f"input {spec.name!r} takes exactly {first} rows at a time, which batch scoring cannot give it.")
    return 1 if first == 1 else 2**31


def _fitted(array: Array, spec: TensorSpec, columns: Sequence[str]) -> Array:
    if array.ndim == len(spec.shape) - 1 and spec.shape[-1] in (1, -1):
        array = array[..., np.newaxis]
    wanted = tuple(spec.shape[1:])
    fits = len(wanted) == array.ndim - 1 and all(
        want in (-1, have) for want, have in zip(wanted, array.shape[1:], strict=True)
    )
    if not fits:
        told = f"column {columns[0]!r}" if len(columns) == 1 else f"columns {', '.join(columns[:10])}"
        raise Invalid(f"{told}: rows of shape {array.shape[1:]}, input {spec.name!r} takes {wanted}.")
    return array


# --- what it answered, beside the rows --------------------------------------------------------------------------------


class Scored:
    """The output file's shape: the input's columns, the model's outputs, and what went wrong with a row. An output
    that is named like a column is `predicted_` and its name."""

    def __init__(self, schema: pa.Schema, outputs: Sequence[TensorSpec]) -> None:
        taken = {*schema.names, ERROR_COLUMN}
        if ERROR_COLUMN in schema.names:
            raise Invalid(f"The file has a column {ERROR_COLUMN!r} already: it is what an earlier run wrote.")
        self._outputs = {spec.name: pa.field(_free(spec.name, taken), type_of_output(spec)) for spec in outputs}
        self.schema = pa.schema([*schema, *self._outputs.values(), pa.field(ERROR_COLUMN, pa.string())])

    def table(self, rows: pa.Table, outputs: Mapping[str, Array], error: str | None) -> pa.Table:
        """The rows with their outputs, or with the error in the outputs' place."""
        answered = [
            pa.nulls(rows.num_rows, field.type) if error is not None else column_of(outputs[name], field.type)
            for name, field in self._outputs.items()
        ]
        errors = pa.array([error] * rows.num_rows, pa.string())
        return pa.table([*rows.columns, *answered, errors], schema=self.schema)

    def mismatch(self, outputs: Mapping[str, Array], rows: int) -> str | None:
        """Why the outputs are not those of so many rows; None when they are."""
        for name, field in self._outputs.items():
            if name not in outputs:
                return f"output {name!r} is missing"
            shape = outputs[name].shape
            if not shape or shape[0] != rows or len(shape) - 1 != depth_of(field.type):
                return f"output {name!r} has the shape {shape}, which is not one value for each of {rows} rows"
        return None


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name = f"predicted_{name}"
    taken.add(name)
    return name


class Writer(Protocol):
    def write_table(self, table: pa.Table) -> None: ...


def check_output(path: Path) -> None:
    """Raises Invalid when rows cannot be written to a file of that name."""
    if path.suffix not in (".parquet", ".csv"):
        raise Invalid(f"{path}: rows are written to .parquet or .csv.")


@contextmanager
def drafting(path: Path, schema: pa.Schema) -> Iterator[tuple[Path, Writer]]:
    """A file beside `path`, complete and on the disk after the block, and what writes to it."""
    draft = path.with_name(f".{path.name}.draft")
    if path.suffix == ".csv":
        with csv.CSVWriter(draft, _flat(schema.empty_table()).schema) as writer:
            yield draft, _CsvWriter(writer)
    else:
        with parquet.ParquetWriter(draft, schema) as writer:
            yield draft, writer
    with draft.open("rb") as file:
        os.fsync(file.fileno())


class _CsvWriter:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write_table(self, table: pa.Table) -> None:
        self._writer.write_table(_flat(table))


def _flat(table: pa.Table) -> pa.Table:
    """Lists as JSON, for files that know none."""
    for number, field in enumerate(table.schema):
        if pa.types.is_nested(field.type):
            texts = [None if each is None else json.dumps(each) for each in table.column(number).to_pylist()]
            table = table.set_column(number, field.name, pa.array(texts, pa.string()))
    return table
