"""Batch scoring on the real parts: every row once and in its place, wherever the job was interrupted."""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from lepton.batch import Summary, Wanted, score
from lepton.errors import Conflict, Forbidden, Invalid
from lepton.flow import Progress
from pyarrow import csv, parquet

from . import onnx_models
from .command import Lepton
from .local_platform import Platform, until

ROWS = 3000
X = np.random.default_rng(7).standard_normal((ROWS, 4)).astype(np.float32)
SCORES = onnx_models.mlp_scores(X)


class Killed(BaseException):
    """Nobody expects it, and nobody cleans up after it."""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A Parquet file with a column of vectors named after the input, in row groups that fit no piece."""
    path = tmp_path / "rows.parquet"
    table = pa.table({"customer": np.arange(ROWS), "x": list(X), "label": ["a", "b", None] * (ROWS // 3)})
    parquet.write_table(table, path, row_group_size=700)
    return path


@pytest.fixture
def run(platform: Platform) -> Callable[..., Summary]:
    """Scores in this process; with `killed_after` it dies when so many rows are answered."""

    def run(model: str, source: Path, output: Path, killed_after: int = 10**9, **options: Any) -> Summary:
        def look(progress: Progress) -> None:
            if killed_after <= progress.done < progress.total:
                raise Killed

        with platform.client(options.pop("key", None)) as client:
            wanted = Wanted(model, source, output, **{"rows": 10, **options})
            return score(client, wanted, platform.layout.kafka, look)

    return run


def check(output: Path) -> None:
    """Every row is there once, in its place, with its own scores."""
    table = parquet.read_table(output)
    assert table.column_names == ["customer", "x", "label", "scores", "predicted_label", "lepton_error"]
    assert table["customer"].to_pylist() == list(range(ROWS))
    assert table["lepton_error"].null_count == ROWS
    np.testing.assert_allclose(np.array(table["scores"].to_pylist()), SCORES, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(table["predicted_label"].to_numpy(), SCORES.argmax(axis=1))


def test_killed_wherever_it_is_it_goes_on_and_asks_nothing_that_was_answered(
    run: Callable[..., Summary], mlp: str, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.parquet"
    for killed_after in (0, 10, 1000, 2000):
        with pytest.raises(Killed):
            run(mlp, rows, output, killed_after)
        assert not output.exists()
    summary = run(mlp, rows, output)
    assert summary.asked <= (ROWS - 2000) // 10
    assert (summary.rows, summary.failed) == (ROWS, 0)
    check(output)
    before = output.read_bytes()
    again = run(mlp, rows, output)
    assert (again.asked, again.rows) == (0, ROWS)
    output.unlink()
    assert run(mlp, rows, output).asked == ROWS // 10
    assert output.read_bytes() == before


def test_a_command_that_is_killed_is_given_again(platform: Platform, lepton: Lepton, mlp: str, rows: Path) -> None:
    output = rows.with_name("scored.parquet")
    told = ["batch", mlp, "--input", str(rows), "--output", str(output), "--rows", "10"]
    state = rows.with_name(".scored.parquet.batch")
    command = [str(Path(sys.executable).with_name("lepton")), *told]
    environment = {"LEPTON_HOME": str(platform.home.folder), "PATH": "/usr/bin:/bin"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        with suppress(AssertionError):  # One that is done before it can be killed is no failure.
            until(lambda: first.poll() is not None or (state.exists() and state.stat().st_size > 40_000), 60)
        first.kill()
    ended = lepton(*told, "--json")
    assert (ended.code, ended.json["rows"], ended.json["failed"]) == (0, ROWS, 0)
    check(output)


def test_columns_of_numbers_are_one_input_in_their_order_and_csv_is_written_too(
    run: Callable[..., Summary], lepton: Lepton, mlp: str, tmp_path: Path
) -> None:
    source, output = tmp_path / "rows.csv", tmp_path / "out.csv"
    named = {name: X[:100, number] for number, name in enumerate("abcd")}
    csv.write_csv(pa.table({"id": np.arange(100), **named}), source)
    with pytest.raises(Invalid, match="takes 4 values a row, not 5 columns: id, a, b, c, d"):
        run(mlp, source, output)
    ended = lepton("batch", mlp, "--input", source, "--output", output, "--columns", "a,b,c,d", "--rows", 30)
    assert ended.code == 0, ended.err
    assert "100 of 100 rows scored by version 1 in " in ended.out
    again = lepton("batch", mlp, "--input", source, "--output", output, "--columns", "a,b,c,d", "--rows", 30)
    assert "Done already: 100 of 100 rows scored by version 1, in " in again.out
    table = csv.read_csv(output)
    scores = [json.loads(each) for each in table["scores"].to_pylist()]
    np.testing.assert_allclose(scores, SCORES[:100], rtol=1e-3, atol=1e-4)


def test_rows_that_fail_are_told_and_asked_again_by_the_next_run(
    platform: Platform, run: Callable[..., Summary], lepton: Lepton, name: str, tmp_path: Path
) -> None:
    platform.serve(name, onnx_models.lookup())
    source, output = tmp_path / "rows.npz", tmp_path / "out.parquet"
    numbers = np.ones(40, np.int64)
    numbers[25] = 10**6
    np.savez(source, index=numbers)
    ended = lepton("batch", name, "--input", source, "--output", output, "--rows", 10)
    assert ended.code == 1
    assert "10 of 40 rows failed" in ended.err
    table = parquet.read_table(output)
    errors = table["lepton_error"].to_pylist()
    assert [number for number, each in enumerate(errors) if each] == list(range(20, 30))
    again = run(name, source, output)
    assert (again.asked, again.failed) == (1, 10)
    assert "indices" in again.reasons[0]


def test_a_file_that_is_somebody_elses_is_left_alone(
    run: Callable[..., Summary], mlp: str, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "mine.parquet"
    output.write_bytes(b"precious")
    with pytest.raises(Conflict, match="no earlier run wrote it"):
        run(mlp, rows, output)
    assert output.read_bytes() == b"precious"


def test_values_that_do_not_fit_are_told_with_their_column_and_rows(
    run: Callable[..., Summary], mlp: str, tmp_path: Path
) -> None:
    source = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"x": [[1.0, 2.0, 3.0, 4.0]] * 65 + [[1.0]]}), source)
    with pytest.raises(Invalid, match="Rows 60 to 65: column 'x': its rows have 1 to 4 values"):
        run(mlp, source, tmp_path / "out.parquet")


def test_a_key_that_may_not_infer_ends_it_with_the_gateways_reason(
    run: Callable[..., Summary], mlp: str, rows: Path, tmp_path: Path, make_key: Callable[..., str]
) -> None:
    with pytest.raises(Forbidden, match="scope"):
        run(mlp, rows, tmp_path / "out.parquet", key=make_key("read"))
