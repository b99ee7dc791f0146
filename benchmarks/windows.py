"""What the gateway's windows cost: the same gateway with and without them, in turns, under the same load.

    python -m benchmarks.windows [--pairs N] [--rounds N] [--seconds S] [--against FOLDER]

First by slices: two gateways in one process, asked in turns of 128 requests (`gateway_slices.py`), which tells what a
request costs more however busy the machine is. Then each gateway as a process of its own under full load, which tells
what a request costs in all: one busy event loop serves as many as fit into a second. Both on a real etcd and a real
Kafka where there is one, with a mesh behind them that answers at once, for two versions. Without windows nothing is
counted at all, for Prometheus neither. `--against` adds the gateway of another checkout, of an earlier commit for
instance, to the second part. Writes `benchmarks/results/windows.json`.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from lepton.kafka import Kafka, MockKafka, find_kafka
from lepton.ports import free_port
from lepton.processes import running
from lepton.servers import Etcd
from lepton_common.etcd import EtcdClient
from lepton_common.http11 import JSON, Request, Server
from lepton_common.kafka_client import ensure_topics
from lepton_common.records import Assigned, Serving, Share
from lepton_common.service import run as run_service
from lepton_common.telemetry import configure
from lepton_common.types import ModelRef
from lepton_gateway.main import build
from lepton_gateway.settings import Settings
from lepton_gateway.windows import Counts, Windows
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import gateway_slices, load, report

CONNECTIONS = 32
MODEL = "m"
CLAIM = 0.03
_READY_S = 120
_PACKAGES = ("libs/sdk", "libs/common", "services/gateway")

console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)


# --- what runs in processes of their own ---


class Uncounted(Counts):
    """A model of which nothing is counted but what is under way."""

    __slots__ = ()

    def __init__(self, windows: Windows, ref: ModelRef) -> None:
        super().__init__(windows, ref)
        self.is_awake = True  # So that it never asks for a window.

    def add(self, kind: int, version: bytes, status: int, seconds: float, user: int | None = None) -> None: ...


class NoWindows(Windows):
    def of(self, ref: ModelRef) -> Counts:
        return Uncounted(self, ref)


def gateway_without_windows() -> None:
    settings = Settings.read()
    telemetry = configure("gateway", settings)
    run_service(build(settings, telemetry, EtcdClient(settings.etcd), NoWindows(time.time)))


def answerer() -> Callable[[Request], None]:
    """A mesh's handler that answers at once, nine times of ten from version 1."""
    blocks = itertools.cycle([JSON + b"x-lepton-version: %d\r\n" % version for version in (*[1] * 9, 2)])
    body = json.dumps({"model_name": MODEL, "outputs": [{"name": "y", "datatype": "FP32", "data": [0.5]}]}).encode()
    return lambda request: request.respond(200, next(blocks), body)


def mesh(port: int) -> None:
    async def serve() -> None:
        await Server(answerer()).start("127.0.0.1", port)
        await asyncio.Event().wait()

    asyncio.run(serve())


# --- measuring ---


@dataclass
class Candidate:
    """A gateway and what was measured of it: requests per second, and CPU microseconds a request."""

    name: str
    url: str
    process: psutil.Process
    requests_per_s: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    errors: int = 0

    def measure(self, body: bytes, seconds: float) -> None:
        self.process.resume()
        load.run(self.url, body, connections=CONNECTIONS, seconds=1)
        before = self.process.cpu_times()
        found = load.run(self.url, body, connections=CONNECTIONS, seconds=seconds)
        after = self.process.cpu_times()
        self.process.suspend()
        spent_s = after.user + after.system - before.user - before.system
        self.cpu_us.append(1e6 * spent_s / found.requests)
        self.requests_per_s.append(found.requests_per_s)
        self.errors += found.errors


@dataclass(frozen=True)
class Cost:
    """How much more CPU a request takes with windows: the median over paired rounds, and its 95 % interval."""

    against: str
    share: float
    low: float
    high: float


def cost(with_windows: Candidate, other: Candidate) -> Cost:
    ratios = [one / two - 1 for one, two in zip(with_windows.cpu_us, other.cpu_us, strict=True)]
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(2000))
    return Cost(other.name, statistics.median(ratios), medians[50], medians[-51])


@contextmanager
def child(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[psutil.Process]:
    process = subprocess.Popen(
        [sys.executable, *arguments], env={**os.environ, **(environment or {})}, stdout=subprocess.DEVNULL
    )
    try:
        yield psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(20)


def wait_ready(url: str) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, b"{}"), timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"{url} did not become ready")


async def prepare(etcd: str, kafka: str) -> None:
    """Kafka has the topics, and etcd the record that rollout would write."""
    await ensure_topics(kafka)
    versions = tuple(Assigned(version=version, sha256="0" * 64, size_bytes=1) for version in (1, 2))
    split = (Share(version=1, percent=90), Share(version=2, percent=10))
    serving = Serving(tenant="default", model=MODEL, generation=1, stable=1, split=split, versions=versions)
    client = EtcdClient(etcd)
    await client.put(serving.key, serving.model_dump_json().encode())
    await client.close()


def servers(stack: ExitStack, folder: Path) -> tuple[str, str]:
    """Where etcd and Kafka are; etcd knows the model."""
    runtime = find_kafka()
    kafka = Kafka(folder / "kafka", runtime) if runtime else MockKafka(folder / "kafka")
    etcd = Etcd(folder / "etcd")
    stack.enter_context(running(kafka, _READY_S))
    stack.enter_context(running(etcd, _READY_S))
    asyncio.run(prepare(etcd.address, kafka.address))
    return etcd.address, kafka.address


def settings_of(etcd: str, kafka: str, port: int, mesh_port: int) -> dict[str, str]:
    """A gateway's environment."""
    return {
        "LEPTON_PORT": str(port),
        "LEPTON_KAFKA": kafka,
        "LEPTON_ETCD": etcd,
        "LEPTON_MESH": f"127.0.0.1:{mesh_port}",
        "LEPTON_ROLLOUT_URL": "http://127.0.0.1:1",
        "LEPTON_KEYLESS_LOOPBACK": "true",
        "LEPTON_LOG_LEVEL": "warning",
    }


def slices(etcd: str, kafka: str, pairs: int, body: bytes) -> gateway_slices.Slices:
    def settings(port: int, mesh_port: int) -> Settings:
        environment = settings_of(etcd, kafka, port, mesh_port)
        return Settings.model_validate(
            {name.removeprefix("LEPTON_").lower(): each for name, each in environment.items()}
        )

    return gateway_slices.measure(pairs, settings, NoWindows(time.time), answerer(), body)


def candidates(stack: ExitStack, etcd: str, kafka: str, against: Path | None) -> list[Candidate]:
    """The gateways, all of them ready and all asleep."""
    mesh_port = free_port()
    stack.enter_context(child("-m", "benchmarks.windows", "--mesh", str(mesh_port)))
    ways: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
        "with windows": (("-m", "lepton_gateway.main"), {}),
        "without": (("-m", "benchmarks.windows", "--gateway-without-windows"), {}),
    }
    if against is not None:
        path = os.pathsep.join(str(against.resolve() / package) for package in _PACKAGES)
        ways["the other checkout"] = (("-m", "lepton_gateway.main"), {"PYTHONPATH": path})
    found = []
    for name, (arguments, environment) in ways.items():
        port = free_port()
        settings = settings_of(etcd, kafka, port, mesh_port)
        process = stack.enter_context(child(*arguments, environment={**settings, **environment}))
        url = f"http://127.0.0.1:{port}/v2/models/{MODEL}/infer"
        wait_ready(url)
        process.suspend()
        found.append(Candidate(name, url, process))
    return found


def run(pairs: int, rounds: int, seconds: float, against: Path | None) -> None:
    tensor = {"name": "x", "shape": [1, 64], "datatype": "FP32", "data": [0.5] * 64}
    body = json.dumps({"inputs": [tensor]}).encode()
    chance = random.Random(0)
    busy = psutil.cpu_percent(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        etcd, kafka = servers(stack, folder)
        sliced = slices(etcd, kafka, pairs, body)
        found = candidates(stack, etcd, kafka, against)
        for _ in track(range(rounds), "measuring", console=console):
            for each in chance.sample(found, len(found)):
                each.measure(body, seconds)
    share = share_of(sliced, found[1])
    costs = [cost(found[0], other) for other in found[1:]]
    show(sliced, share, found, costs, busy)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    document = {
        "machine": report.machine(),
        "generator": load.generator(),
        "other_load_percent": busy,
        "share": share,
        "slices": asdict(sliced),
        "gateways": [{k: v for k, v in vars(each).items() if k not in ("process", "url")} for each in found],
        "whole": [asdict(each) for each in costs],
    }
    (results / "windows.json").write_text(json.dumps(document, indent=2) + "\n")


def share_of(sliced: gateway_slices.Slices, without: Candidate) -> float:
    """The share of its throughput that windows cost a gateway whose event loop is always busy, by the slices."""
    request_us = statistics.median(without.cpu_us)
    with_windows_us = request_us + sliced.request_us
    requests_per_s = (1e6 - sliced.second_us) / with_windows_us
    return 1 - requests_per_s / (1e6 / request_us)


def show(sliced: gateway_slices.Slices, share: float, found: list[Candidate], costs: list[Cost], busy: float) -> None:
    table = Table("gateway", "requests/s", "CPU µs a request", "errors")
    for each in found:
        middle = (statistics.median(each.requests_per_s), statistics.median(each.cpu_us))
        table.add_row(each.name, f"{middle[0]:,.0f}", f"{middle[1]:.1f}", str(each.errors))
    console.print(table)
    console.print(f"{report.machine()}; {busy:.0f} % busy with other things before the start")
    for one in costs:
        console.print(
            f"as processes, windows cost {one.share:+.1%} of a gateway's CPU against {one.against} "
            f"(95 % of resampled medians: {one.low:+.1%} to {one.high:+.1%})"
        )
    console.print(
        f"by {sliced.pairs} pairs of slices, windows cost {sliced.request_us:.2f} µs a request "
        f"({sliced.low_us:.2f} to {sliced.high_us:.2f}) and {sliced.second_us / 1e3:.2f} ms a second: "
        f"{share:.1%} of a gateway's throughput (claimed: at most {CLAIM:.0%})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000, help="of slices")
    parser.add_argument("--rounds", type=int, default=15, help="of the gateways as processes")
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement")
    parser.add_argument("--against", type=Path, help="a checkout of Lepton whose gateway takes part")
    parser.add_argument("--mesh", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--gateway-without-windows", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mesh:
        mesh(options.mesh)
    elif options.gateway_without_windows:
        gateway_without_windows()
    else:
        run(options.pairs, options.rounds, options.seconds, options.against)


if __name__ == "__main__":
    main()
