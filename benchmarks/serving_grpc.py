"""gRPC beside HTTP, and beside MLServer's gRPC: the same model, 32 connections with one call in flight each.

    python -m benchmarks.serving_grpc [--rounds N] [--seconds S]

Medians of rounds in which every candidate is measured once, one after the other, with a row of 64 floats, then 1,024.
HTTP carries them as JSON, gRPC as a raw tensor, which is how their clients send them. The load generator (h2load, for
both) runs on the same machine.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tritonclient.grpc import service_pb2

from benchmarks import load, models, peers, report
from benchmarks.lepton_platform import MODEL, running
from benchmarks.serving import CONNECTIONS, SMALL

WIDE = (1024, 128, 128, 10)

console = Console(width=140, highlight=False)


@dataclass
class Candidate:
    """One way in. `processes` are all that work for it."""

    name: str
    run: Callable[[float], load.Load]
    processes: list[psutil.Process]
    seen: list[load.Load] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)  # a request

    def measure(self, seconds: float) -> None:
        self.run(1)
        before = self._cpu_s()
        seen = self.run(seconds)
        self.cpu_us.append((self._cpu_s() - before) / seen.requests * 1e6)
        self.seen.append(seen)

    def rate(self) -> float:
        return statistics.median(each.requests_per_s for each in self.seen)

    def _cpu_s(self) -> float:
        return sum(sum(each.cpu_times()[:2]) for each in self.processes)


def message(width: int) -> bytes:
    """A ModelInferRequest with one row."""
    request = service_pb2.ModelInferRequest(model_name=MODEL)
    request.inputs.add(name="x", datatype="FP32", shape=[1, width])
    request.raw_input_contents.append(np.random.default_rng(0).random(width, np.float32).tobytes())
    return bytes(request.SerializeToString())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    options = parser.parse_args()
    console.print(report.machine())
    for sizes in (SMALL, WIDE):
        show(f"{sizes[0]:,} floats", measured(sizes, options.rounds, options.seconds))


def measured(sizes: tuple[int, ...], rounds: int, seconds: float) -> list[Candidate]:
    tensor = {"name": "x", "shape": [1, sizes[0]], "datatype": "FP32", "data": [0.123456] * sizes[0]}
    body, request = json.dumps({"inputs": [tensor]}).encode(), message(sizes[0])
    http = partial(
        load.run_h2load, body=body, headers=["content-type: application/json"], connections=CONNECTIONS, http1=True
    )
    grpc = partial(load.run_grpc, message=request, connections=CONNECTIONS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = models.mlp(folder / "model.onnx", sizes)
        mlserver = peers.mlserver(model, folder)
        mlserver.pause()
        try:
            with running(folder / "home", model) as platform:
                parts = [platform.process(each) for each in ("gateway", "envoy", "worker-1")]
                near, front = (f"127.0.0.1:{platform.ports[each]}" for each in ("gateway-grpc", "front"))
                candidates = [
                    Candidate("Lepton, HTTP", lambda s: http(platform.infer_url("gateway"), seconds=s), parts),
                    Candidate("Lepton, gRPC", lambda s: grpc(near, seconds=s), parts),
                    Candidate("Lepton, gRPC through the front Envoy", lambda s: grpc(front, seconds=s), parts),
                    Candidate("MLServer, gRPC", lambda s: grpc(mlserver.grpc, seconds=s), mlserver.processes()),
                ]
                for _ in track(range(rounds), "measuring", console=console):
                    for each in candidates[:3]:
                        each.measure(seconds)
                    mlserver.resume()
                    candidates[3].measure(seconds)
                    mlserver.pause()
        finally:
            mlserver.close()
    return candidates


def show(title: str, candidates: list[Candidate]) -> None:
    table = Table(title, "requests/s", "of HTTP", "of MLServer", "p50 ms", "p99 ms", "CPU us", "errors", box=None)
    for each in candidates:
        middle = [statistics.median(values) for values in zip(*((s.p50_ms, s.p99_ms) for s in each.seen), strict=True)]
        table.add_row(
            each.name,
            f"{each.rate():,.0f}",
            f"{each.rate() / candidates[0].rate():.2f}",
            f"{each.rate() / candidates[-1].rate():.1f}",
            *(f"{value:.2f}" for value in middle),
            f"{statistics.median(each.cpu_us):.0f}",
            f"{sum(s.errors for s in each.seen)}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
