"""Small real models, written as ONNX text, and worker processes that serve them."""

import hashlib
import json
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import pytest
from lepton.ports import free_port
from lepton.processes import http_get
from lepton_common.blobs import Blobs
from lepton_common.etcd import EtcdClient
from lepton_common.records import Assigned, Serving, Share

OnnxFile = Callable[..., Path]

DOUBLE = "g (float[N, 2] x) => (float[N, 2] y) { y = Add(x, x) }"


def onnx_bytes(graph: str, **metadata: str) -> bytes:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {graph}')
    onnx.helper.set_model_props(model, metadata)
    data: bytes = model.SerializeToString()
    return data


@pytest.fixture
def onnx_file(tmp_path: Path) -> OnnxFile:
    """Writes the graph to a file; keywords become its metadata."""
    written: list[Path] = []

    def write(graph: str = DOUBLE, **metadata: str) -> Path:
        path = tmp_path / f"{len(written)}.onnx"
        path.write_bytes(onnx_bytes(graph, **metadata))
        written.append(path)
        return path

    return write


@dataclass(frozen=True)
class WorkerRecipe:
    """A worker process of the pool `cpu`, as `lepton.processes` runs it."""

    folder: Path
    etcd: str
    port: int = field(default_factory=free_port)
    settings: Mapping[str, int] = field(default_factory=dict)
    name: str = "worker"
    stop_signal: signal.Signals = signal.SIGTERM

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def blobs(self) -> Path:
        return self.folder / "blobs"

    def prepare(self) -> None: ...

    def argv(self) -> list[str]:
        return [sys.executable, "-m", "lepton_worker.main"]

    def environment(self) -> dict[str, str]:
        settings = {
            "PORT": self.port,
            "ETCD": self.etcd,
            "BLOBS": self.blobs,
            "CACHE": self.folder / "cache",
            "WORKER_ID": "w1",
            "DRAIN_S": 1,
            **self.settings,
        }
        return {f"LEPTON_{key}": str(value) for key, value in settings.items()}

    def not_ready(self) -> str | None:
        try:
            status, body = http_get(self.port, "/health/ready")
        except OSError as error:
            return str(error)
        return None if status == 200 else json.dumps(body.decode())


async def serve(etcd: EtcdClient, recipe: WorkerRecipe, model: str, data: bytes) -> None:
    """The model's version 1 is stored, and assigned to the worker's pool."""
    digest = hashlib.sha256(data).hexdigest()
    recipe.blobs.mkdir(parents=True, exist_ok=True)
    source = recipe.folder / f"{digest}.onnx"
    source.write_bytes(data)
    await Blobs(recipe.blobs).put_file(source, digest)
    record = Serving(
        tenant="default",
        model=model,
        generation=1,
        stable=1,
        split=(Share(version=1, percent=100),),
        versions=(Assigned(version=1, sha256=digest, size_bytes=len(data)),),
    )
    await etcd.put(record.key, record.model_dump_json().encode())
