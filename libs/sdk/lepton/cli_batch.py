"""The command for many rows at once."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from lepton.connect import connect
from lepton.errors import LeptonError, Unreachable
from lepton.render import Json, console, print_json, progress_bars, progress_console

if TYPE_CHECKING:
    from lepton.client import Client

commands = typer.Typer()


@commands.command(rich_help_panel="Models")
def batch(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    file: Annotated[
        Path,
        typer.Option("--input", exists=True, dir_okay=False, help="Rows: .parquet, .csv or .npz, columns by name."),
    ],
    output: Annotated[Path, typer.Option(dir_okay=False, help="Rows and answers: .parquet or .csv.")],
    version: Annotated[int | None, typer.Option(min=1, help="Default: the one that serves now.")] = None,
    columns: Annotated[str, typer.Option(metavar="A,B,…", help="Those of the model's only input. Default: all.")] = "",
    rows: Annotated[int, typer.Option(min=1, help="Rows in one request.")] = 256,
    kafka: Annotated[
        str | None, typer.Option(envvar="LEPTON_KAFKA", help="host:port. Default: the local platform's.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a request may wait for its answer.")] = 600.0,
    json: Json = False,
) -> None:
    """Score a file of rows over Kafka, beside whom its callers go first. Interrupted, it goes on where it was.

    A column is an input by its name, with lists for vectors; a model of one input else takes all columns in order.
    """
    try:
        from lepton import batch as scoring
    except ModuleNotFoundError as error:
        raise LeptonError(
            f"Scoring files needs {error.name}.", hint="pip install 'lepton[batch]' brings it."
        ) from error

    chosen = [each.strip() for each in columns.split(",") if each.strip()]
    wanted = scoring.Wanted(model, file, output, version, chosen, rows, timeout)
    with connect(ctx) as client, progress_bars(quiet=json) as progress:
        summary = scoring.score(client, wanted, kafka or _local_kafka(client), progress)
    if json:
        print_json(summary)
    else:
        told = f"{summary.rows - summary.failed} of {summary.rows} rows scored by version {summary.version}"
        # An earlier run asked for everything where this one asked for nothing.
        told = f"{told} in {summary.seconds:.3g} s" if summary.asked else f"Done already: {told}"
        console.print(f"{told}, in {summary.output}.", markup=False)
    if summary.failed:
        for reason in summary.reasons:
            progress_console.print(f"[bold red]Error:[/] {escape(reason)}", soft_wrap=True)
        again = "The column lepton_error has each row's reason; the same command asks again for what failed."
        progress_console.print(f"{summary.failed} of {summary.rows} rows failed. {again}", soft_wrap=True)
        raise typer.Exit(1)


def _local_kafka(client: "Client") -> str:
    """Of the platform that the client talks to, where it is this machine's own."""
    from lepton.endpoint import home
    from lepton.home import Home

    layout = Home.at(home()).layout()
    if layout is None or layout.url.rstrip("/") != client.endpoint.url:
        hint = "--kafka HOST:PORT or LEPTON_KAFKA does."
        raise Unreachable(f"Nothing says where Kafka of {client.endpoint.url} is.", hint=hint)
    return layout.kafka
