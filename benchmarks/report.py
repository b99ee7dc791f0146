"""The serving benchmark's result as a table for people, and as a plot."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Result:
    """Medians over the rounds. `cpu_us`: CPU microseconds a request of all processes of the candidate together."""

    name: str
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    single_p50_ms: float
    errors: int


@dataclass(frozen=True)
class Limits:
    """Cores each process took under load (1.0 is a whole one), and our processes' busiest functions."""

    name: str
    cores: dict[str, float]
    hot: dict[str, list[tuple[str, float]]]


def machine() -> str:
    """The processor and how many of its cores there are."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    widest = next((name for name in ("amx_tile", "avx512f", "avx2") if name in flags), "no AVX2")
    return f"{os.cpu_count()} cores of {model} ({widest}), Python {platform.python_version()}"


@dataclass(frozen=True)
class Report:
    machine: str
    generator: str
    loop_per_s: float
    loop_p50_ms: float
    loop_p99_ms: float
    batched_rows_per_s: float
    batcher_rows_per_s: float
    results: list[Result]
    limits: list[Limits]

    def show(self, console: Console) -> None:
        console.print(f"\n{self.machine}; 64 floats of JSON, 32 connections, load by {self.generator}")
        mlserver = max(each.requests_per_s for each in self.results if each.name.startswith("MLServer"))
        triton = max(each.requests_per_s for each in self.results if "Triton" in each.name)
        table = Table("", "req/s", "p50 ms", "p99 ms", "CPU µs/req", "1 caller p50", "/ MLServer", "/ Triton", "errors")
        for column in table.columns[1:]:
            column.justify = "right"
        rate, p50 = f"{self.loop_per_s:,.0f}", f"{self.loop_p50_ms:.3f}"
        table.add_row("onnxruntime in a loop", rate, p50, f"{self.loop_p99_ms:.3f}", "", p50, "", "", "")
        for each in self.results:
            table.add_row(
                each.name,
                f"{each.requests_per_s:,.0f}",
                f"{each.p50_ms:.2f}",
                f"{each.p99_ms:.2f}",
                f"{each.cpu_us:.0f}",
                f"{each.single_p50_ms:.3f}",
                f"{each.requests_per_s / mlserver:.1f}",
                f"{each.requests_per_s / triton:.2f}",
                str(each.errors),
            )
        console.print(table)
        console.print(
            f"batching: {self.batcher_rows_per_s:,.0f} rows/s through the batcher, one slot, of "
            f"{self.batched_rows_per_s:,.0f} that onnxruntime does in full batches: "
            f"{self.batcher_rows_per_s / self.batched_rows_per_s:.0%}"
        )
        for limit in self.limits:
            cores = ", ".join(f"{name} {share:.2f}" for name, share in limit.cores.items())
            console.print(
                f"\n[bold]{limit.name}[/]: cores taken: {cores}, of {os.cpu_count()}; the rest is the client's"
            )
            for name, functions in limit.hot.items():
                console.print(f"  {name}: " + ", ".join(f"{function} {share:.0%}" for function, share in functions))

    def plot(self, path: Path) -> None:
        """Requests per second and CPU time a request, as bars."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        names = [each.name for each in reversed(self.results)]
        colours = ["#7c3aed" if name.startswith("Lepton") else "#9ca3af" for name in names]
        figure, (rates, costs) = pyplot.subplots(1, 2, figsize=(12, 4), sharey=True, layout="constrained")
        for axis, title, values in (
            (rates, "requests per second (more is better)", [each.requests_per_s for each in reversed(self.results)]),
            (costs, "CPU µs a request (less is better)", [each.cpu_us for each in reversed(self.results)]),
        ):
            bars = axis.barh(names, values, color=colours)
            axis.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3)
            axis.set_title(title, fontsize=10)
            axis.margins(x=0.15)
            axis.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"64 floats of JSON, small MLP, 32 connections; {self.machine}", fontsize=9)
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
