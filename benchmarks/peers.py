"""The peers of the serving benchmark, each in its own virtual environment with pinned versions, as child processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

HERE = Path(__file__).parent
VENVS = HERE / ".venvs"
# MLServer 1.7.1 is the last release of an unmaintained project; the other two are current.
REQUIREMENTS = {
    "mlserver": ["mlserver==1.7.1", "onnxruntime==1.32.0", "setuptools<81"],
    "litserve": ["litserve==0.2.19", "onnxruntime==1.32.0"],
    "triton": ["nvidia-pytriton==0.7.0", "onnxruntime==1.32.0"],
}


def environment(name: str) -> Path:
    """The peer's virtual environment, made on first use and again when its pins change."""
    folder = VENVS / name
    marker = folder / ".installed"
    wanted = "\n".join(REQUIREMENTS[name])
    if not marker.exists() or marker.read_text() != wanted:
        print(f"installing {name} into {folder.relative_to(HERE.parent)} …", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([folder / "bin/pip", "install", "--quiet", *REQUIREMENTS[name]], check=True)
        marker.write_text(wanted)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A running server: its URL and all its processes. It stands still (SIGSTOP) while it is not being measured."""

    def __init__(
        self, name: str, url: str, ready: str, argv: Sequence[str | Path], env: Mapping[str, str], cwd: Path
    ) -> None:
        self.name, self.url = name, url
        self.grpc = ""  # where it speaks gRPC, host:port
        self._log = (cwd / "log.txt").open("wb")
        self._child = subprocess.Popen(
            [str(each) for each in argv],
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            cwd=cwd,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        self._wait(ready, cwd)

    def processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self._child.pid)
        return [parent, *parent.children(recursive=True)]

    def pause(self) -> None:
        os.killpg(self._child.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self._child.pid, signal.SIGCONT)

    def close(self) -> None:
        self.resume()
        os.killpg(self._child.pid, signal.SIGTERM)
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
        self._log.close()

    def _wait(self, ready: str, cwd: Path) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self._child.poll() is None:
            try:
                with urllib.request.urlopen(ready, timeout=1):
                    return
            except OSError:
                time.sleep(0.1)
        tail = (cwd / "log.txt").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{self.name} did not become ready:\n{tail}")


def mlserver(model: Path, folder: Path) -> Server:
    """MLServer without worker processes, its fastest form here."""
    return _mlserver("MLServer 1.7.1", model, folder / "mlserver", {})


def mlserver_batching(model: Path, folder: Path) -> Server:
    """MLServer with its adaptive batching, with as small a window as it takes."""
    batching = {"max_batch_size": 32, "max_batch_time": 0.001}
    return _mlserver("MLServer 1.7.1, batching", model, folder / "mlserver-batching", batching)


def _mlserver(name: str, model: Path, cwd: Path, batching: Mapping[str, float]) -> Server:
    home = environment("mlserver")
    cwd.mkdir()
    shutil.copy(HERE / "peer_servers/mlserver_runtime.py", cwd)
    http = free_port()
    ports = {"http_port": http, "grpc_port": free_port(), "metrics_port": free_port()}
    settings = {"host": "127.0.0.1", "parallel_workers": 0, "debug": False, "metrics_endpoint": None, **ports}
    Path(cwd, "settings.json").write_text(json.dumps(settings))
    model_settings = {"name": "mlp", "implementation": "mlserver_runtime.OnnxModel", **batching}
    Path(cwd, "model-settings.json").write_text(json.dumps(model_settings))
    base = f"http://127.0.0.1:{http}/v2"
    argv: list[str | Path] = [home / "bin/mlserver", "start", "."]
    env = {"BENCH_MODEL": str(model)}
    server = Server(name, f"{base}/models/mlp/infer", f"{base}/health/ready", argv, env, cwd)
    server.grpc = f"127.0.0.1:{ports['grpc_port']}"
    return server


def litserve(model: Path, folder: Path) -> Server:
    """LitServe with one inference worker, taking what waits (no batching window)."""
    home = environment("litserve")
    cwd = folder / "litserve"
    cwd.mkdir()
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    argv: list[str | Path] = [home / "bin/python", HERE / "peer_servers/litserve_server.py", str(port)]
    env = {"BENCH_MODEL": str(model)}
    return Server("LitServe", f"{base}/v2/models/mlp/infer", f"{base}/health", argv, env, cwd)


_TRITON_CONFIG = """
backend: "python"
max_batch_size: 64
dynamic_batching { }
input { name: "x" data_type: TYPE_FP32 dims: [ 64 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ 10 ] }
instance_group { count: 1 kind: KIND_CPU }
"""


def triton(model: Path, folder: Path) -> Server:
    """NVIDIA Triton with its Python backend calling onnxruntime and dynamic batching, without a GPU."""
    site = environment("triton") / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    server = site / "pytriton/tritonserver"
    stub = f"python_backend_stubs/{sys.version_info.major}.{sys.version_info.minor}/triton_python_backend_stub"
    shutil.copy(server / stub, server / "backends/python")
    repository = folder / "triton"
    (repository / "mlp/1").mkdir(parents=True)
    (repository / "mlp/config.pbtxt").write_text(_TRITON_CONFIG)
    shutil.copy(HERE / "peer_servers/triton_model.py", repository / "mlp/1/model.py")
    port = free_port()
    argv: list[str | Path] = [
        server / "bin/tritonserver",
        f"--model-repository={repository}",
        f"--backend-directory={server / 'backends'}",
        "--http-address=127.0.0.1",
        f"--http-port={port}",
        "--allow-grpc=false",
        "--allow-metrics=false",
    ]
    env = {
        "BENCH_MODEL": str(model),
        "BENCH_SITE_PACKAGES": str(site),
        "LD_LIBRARY_PATH": f"{site / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}",
    }
    base = f"http://127.0.0.1:{port}/v2"
    return Server("NVIDIA Triton", f"{base}/models/mlp/infer", f"{base}/health/ready", argv, env, repository)
