"""Small real models, written as ONNX text."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

OnnxFile = Callable[..., Path]

DOUBLE = "g (float[N, 2] x) => (float[N, 2] y) { y = Add(x, x) }"


@pytest.fixture
def onnx_file(tmp_path: Path) -> OnnxFile:
    """Writes the graph to a file; keywords become its metadata."""
    written: list[Path] = []

    def write(graph: str = DOUBLE, **metadata: str) -> Path:
        model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {graph}')
        onnx.helper.set_model_props(model, metadata)
        path = tmp_path / f"{len(written)}.onnx"
        path.write_bytes(model.SerializeToString())
        written.append(path)
        return path

    return write
