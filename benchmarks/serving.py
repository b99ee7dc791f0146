"""How fast Lepton serves, beside onnxruntime in a loop, MLServer, LitServe and Triton: one model, one client, one run.

    make bench        # or: python -m benchmarks.serving [--rounds N] [--seconds S]

Everything runs on this machine and shares its cores with the load generator, so compare the ratios, not the absolutes.
The candidates take turns within each round; the table has the medians over the rounds. Peers that are not being
measured are stopped (SIGSTOP). Writes `benchmarks/results/serving.{json,png}`.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import track

from benchmarks import engine, hotspots, load, models, peers, report
from benchmarks.lepton_platform import Platform, running

CONNECTIONS = 32
SMALL = (64, 128, 128, 10)
LARGE = (256, 1024, 1024, 1024, 64)

# Wide enough for the table when the output is not a terminal.
console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)


@dataclass
class Candidate:
    """One way to serve the model. `processes` are all that work for it, by name; their CPU time is counted."""

    name: str
    url: str
    processes: Callable[[], dict[str, psutil.Process]]
    pause: Callable[[], None] = lambda: None
    resume: Callable[[], None] = lambda: None
    busy: list[load.Load] = field(default_factory=list)
    single: list[load.Load] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)  # per request, all processes together

    def measure(self, body: bytes, seconds: float) -> None:
        self.resume()
        load.run(self.url, body, connections=CONNECTIONS, seconds=1)
        before = _cpu_s(self.processes())
        busy = load.run(self.url, body, connections=CONNECTIONS, seconds=seconds)
        self.cpu_s.append((_cpu_s(self.processes()) - before) / busy.requests)
        self.busy.append(busy)
        self.single.append(load.run(self.url, body, connections=1, seconds=max(1, seconds / 2)))
        self.pause()

    def result(self) -> report.Result:
        middle = statistics.median
        return report.Result(
            self.name,
            requests_per_s=middle(each.requests_per_s for each in self.busy),
            p50_ms=middle(each.p50_ms for each in self.busy),
            p99_ms=middle(each.p99_ms for each in self.busy),
            cpu_us=1e6 * middle(self.cpu_s),
            single_p50_ms=middle(each.p50_ms for each in self.single),
            errors=sum(each.errors for each in self.busy + self.single),
        )


def _cpu_s(processes: dict[str, psutil.Process]) -> float:
    return sum(times.user + times.system for times in (each.cpu_times() for each in processes.values()))


def lepton_candidates(platform: Platform) -> list[Candidate]:
    """The worker alone, then with what stands before it, one thing after the other."""
    worker, gateway, envoy = (platform.process(name) for name in ("worker-1", "gateway", "envoy"))
    full = {"gateway": gateway, "envoy": envoy, "worker": worker}
    return [
        Candidate("Lepton: worker", platform.infer_url("worker-1"), lambda: {"worker": worker}),
        Candidate(
            "Lepton: gateway → worker",
            platform.infer_url("direct"),
            lambda: {"gateway": platform.direct, "worker": worker},
        ),
        Candidate("Lepton: gateway → Envoy → worker", platform.infer_url("gateway"), lambda: full),
        Candidate("Lepton: front Envoy and all that", platform.infer_url("front"), lambda: full),
    ]


def peer_candidate(server: peers.Server) -> Candidate:
    server.pause()
    return Candidate(
        server.name,
        server.url,
        lambda: {f"{number}": process for number, process in enumerate(server.processes())},
        server.pause,
        server.resume,
    )


def limits(candidate: Candidate, body: bytes, seconds: float) -> report.Limits:
    """How much of a core each process of the candidate takes under load, and where our Python spends its time."""
    processes = candidate.processes()
    pids = {name: process.pid for name, process in processes.items() if name in ("gateway", "worker")}
    before = {name: _cpu_s({name: process}) for name, process in processes.items()}
    start = time.perf_counter()
    load.run(candidate.url, body, connections=CONNECTIONS, seconds=seconds)
    took = time.perf_counter() - start
    cores = {name: (_cpu_s({name: process}) - before[name]) / took for name, process in processes.items()}
    with hotspots.sampled(pids) as hot:
        load.run(candidate.url, body, connections=CONNECTIONS, seconds=hotspots.SECONDS + 1)
    return report.Limits(candidate.name, cores, hot)


def run(rounds: int, seconds: float) -> None:
    values = random.Random(0)
    data = [round(values.random(), 6) for _ in range(SMALL[0])]
    tensor = {"name": "x", "shape": [1, SMALL[0]], "datatype": "FP32", "data": data}
    body = json.dumps({"inputs": [tensor]}).encode()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        small = models.mlp(folder / "small.onnx", SMALL)
        large = models.mlp(folder / "large.onnx", LARGE)
        platform = stack.enter_context(running(folder / "home", small, direct=True))
        candidates = lepton_candidates(platform)
        for start in (peers.mlserver, peers.mlserver_batching, peers.litserve, peers.triton):
            server = start(small, folder)
            stack.callback(server.close)
            candidates.append(peer_candidate(server))
        loops, batching = [], []
        for _ in track(range(rounds), "measuring", console=console):
            loops.append(engine.loop(small, SMALL[0], 1))
            batching.append(
                (engine.batched_rows_per_s(large, LARGE[0], 2), engine.batcher_rows_per_s(large, LARGE[0], 2))
            )
            for candidate in candidates:
                candidate.measure(body, seconds)
        found = report.Report(
            machine=report.machine(),
            generator=load.generator(),
            loop_p50_ms=statistics.median(p50 for _, p50, _ in loops),
            loop_p99_ms=statistics.median(p99 for _, _, p99 in loops),
            loop_per_s=statistics.median(rate for rate, _, _ in loops),
            batched_rows_per_s=statistics.median(bare for bare, _ in batching),
            batcher_rows_per_s=statistics.median(ours for _, ours in batching),
            results=[candidate.result() for candidate in candidates],
            limits=[limits(candidate, body, seconds) for candidate in candidates[:3]],
        )
    found.show(console)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "serving.json").write_text(json.dumps(asdict(found), indent=2) + "\n")
    found.plot(results / "serving.png")
    console.print(f"written: {results.name}/serving.json, {results.name}/serving.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    options = parser.parse_args()
    run(options.rounds, options.seconds)


if __name__ == "__main__":
    main()
