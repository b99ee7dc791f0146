"""What becomes of callers when too many come: three times the capacity, and a tenant that floods.

    python -m benchmarks.overload [--seconds S]

One platform of one worker, all of it and the load generator on this machine. The capacity is what a closed loop gets;
then requests come as a Poisson process that waits for no answer. Prints what was answered in time, how long that took,
how soon the others were refused, and the gateway's memory.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lepton
import psutil
import uvloop
from lepton_common.http11_client import Call, Upstream, UpstreamError
from rich.console import Console
from rich.table import Table

from benchmarks import models, report
from benchmarks.lepton_platform import MODEL, Platform, running

# Large enough for the worker to be what is short, not the gateway or the generator.
SIZES = (256, 4096, 4096, 4096, 64)
ROWS = 4
CALLERS = 32
WARM_UP_S = 5.0
ROUNDS = 3
_LONG_ENOUGH = 10

console = Console(width=140, highlight=False)


@dataclass
class Told:
    """What became of requests, latencies in milliseconds."""

    offered: int = 0
    answered_ms: list[float] = field(default_factory=list)
    late: int = 0
    refused_ms: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)

    @property
    def in_time(self) -> int:
        return len(self.answered_ms) - self.late

    def add(self, other: "Told") -> None:
        """What another measurement of the same told."""
        self.offered += other.offered
        self.answered_ms += other.answered_ms
        self.late += other.late
        self.refused_ms += other.refused_ms
        for status, count in other.statuses.items():
            self.statuses[status] = self.statuses.get(status, 0) + count


@dataclass(frozen=True)
class Tenant:
    """Who asks, for a model of its own."""

    head: bytes
    body: bytes

    @classmethod
    def of(cls, key: str, timeout_ms: int) -> "Tenant":
        tensor = {"name": "x", "shape": [ROWS, SIZES[0]], "datatype": "FP32", "data": [0.5] * (ROWS * SIZES[0])}
        lines = [
            f"POST /v2/models/{MODEL}/infer HTTP/1.1",
            "host: benchmark",
            f"authorization: Bearer {key}",
            f"x-request-timeout-ms: {timeout_ms}",
        ]
        return cls("".join(f"{each}\r\n" for each in lines).encode(), json.dumps({"inputs": [tensor]}).encode())


class Asked(Call):
    """One request; `over` is called when there is an answer, or none to come."""

    __slots__ = ("_began", "_deadline_ms", "_over", "_told")

    def __init__(self, tenant: Tenant, timeout_ms: int, told: Told, over: asyncio.Event | None = None) -> None:
        super().__init__(tenant.head, tenant.body, asyncio.get_running_loop().time() + 60)
        self._began = time.perf_counter()
        self._deadline_ms = timeout_ms
        self._told = told
        self._over = over
        told.offered += 1

    def answered(self, status: int, headers: dict[bytes, bytes], body: bytes) -> None:
        told, took_ms = self._told, 1e3 * (time.perf_counter() - self._began)
        told.statuses[status] = told.statuses.get(status, 0) + 1
        if status == 200:
            told.answered_ms.append(took_ms)
            told.late += took_ms > self._deadline_ms
        else:
            told.refused_ms.append(took_ms)
        if self._over is not None:
            self._over.set()

    def failed(self, error: UpstreamError) -> None:
        self.answered(0, {}, b"")


@dataclass(frozen=True)
class Load:
    """One tenant's share of a measurement."""

    tenant: Tenant
    per_s: float


class Generator:
    """Sends to the gateway. `timeout_ms` is every request's deadline."""

    def __init__(self, port: int, timeout_ms: int) -> None:
        self.upstream = Upstream("127.0.0.1", port)
        self._timeout_ms = timeout_ms
        self._chance = random.Random(0)

    async def closed(self, tenant: Tenant, seconds: float) -> Told:
        """So many callers, each of whom waits for the answer."""
        told, end = Told(), time.perf_counter() + seconds

        async def caller() -> None:
            while time.perf_counter() < end:
                over = asyncio.Event()
                self.upstream.send(Asked(tenant, self._timeout_ms, told, over))
                await over.wait()

        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        return told

    async def open(self, seconds: float, *loads: Load) -> Sequence[Told]:
        """Each tenant at its rate, whatever becomes of the requests. The first seconds do not count."""
        return await asyncio.gather(*(self._arrivals(load, seconds) for load in loads))

    async def _arrivals(self, load: Load, seconds: float) -> Told:
        began = due = time.perf_counter()
        warm_up, told = Told(), Told()
        while due < began + WARM_UP_S + seconds:
            due += self._chance.expovariate(load.per_s)
            # One that is due is sent, however late this loop is: else the load would wait for the answers after all.
            if (pause := due - time.perf_counter()) > 0:
                await asyncio.sleep(pause)
            into = warm_up if due < began + WARM_UP_S else told
            self.upstream.send(Asked(load.tenant, self._timeout_ms, into))
        await asyncio.sleep(2)
        return told


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(len(values) * share)] if values else float("nan")


def show(title: str, seconds: float, rows: dict[str, Told]) -> None:
    table = Table(
        *(
            "",
            "offered/s",
            "in time/s",
            "p50 ms",
            "p99 ms",
            "late",
            "refused/s",
            "refusal p50 ms",
            "p99 ms",
            "statuses",
        ),
        title=title,
    )
    for name, told in rows.items():
        table.add_row(
            name,
            f"{told.offered / seconds:,.0f}",
            f"{told.in_time / seconds:,.0f}",
            *(f"{quantile(told.answered_ms, share):.1f}" for share in (0.5, 0.99)),
            f"{told.late / max(1, len(told.answered_ms)):.2%}",
            f"{len(told.refused_ms) / seconds:,.0f}",
            *(f"{quantile(told.refused_ms, share):.1f}" for share in (0.5, 0.99)),
            str(told.statuses),
        )
    console.print(table)


def second_tenant(platform: Platform, model: Path) -> str:
    """The key of a tenant with a model of its own."""
    with lepton.Client(url=platform.url, key=platform.key) as client:
        client.create_tenant("other")
        key = client.create_key("benchmark", scopes=["deploy", "infer"], tenant="other").secret
    with lepton.Client(url=platform.url, key=key) as client:
        client.push(model, name=MODEL)
    return key


async def measure(platform: Platform, other_key: str, seconds: float) -> None:
    port, gateway = platform.ports["gateway"], platform.process("gateway")
    probe = Generator(port, 30_000)
    mine = Tenant.of(platform.key, 30_000)
    await probe.closed(mine, 3)
    calm = await probe.closed(mine, _LONG_ENOUGH)
    await probe.upstream.close()
    capacity = len(calm.answered_ms) / _LONG_ENOUGH
    timeout_ms = max(250, round(5 * quantile(calm.answered_ms, 0.5)))
    console.print(f"capacity {capacity:,.0f} requests/s of {ROWS} rows; deadline {timeout_ms} ms")

    generator = Generator(port, timeout_ms)
    mine, other = Tenant.of(platform.key, timeout_ms), Tenant.of(other_key, timeout_ms)
    before = gateway.memory_info().rss
    (first,) = await generator.open(seconds / 2, Load(mine, 3 * capacity))
    middle = gateway.memory_info().rss
    (second,) = await generator.open(seconds / 2, Load(mine, 3 * capacity))
    after = gateway.memory_info().rss
    rows = {"first half": first, "second half": second}
    show("three times the capacity", seconds / 2, rows)
    goodput = sum(each.in_time for each in rows.values()) / seconds
    console.print(
        f"goodput {goodput / capacity:.0%} of the capacity; the gateway's memory (RSS) "
        f"{before / 1e6:.0f} MB before, {middle / 1e6:.0f} after half, {after / 1e6:.0f} at the end"
    )

    polite, usual = Load(mine, 0.1 * capacity), Load(other, 0.3 * capacity)
    flood = Load(other, 10 * usual.per_s)
    alone, calm_own, calm_other, own, others = (Told() for _ in range(5))
    for _ in range(ROUNDS):  # in turns: the machine's speed is not the same for long
        for loads, into in (
            ((polite,), (alone,)),
            ((polite, usual), (calm_own, calm_other)),
            ((polite, flood), (own, others)),
        ):
            for told, total in zip(await generator.open(seconds / 3 / ROUNDS, *loads), into, strict=True):
                total.add(told)
    rows = {
        "polite, alone": alone,
        "polite, beside the other": calm_own,
        "the other": calm_other,
        "polite, beside the flood": own,
        "the flood": others,
    }
    show("two tenants, one of them ten times its usual", seconds / 3, rows)
    p99 = [quantile(each.answered_ms, 0.99) for each in (alone, calm_own, own)]
    console.print(
        f"the flood moves the polite tenant's p99 by {p99[2] / p99[1] - 1:+.0%}; "
        f"alone on the platform it is {p99[0]:.1f} ms, {p99[2] / p99[0] - 1:+.0%}"
    )
    await generator.upstream.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of the overload, and of the tenants together")
    options = parser.parse_args()
    console.print(f"{report.machine()}; {psutil.cpu_percent(1):.0f} % busy with other things before the start")
    with tempfile.TemporaryDirectory() as folder:
        model = models.mlp(Path(folder, "model.onnx"), SIZES)
        with running(Path(folder, "home"), model) as platform:
            other_key = second_tenant(platform, model)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(measure(platform, other_key, options.seconds))


if __name__ == "__main__":
    main()
