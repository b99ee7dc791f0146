"""A whole platform as `lepton up` runs it, in a folder of its own, whose parts a test can kill, freeze and restart."""

import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil
from lepton import Client, local
from lepton.home import Home, Layout
from lepton.ports import free_port
from lepton.processes import end, freeze

_START_S = 90.0


class Platform:
    """A running platform: Kafka, PostgreSQL, etcd, Envoy, registry, rollout, gateway, worker-1, worker-2 …"""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.key = home.key()
        self.url = self.layout.url

    @property
    def layout(self) -> Layout:
        layout = self.home.layout()
        assert layout is not None, f"{self.home.folder} has no platform.json"
        return layout

    @property
    def port(self) -> int:
        """The front door's."""
        return self.layout.ports["front"]

    @property
    def address(self) -> str:
        """The front door as host:port, which is how OIP's clients want it."""
        return f"127.0.0.1:{self.port}"

    # --- callers ---

    def client(self, key: str | None = None) -> Client:
        """Lepton's own client; the operator's, unless another key is given."""
        return Client(self.url, key or self.key)

    def http(self, key: str | None = "") -> httpx.Client:
        """A plain HTTP client; the operator's, unless another key, or None for no key, is given."""
        secret = self.key if key == "" else key
        headers = {"authorization": f"Bearer {secret}"} if secret else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False, verify=False)

    def serve(self, name: str, model: Any) -> str:
        """The model takes all traffic of `name`, which is returned."""
        with self.client() as client:
            client.push(model, name=name, timeout=60)
        return name

    # --- parts ---

    def pids(self) -> dict[str, int]:
        """The pid of every part that is ready."""
        return {part.name: part.pid for part in self.home.parts() if part.pid and part.is_ready}

    def process(self, part: str) -> psutil.Process:
        record = self.home.part(part)
        process = record.identity.find() if record and record.identity else None
        assert process is not None, f"{part} does not run: {record}"
        return process

    def kill(self, part: str) -> None:
        """The part and its children have ended by SIGKILL. The supervisor starts it again: see `wait_ready`."""
        end(self.process(part), signal.SIGKILL)

    def stop(self, part: str) -> None:
        """The part has ended by SIGTERM, cleanly. The supervisor starts it again: see `wait_ready`."""
        end(self.process(part), signal.SIGTERM, timeout_s=30)

    def restart(self, part: str) -> None:
        """The part has ended cleanly, and runs again; the platform is ready."""
        self.stop(part)
        self.wait_ready()

    @contextlib.contextmanager
    def frozen(self, part: str) -> Iterator[None]:
        """The part does nothing during the block, though its connections stay open."""
        process = self.process(part)
        family = [process, *process.children(recursive=True)]
        for each in family:
            assert freeze(each)
        try:
            yield
        finally:
            for each in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.send_signal(signal.SIGCONT)

    def kill_supervisor(self) -> None:
        """Nobody restarts parts any more; those that run go on."""
        pid = self.home.supervisor_pid()
        assert pid is not None, "no supervisor runs"
        supervisor = psutil.Process(pid)
        supervisor.kill()
        supervisor.wait(10)

    def wait_ready(self, timeout_s: float = _START_S) -> None:
        """Every part answers, and so do inference and the API through the front door."""
        deadline = time.monotonic() + timeout_s
        deque(local.follow(self.home, lambda: None, timeout_s), maxlen=0)
        with self.http() as http:
            paths = ("/v2/health/ready", "/v1/models", "/v1/serving")
            until(lambda: all(http.get(path).status_code == 200 for path in paths), deadline - time.monotonic())


def until(holds: Callable[[], Any], within_s: float = 10.0, every_s: float = 0.02) -> Any:
    """The first true value that `holds` returns. Raises AssertionError when there is none in time.

    For what can only be seen by asking again.
    """
    deadline = time.monotonic() + within_s
    while not (value := holds()):
        assert time.monotonic() < deadline, f"not within {within_s:g} s"
        time.sleep(every_s)
    return value


@contextlib.contextmanager
def running_platform(
    folder: Path,
    *,
    workers: int = 2,
    pools: Mapping[str, int] | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Platform]:
    """A platform in `folder`, ready; at the end nothing of it runs.

    `pools` are workers in pools of their own; `settings` are environment variables that all its services get.
    """
    home = Home.at(folder)
    home.create()
    with _environment(settings or {}):
        supervisor = local.Detached(home, free_port(), workers, pools or {})
    try:
        deque(local.follow(home, supervisor.failure, _START_S), maxlen=0)
        platform = Platform(home)
        platform.wait_ready()
        yield platform
    finally:
        local.down(home)
        supervisor.failure()  # It learns that its process has ended.


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Of the LEPTON_ variables, the environment has just these, and where Kafka is. The services inherit them."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("LEPTON_") and name != "LEPTON_KAFKA_LIBS":
            del os.environ[name]
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
