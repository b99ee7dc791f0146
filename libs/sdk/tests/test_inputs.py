"""Whatever file a person gives as a model's input is read, or refused with what is wrong."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lepton.errors import Invalid
from lepton.inputs import read_inputs
from lepton.models import TensorSpec

X = TensorSpec(name="x", datatype="FP32", shape=[-1, 2])
NOTE = TensorSpec(name="note", datatype="BYTES", shape=[-1])


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array))
    return file.getvalue()


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.npy", npy([[1, 2]])),
        ("x.npz", npz(x=[[1, 2]])),
        ("x.npy", npz(x=[[1, 2]])),
        ("x.npz", npy([[1, 2]])),
        ("x.json", b"[[1, 2]]"),
        ("x.json", b'{"x": [[1, 2]]}'),
        ("x.json", b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}'),
    ],
)
def test_a_file_becomes_the_models_input(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    inputs = read_inputs(tmp_path / name, [X])
    assert inputs["x"].dtype == np.float32
    assert {name: array.tolist() for name, array in inputs.items()} == {"x": [[1, 2]]}


def test_several_inputs_are_told_apart_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(npz(x=[[1, 2]], note=["a"]))
    inputs = read_inputs(tmp_path / "x.npz", [X, NOTE])
    assert {name: array.tolist() for name, array in inputs.items()} == {"x": [[1, 2]], "note": ["a"]}
    (tmp_path / "x.npy").write_bytes(npy([[1, 2]]))
    with pytest.raises(Invalid, match="2 inputs: x, note"):
        read_inputs(tmp_path / "x.npy", [X, NOTE])


def test_standard_input_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("[[1, 2]]"))
    assert read_inputs(Path("-"), [X])["x"].tolist() == [[1, 2]]


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.npy", b"", "not a .npy file of plain arrays"),
        ("x.npy", truncated(npy(np.zeros(1000))), "not a .npy file of plain arrays"),
        ("x.npz", truncated(npz(x=np.zeros(1000))), "not a .npz file of plain arrays"),
        ("x.npz", npz(x=np.array([object()])), "not a .npz file of plain arrays"),
        ("x.npy", npy(["a"]), "input 'x': .* is not FP32 data"),
        ("x.npz", npz(y=[[1, 2]]), "no input 'y'"),
        ("x.json", b"\xff\xfe", "is not JSON"),
        ("x.json", b"{", "is not JSON"),
        ("x.json", b"[" * 100_000 + b"]" * 100_000, "is not JSON"),
        ("x.json", b"3", "no inputs in it"),
        ("x.json", b"[[1], [2, 3]]", "input 'x': not FP32 data of one shape"),
        ("x.json", b'{"inputs": [{"name": "x"}]}', "no name or no data"),
    ],
)
def test_a_wrong_file_is_refused_with_what_is_wrong(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Invalid, match=message):
        read_inputs(tmp_path / name, [X])
