"""The command that tells where the time of a request went."""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from lepton.connect import connect
from lepton.render import Json, console, print_json, show

if TYPE_CHECKING:
    from lepton.models import Trace

commands = typer.Typer()

_WIDTH = 40
_NAMES = {
    "front": "front door",
    "kafka": "in Kafka",
    "wait": "gateway: wait",
    "mesh": "mesh, there and back",
    "mesh+worker": "mesh and worker",
    "decode": "worker: decode",
    "queue": "worker: queue",
    "run": "worker: batch run",
    "encode": "worker: encode",
}


@commands.command(rich_help_panel="Models")
def trace(
    ctx: typer.Context,
    request_id: Annotated[
        str | None, typer.Argument(metavar="[REQUEST_ID]", help="Its x-request-id. Default: list the last ones.")
    ] = None,
    json: Json = False,
) -> None:
    """Tell where the time of a traced request went.

    Traced is what asks for it: `lepton infer --trace`, a header or gRPC metadata `traceparent` with the sampled flag
    (00-…-…-01), the same header of a Kafka message; of each tenant some ten a second. Beside those, what the trace
    settings say (`POST /v2/trace/setting`, or of one model: trace_level TIMESTAMPS, trace_rate 100 is every 100th).
    Every answer names its request: header x-request-id, over Kafka ce_correlationid. The gateway that answered
    remembers the last 200 of a tenant, until it is restarted; with LEPTON_OTLP spans go to a collector as well.
    """
    with connect(ctx) as client:
        if request_id is not None:
            show_trace(client.trace(request_id), json=json)
            return
        found = client.traces()
    show(
        found,
        {
            "AT": lambda each: f"{each.at.astimezone():%H:%M:%S}",
            "MODEL": lambda each: each.model,
            "STATUS": lambda each: each.status,
            "MS": lambda each: f"{each.total_ms:.2f}",
            "REQUEST": lambda each: each.request_id,
        },
        json=json,
        empty="No request was traced yet. `lepton infer MODEL --input x.json --trace` makes one.",
    )


def show_trace(found: "Trace", *, json: bool = False) -> None:
    """Its stages, each as a bar that begins where the one before ended."""
    if json:
        print_json(found)
        return
    console.print(
        f"[bold]{escape(found.model)}[/] version {escape(found.version) or '-'}, status {found.status}, "
        f"[bold]{found.total_ms:.2f} ms[/] [dim]{escape(found.request_id)}[/]"
    )
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for stage, bar in zip(found.stages, bars([stage.ms for stage in found.stages]), strict=True):
        table.add_row(_NAMES.get(stage.name, escape(stage.name)), f"{stage.ms:.3f} ms", bar)
    console.print(table)
    if found.batch_rows is not None:
        console.print(f"[dim]rows in its batch: {found.batch_rows}, of requests: {found.batch_requests}[/]")
    if found.tries > 1:
        console.print(f"[yellow]The gateway sent it {found.tries} times: the mesh or a worker was away.[/]")


def bars(stages_ms: Sequence[float]) -> list[str]:
    """A bar for each stage from where the one before ended, of one width in all; a sliver for what is shorter."""
    total_ms = sum(stages_ms) or 1.0
    drawn = []
    first = 0
    for until_ms in accumulate(stages_ms):
        end = min(_WIDTH, round(until_ms / total_ms * _WIDTH))
        drawn.append(" " * first + "█" * (end - first) if end > first else " " * min(first, _WIDTH - 1) + "▏")
        first = end
    return drawn
