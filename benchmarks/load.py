"""Closed-loop load on one URL: wrk when it is installed, else a small asyncio client. On gRPC: h2load."""

import asyncio
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import grpc

_MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
_WRK_SCRIPT = """
wrk.method = "POST"
wrk.body = {body}
wrk.headers["Content-Type"] = "application/json"
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("RESULT %d %d %f %f %d\\n", summary.requests, summary.duration, latency:percentile(50),
    latency:percentile(99), e.connect + e.read + e.write + e.status + e.timeout))
end
"""


@dataclass(frozen=True)
class Load:
    """What came back: requests per second, latencies in milliseconds, answers that were no success."""

    requests: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    errors: int


def generator() -> str:
    """The name of the load generator that `run` uses here."""
    return "wrk" if shutil.which("wrk") else "bundled client"


def run(url: str, body: bytes, *, connections: int, seconds: float) -> Load:
    """POST `body` to `url` over `connections` kept-alive connections, each with one request in flight."""
    if shutil.which("wrk"):
        return _run_wrk(url, body, connections, seconds)
    return asyncio.run(_run_bundled(url, body, connections, seconds))


def _run_wrk(url: str, body: bytes, connections: int, seconds: float) -> Load:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "post.lua")
        script.write_text(_WRK_SCRIPT.format(body=json.dumps(body.decode())))
        command = ["wrk", "-t1", f"-c{connections}", f"-d{round(seconds)}s", "-s", str(script), url]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result = re.search(r"RESULT (\d+) (\d+) ([\d.]+) ([\d.]+) (\d+)", output)
    if result is None:
        raise RuntimeError(f"wrk printed no result:\n{output}")
    requests, micros, p50, p99, errors = (float(each) for each in result.groups())
    return Load(int(requests), requests / (micros / 1e6), p50 / 1e3, p99 / 1e3, int(errors))


def run_h2load(
    url: str, body: bytes, headers: Sequence[str] = (), *, connections: int, seconds: float, http1: bool = False
) -> Load:
    """As `run`, over HTTP/2 unless `http1`. Needs h2load, which costs more CPU a request than wrk."""
    with tempfile.TemporaryDirectory() as folder:
        data, log = Path(folder, "body"), Path(folder, "log")
        data.write_bytes(body)
        command: list[str | Path] = ["h2load", "-t1", f"-c{connections}", "-m1", f"-D{round(seconds)}", "-d", data]
        command += [part for each in headers for part in ("-H", each)] + ["--h1"] * http1
        subprocess.run([*command, f"--log-file={log}", url], check=True, capture_output=True)
        # start in Unix time, status, time taken; both in microseconds
        calls = [tuple(map(int, line.split()[:3])) for line in log.read_text().splitlines()]
    took_s = (max(start + took for start, _, took in calls) - min(start for start, _, _ in calls)) / 1e6
    latencies_ms = sorted(took / 1e3 for _, _, took in calls)
    at = [latencies_ms[int(len(calls) * share)] for share in (0.5, 0.99)]
    return Load(len(calls), len(calls) / took_s, at[0], at[1], sum(status != 200 for _, status, _ in calls))


def run_grpc(address: str, message: bytes, *, connections: int, seconds: float) -> Load:
    """Call ModelInfer with `message` over `connections` connections, each with one call in flight. Needs h2load.

    h2load reads no trailers, so one call is made and checked before. Raises grpc.RpcError when it fails.
    """
    with grpc.insecure_channel(address) as channel:
        channel.unary_unary(_MODEL_INFER)(message, timeout=10)  # type: ignore[arg-type] # of any type without a serializer
    body = b"\0" + len(message).to_bytes(4, "big") + message
    headers = ("content-type: application/grpc", "te: trailers")
    return run_h2load(f"http://{address}{_MODEL_INFER}", body, headers, connections=connections, seconds=seconds)


async def _run_bundled(url: str, body: bytes, connections: int, seconds: float) -> Load:
    target = urlsplit(url)
    head = f"POST {target.path} HTTP/1.1\r\nHost: {target.netloc}\r\nContent-Length: {len(body)}\r\n\r\n"
    request = head.encode() + body
    latencies: list[float] = []
    errors = 0
    end = time.perf_counter() + seconds

    async def caller() -> None:
        nonlocal errors
        reader, writer = await asyncio.open_connection(target.hostname, target.port)
        while (start := time.perf_counter()) < end:
            writer.write(request)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", answer)
            await reader.readexactly(int(length[1]) if length else 0)
            latencies.append(time.perf_counter() - start)
            errors += not answer.startswith(b"HTTP/1.1 200")
        writer.close()

    start = time.perf_counter()
    async with asyncio.TaskGroup() as callers:
        for _ in range(connections):
            callers.create_task(caller())
    took = time.perf_counter() - start
    latencies.sort()
    at = [1e3 * latencies[int(len(latencies) * share)] for share in (0.5, 0.99)]
    return Load(len(latencies), len(latencies) / took, at[0], at[1], errors)
