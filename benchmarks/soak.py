"""Whether anything grows: every way in under steady load for a while, and what each process holds meanwhile.

    python -m benchmarks.soak [--minutes M]

Memory is what the process alone holds (USS). The first fifth of the time is warming up; of the rest the first and the
last third are compared. A process grows when it holds more memory at the end by more than a tenth and 8 MiB beyond what
one second to the next differs by, or more than two descriptors, or tasks, at its least: connections that are kept alive
come and go with the load.
"""

import argparse
import json
import re
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev

import numpy as np
from confluent_kafka import Producer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tritonclient.grpc import InferenceServerClient, InferInput

from benchmarks import models, report
from benchmarks.async_inference import SIZES, Callers
from benchmarks.lepton_platform import MODEL, Platform, running

EVERY_S = 2.0
PER_S = 50  # over gRPC and over Kafka, each
PARTS = ("gateway", "worker-1", "registry", "rollout", "monitor")
MIB = 1 << 20

console = Console(width=140, highlight=False)


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds at one time."""

    memory_mib: float
    descriptors: int
    tasks: int


def held(platform: Platform, part: str) -> Held:
    process = platform.process(part)
    port = platform.ports.get(f"{part}-admin", platform.ports[part])
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        tasks = re.search(r"^lepton_\w+_tasks (\S+)", answer.read().decode(), re.MULTILINE)
    return Held(process.memory_full_info().uss / MIB, process.num_fds(), int(float(tasks[1])) if tasks else 0)


def by_grpc(address: str, over: threading.Event) -> None:
    rows = np.full((1, SIZES[0]), 0.5, np.float32)
    tensor = InferInput("x", list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows)
    with InferenceServerClient(address) as client:
        while not over.wait(1 / PER_S):
            client.infer(MODEL, [tensor])


def by_kafka(servers: str, key: str, body: bytes, over: threading.Event) -> None:
    producer = Producer({"bootstrap.servers": servers})
    while not over.wait(1 / PER_S):
        producer.produce("lepton.inference.requests", body, headers={"authorization": f"Bearer {key}"})
        producer.poll(0)
    producer.flush(10)


def watch(platform: Platform, seconds: float) -> dict[str, list[Held]]:
    """What every part held, under load from all sides."""
    tensor = {"name": "x", "shape": [1, SIZES[0]], "datatype": "FP32", "data": [0.5] * SIZES[0]}
    over = threading.Event()
    front = f"127.0.0.1:{platform.ports['front']}"
    asynchronous = json.dumps({"model": MODEL, "inputs": [tensor]}).encode()
    others = [
        threading.Thread(target=by_grpc, args=(front, over)),
        threading.Thread(target=by_kafka, args=(platform.kafka, platform.key, asynchronous, over)),
    ]
    callers = Callers(platform.ports["front"], json.dumps({"inputs": [tensor]}).encode())
    for each in others:
        each.start()
    seen: dict[str, list[Held]] = {part: [] for part in PARTS}
    try:
        for _ in track(range(int(seconds / EVERY_S)), "soaking", console=console):
            time.sleep(EVERY_S)
            for part in PARTS:
                seen[part].append(held(platform, part))
    finally:
        over.set()
        for each in others:
            each.join()
        answered = len(callers.close())
    console.print(f"{answered:,} answers over HTTP, and {PER_S} a second over gRPC and over Kafka each")
    return seen


def growth(seen: list[Held]) -> list[tuple[str, float, float, bool]]:
    """(what, first third, last third, whether it grew)."""
    warm = seen[len(seen) // 5 :]
    third = len(warm) // 3
    found = []
    for what in ("memory_mib", "descriptors", "tasks"):
        first, last = ([float(getattr(each, what)) for each in part] for part in (warm[:third], warm[-third:]))
        if what == "memory_mib":
            grew = mean(last) - mean(first) > max(8.0, 0.1 * mean(first)) + pstdev(first)
        else:
            grew = min(last) - min(first) > 2
        found.append((what, mean(first), mean(last), grew))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory() as folder:
        model = models.mlp(Path(folder, "model.onnx"), SIZES)
        with running(Path(folder, "home"), model) as platform:
            seen = watch(platform, 60 * minutes)
    table = Table("process", "memory MiB", "descriptors", "tasks", box=None)
    grew = False
    for part, every in seen.items():
        found = growth(every)
        grew |= any(each[3] for each in found)
        table.add_row(part, *(f"{first:.1f} → {last:.1f}{' GREW' if more else ''}" for _, first, last, more in found))
    console.print(report.machine())
    console.print(table)
    sys.exit(1 if grew else 0)


if __name__ == "__main__":
    main()
