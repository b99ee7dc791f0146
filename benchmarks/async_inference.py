"""Inference over Kafka: how many requests a second, and what callers over HTTP notice of it.

    python -m benchmarks.async_inference [--requests N]

One platform of one worker, all of it, the producer, the consumer and the callers on this machine. Callers come over
HTTP as a Poisson process that waits for no answer; first alone, then while the requests from Kafka are worked on.
"""

import argparse
import asyncio
import json
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import uvloop
from confluent_kafka import Consumer, Producer
from lepton_common.http11_client import Call, Upstream, UpstreamError
from rich.console import Console
from rich.progress import Progress

from benchmarks import models, report
from benchmarks.lepton_platform import MODEL, running

SIZES = (64, 64, 8)
CALLERS_PER_S = 100
CALM_S = 15.0
BACKLOG = 2000

console = Console(width=140, highlight=False)


class Asked(Call):
    """One request of a caller over HTTP."""

    __slots__ = ("_began", "_latencies_ms")

    def __init__(self, head: bytes, body: bytes, latencies_ms: list[float]) -> None:
        super().__init__(head, body, asyncio.get_running_loop().time() + 30)
        self._began = time.perf_counter()
        self._latencies_ms = latencies_ms

    def answered(self, status: int, headers: dict[bytes, bytes], body: bytes) -> None:
        assert status == 200, body[:200]
        self._latencies_ms.append((time.perf_counter() - self._began) * 1e3)

    def failed(self, error: UpstreamError) -> None:
        raise error


class Callers:
    """Asks over HTTP until it is closed, in a thread of its own."""

    def __init__(self, port: int, body: bytes) -> None:
        self._port, self._body = port, body
        self._head = f"POST /v2/models/{MODEL}/infer HTTP/1.1\r\nhost: localhost\r\n".encode()
        self.latencies_ms: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: uvloop.run(self._call()))
        self._thread.start()

    def close(self) -> list[float]:
        self._over.set()
        self._thread.join()
        return self.latencies_ms

    async def _call(self) -> None:
        upstream, chance = Upstream("127.0.0.1", self._port), random.Random(1)
        due = time.perf_counter()
        while not self._over.is_set():
            due += chance.expovariate(CALLERS_PER_S)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            upstream.send(Asked(self._head, self._body, self.latencies_ms))
        await asyncio.sleep(1)
        await upstream.close()


def work_off(kafka: str, key: str, count: int, body: bytes) -> float:
    """Seconds from the first request written to the last outcome read. There are always some that wait, and never so
    many that writing them is what is measured."""
    run = uuid4().hex
    consumer = Consumer({"bootstrap.servers": kafka, "group.id": run, "auto.offset.reset": "latest"})
    consumer.subscribe(["lepton.inference.results"])
    while not consumer.assignment():
        consumer.poll(0.1)
    consumer.poll(1.0)
    producer = Producer({"bootstrap.servers": kafka, "linger.ms": 5})
    began, written, found = time.perf_counter(), 0, 0
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("outcomes", total=count)
        while found < count:
            for number in range(written, min(count, found + BACKLOG)):
                headers: dict[str, str | bytes | None] = {"id": f"{run}-{number}", "authorization": f"Bearer {key}"}
                producer.produce("lepton.inference.requests", body, headers=headers)
                written += 1
            producer.poll(0)
            for message in consumer.consume(200, 0.05):
                headers_of: Any = message.headers()
                told = dict(headers_of)
                assert told["lepton-status"] == b"200", message.value()
                found += told["ce_correlationid"].startswith(run.encode())
            progress.update(bar, completed=found)
    consumer.close()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=50_000)
    count = parser.parse_args().requests
    tensor = {"name": "x", "shape": [1, SIZES[0]], "datatype": "FP32", "data": [0.5] * SIZES[0]}
    body = json.dumps({"inputs": [tensor]})
    asynchronous = json.dumps({"model": MODEL, "inputs": [tensor]}).encode()
    with tempfile.TemporaryDirectory() as folder:
        model = models.mlp(Path(folder, "model.onnx"), SIZES)
        with running(Path(folder, "home"), model) as platform:
            work_off(platform.kafka, platform.key, count // 10, asynchronous)
            callers = Callers(platform.ports["front"], body.encode())
            time.sleep(CALM_S)
            calm = np.percentile(callers.close(), [50, 99])
            callers = Callers(platform.ports["front"], body.encode())
            took_s = work_off(platform.kafka, platform.key, count, asynchronous)
            beside = np.percentile(callers.close(), [50, 99])
            alone_s = work_off(platform.kafka, platform.key, count, asynchronous)
    console.print(report.machine())
    console.print(
        f"over Kafka, alone: {count / alone_s:,.0f} requests/s; beside callers: {count / took_s:,.0f} requests/s"
    )
    console.print(
        f"{CALLERS_PER_S} callers/s over HTTP, p50 and p99: calm {calm[0]:.1f} and {calm[1]:.1f} ms, beside it "
        f"{beside[0]:.1f} and {beside[1]:.1f} ms ({beside[0] / calm[0]:.1f} and {beside[1] / calm[1]:.1f} times)"
    )


if __name__ == "__main__":
    main()
