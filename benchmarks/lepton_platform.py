"""The platform under test: `lepton up` in a folder of its own, and the three ways into it that are measured."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lepton
import psutil
from lepton.home import Home

from benchmarks.peers import free_port

MODEL = "mlp"
_LEPTON = Path(sys.executable).with_name("lepton")


class Platform:
    """A running platform with one worker that serves `MODEL`, and with `direct` a gateway that goes past the mesh."""

    def __init__(self, home: Path, model: Path, *, direct: bool) -> None:
        self._home = Home.at(home)
        port = free_port()
        command: list[str | Path] = [
            _LEPTON,
            "up",
            "--detach",
            "--home",
            str(home),
            "--port",
            str(port),
            "--workers",
            "1",
        ]
        subprocess.run(command, check=True)
        layout = self._home.layout()
        assert layout is not None, "the platform is up and has no layout"
        self.url = layout.url
        self.ports = layout.ports
        self.kafka = layout.kafka
        self.key = self._home.key()
        with lepton.Client(url=self.url, key=self.key) as client:
            client.push(model, name=MODEL)
        self._direct: subprocess.Popen[bytes] | None = None
        self._direct_port = 0
        if direct:
            self._direct, self._direct_port = self._gateway_to_worker(layout.kafka)

    def process(self, part: str) -> psutil.Process:
        state = self._home.part(part)
        assert state is not None, f"no part {part}"
        assert state.pid is not None, f"{part} does not run"
        return psutil.Process(state.pid)

    @property
    def direct(self) -> psutil.Process:
        """The gateway whose mesh is the worker itself."""
        assert self._direct is not None, "not asked for"
        return psutil.Process(self._direct.pid)

    def infer_url(self, part: str) -> str:
        port = self._direct_port if part == "direct" else self.ports[part]
        return f"http://127.0.0.1:{port}/v2/models/{MODEL}/infer"

    def close(self) -> None:
        if self._direct is not None:
            self._direct.terminate()
            self._direct.wait(20)
        subprocess.run([_LEPTON, "down", "--home", str(self._home.folder)], check=True)

    def _gateway_to_worker(self, kafka: str) -> tuple[subprocess.Popen[bytes], int]:
        port = free_port()
        settings = {
            "LEPTON_PORT": str(port),
            "LEPTON_KAFKA": kafka,
            "LEPTON_ETCD": f"127.0.0.1:{self.ports['etcd']}",
            "LEPTON_MESH": f"127.0.0.1:{self.ports['worker-1']}",
            "LEPTON_ROLLOUT_URL": f"http://127.0.0.1:{self.ports['rollout']}",
            "LEPTON_KEYLESS_LOOPBACK": "true",
            "LEPTON_LOG_LEVEL": "warning",
        }
        child = subprocess.Popen(
            [sys.executable, "-m", "lepton_gateway.main"], env={**os.environ, **settings}, stdout=subprocess.DEVNULL
        )
        ready = f"http://127.0.0.1:{port}/v2/models/{MODEL}/ready"
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(ready, timeout=1):
                    return child, port
            except OSError:
                time.sleep(0.1)
        child.kill()
        raise RuntimeError("the second gateway did not become ready")


@contextmanager
def running(home: Path, model: Path, *, direct: bool = False) -> Iterator[Platform]:
    """A platform, stopped at the end of the block."""
    platform = Platform(home, model, direct=direct)
    try:
        yield platform
    finally:
        platform.close()
