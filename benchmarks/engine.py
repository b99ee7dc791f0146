"""onnxruntime by itself, and Lepton's batcher around it, in this process: what serving is measured against."""

import asyncio
import time
from pathlib import Path

import numpy as np
from lepton_common.errors import LeptonError
from lepton_common.events import Batching
from lepton_common.tensors import Array
from lepton_worker.batcher import Batcher
from lepton_worker.engine import Engine
from lepton_worker.usage import Usage

ROWS = 64  # of a full batch


def loop(model: Path, columns: int, seconds: float) -> tuple[float, float, float]:
    """One caller, one row a run, one thread: runs per second, p50 and p99 in milliseconds."""
    engine = Engine(model, intra_op_threads=1)
    row = np.zeros((1, columns), np.float32)
    times = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        engine.run({"x": row})
        times.append(time.perf_counter() - start)
    p50, p99 = np.percentile(times, (50, 99)) * 1e3
    return len(times) / sum(times), float(p50), float(p99)


def batched_rows_per_s(model: Path, columns: int, seconds: float) -> float:
    """Rows per second of full batches, already assembled, in one thread: the most there is to get."""
    engine = Engine(model, intra_op_threads=1)
    rows = np.zeros((ROWS, columns), np.float32)
    runs, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        engine.run({"x": rows})
        runs += 1
    return runs * ROWS / (time.perf_counter() - start)


def batcher_rows_per_s(model: Path, columns: int, seconds: float) -> float:
    """Rows per second through the batcher in one slot, from callers that send one row each, as soon as they can."""
    return asyncio.run(_batcher_rows_per_s(model, columns, seconds))


async def _batcher_rows_per_s(model: Path, columns: int, seconds: float) -> float:
    engine = Engine(model, intra_op_threads=1)
    batcher = Batcher(engine.run, 1, Batching(max_rows=ROWS), Usage().of("acme"), mergeable=True)
    row = np.zeros((1, columns), np.float32)
    finished, end = 0, time.monotonic() + seconds
    over = asyncio.Event()

    def done(outcome: dict[str, Array] | LeptonError, waited_s: float) -> None:
        nonlocal finished
        if isinstance(outcome, LeptonError):
            raise outcome
        finished += 1
        if time.monotonic() < end:
            batcher.submit({"x": row}, end + 60, done)
        else:
            over.set()

    start = time.perf_counter()
    for _ in range(2 * ROWS):  # One batch runs while the next one queues.
        batcher.submit({"x": row}, end + 60, done)
    await over.wait()
    rate = finished / (time.perf_counter() - start)
    await batcher.close(10)
    return rate
