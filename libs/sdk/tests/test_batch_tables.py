"""Files of rows: which columns make which input, and what is written beside them."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lepton.batch_columns import array_of, column_of, type_of_array
from lepton.batch_tables import Scored, drafting, plan, read_source
from lepton.errors import Invalid
from lepton.models import TensorSpec
from pyarrow import csv, parquet


def spec(name: str, datatype: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=list(shape))


X, AGE, TEXT = spec("x", "FP32", -1, 3), spec("age", "INT64", -1), spec("text", "BYTES", -1, 1)
TABLE = pa.table(
    {"age": [1, 2], "x": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "text": ["é", "b"], "a": [1, 2], "b": [3.5, None]}
)


def test_each_input_is_the_column_of_its_name() -> None:
    arrays = plan(TABLE.schema, [X, AGE, TEXT], [], 256).arrays(TABLE)
    np.testing.assert_array_equal(arrays["x"], np.array([[1, 2, 3], [4, 5, 6]], np.float32))
    assert (arrays["x"].dtype, arrays["age"].tolist(), arrays["text"].tolist()) == (
        np.dtype(np.float32),
        [1, 2],
        [["é"], ["b"]],
    )


def test_a_model_of_one_input_takes_the_chosen_columns_side_by_side() -> None:
    features = spec("features", "FP32", -1, 2)
    np.testing.assert_array_equal(
        plan(TABLE.schema, [features], ["b", "a"], 256).arrays(TABLE)["features"],
        np.array([[3.5, 1], [np.nan, 2]], np.float32),
    )
    numbers = TABLE.select(["a", "b"])
    assert plan(numbers.schema, [features], [], 256).arrays(numbers)["features"].shape == (2, 2)


@pytest.mark.parametrize(
    ("specs", "columns", "told"),
    [
        ([spec("y", "FP32", -1), AGE], [], "column 'y' is missing"),
        ([X], ["c"], "column 'c' is missing"),
        ([X, AGE], ["a"], "a model of one input"),
        ([spec("f", "FP32", -1, 3)], [], "takes 3 values a row, not 5 columns: age, x, text, a, b"),
        ([spec("age", "INT64")], [], "does not take rows"),
        ([spec("age", "INT64", 8)], [], "exactly 8 rows"),
    ],
)
def test_columns_that_make_no_input_are_named(specs: list[TensorSpec], columns: list[str], told: str) -> None:
    with pytest.raises(Invalid, match=told):
        plan(TABLE.schema, specs, columns, 256)


@pytest.mark.parametrize(
    ("name", "shape", "datatype", "told"),
    [
        ("b", (), "INT64", "not every value is a whole int64"),
        ("text", (), "FP32", "string is not FP32 data"),
        ("age", (), "BYTES", "int64 is not BYTES data"),
        ("age", (), "BOOL", "not every value is true or false"),
        ("age", (), "UINT8", None),
        ("x", (2,), "FP32", r"rows of shape \(3,\), input 'x' takes \(2,\)"),
    ],
)
def test_values_that_would_become_others_are_refused(
    name: str, shape: tuple[int, ...], datatype: str, told: str | None
) -> None:
    chosen = plan(TABLE.schema, [spec(name, datatype, -1, *shape)], [], 256)
    if told is None:
        chosen.arrays(TABLE)
    else:
        with pytest.raises(Invalid, match=f"column '{name}'.*{told}"):
            chosen.arrays(TABLE)


@pytest.mark.parametrize(
    ("column", "told"),
    [
        (pa.array([1, None, 3]), "1 of 3 rows have no value, the first is number 1"),
        (pa.array([[1.0], [1.0, 2.0]]), "1 to 2 values"),
        (pa.array([[1.0], None]), "no value"),
        (pa.array([0], pa.timestamp("s")), "neither numbers, text nor lists"),
    ],
)
def test_gaps_are_told(column: Any, told: str) -> None:
    with pytest.raises(Invalid, match=f"column 'c': .*{told}"):
        array_of("c", pa.chunked_array([column]), "INT64")


shapes = st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple)
datatypes = st.sampled_from(["BOOL", "UINT8", "INT16", "INT64", "FP32", "FP64"])
DTYPES = {"BOOL": "?", "UINT8": "u1", "INT16": "i2", "INT64": "i8", "FP32": "f4", "FP64": "f8"}


@given(shapes, datatypes, st.integers(0, 2**32 - 1))
def test_an_array_is_the_same_after_it_was_a_column(shape: tuple[int, ...], datatype: str, seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 2, shape).astype(DTYPES[datatype])
    column = column_of(array, type_of_array(array))
    assert column.to_pylist() == array.tolist()
    back = array_of("c", pa.chunked_array([column]), datatype)
    assert back.dtype == array.dtype
    if array.size:
        np.testing.assert_array_equal(back, array)


@given(st.integers(0, 40), st.integers(1, 15), st.integers(1, 15))
def test_pieces_are_all_rows_in_their_order(rows: int, group: int, size: int) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        parquet.write_table(pa.table({"n": pa.array(range(rows), pa.int64())}), path, row_group_size=group)
        source = read_source(path)
        pieces = [piece["n"].to_pylist() for piece in source.pieces(size)]
    assert [each for piece in pieces for each in piece] == list(range(rows))
    assert all(len(piece) == size for piece in pieces[:-1])
    assert source.rows == rows


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_answers_and_errors_stand_beside_the_rows(tmp_path: Path, suffix: str) -> None:
    rows = TABLE.select(["age", "x"])
    scored = Scored(rows.schema, [spec("x", "FP16", -1, 2), spec("label", "BYTES", -1)])
    outputs: dict[str, Any] = {"x": np.ones((2, 2), np.float16), "label": np.array([b"caf\xc3\xa9", b"\xff"], object)}
    assert scored.mismatch(outputs, 2) is None
    assert "not one value for each of 3 rows" in str(scored.mismatch(outputs, 3))
    path = tmp_path / f"out{suffix}"
    with drafting(path, scored.schema) as (draft, writer):
        writer.write_table(scored.table(rows, outputs, None))
        writer.write_table(scored.table(rows, {}, "no room"))
    assert not path.exists()
    table = parquet.read_table(draft) if suffix == ".parquet" else csv.read_csv(draft)
    assert table.column_names == ["age", "x", "predicted_x", "label", "lepton_error"]
    assert table["label"].to_pylist()[:2] == ["café", "�"]
    assert table["predicted_x"][0].as_py() == ([1.0, 1.0] if suffix == ".parquet" else "[1.0, 1.0]")
    assert table["lepton_error"].to_pylist()[2:] == ["no room", "no room"]


def test_arrays_are_rows_and_what_is_none_is_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.npz"
    np.savez(path, x=np.ones((2, 3), np.float32), text=np.array(["a", "b"]))
    arrays = plan(read_source(path).schema, [X, TEXT], [], 9).arrays(next(read_source(path).pieces(9)))
    assert (arrays["x"].shape, arrays["text"].tolist()) == ((2, 3), [["a"], ["b"]])
    np.savez(path, x=np.ones(2), y=np.ones(3))
    with pytest.raises(Invalid, match="different numbers of rows: x 2, y 3"):
        read_source(path)
    for name in ("rows.parquet", "rows.npz", "rows.txt"):
        (tmp_path / name).write_bytes(b"oops")
        with pytest.raises(Invalid, match=name):
            read_source(tmp_path / name)
