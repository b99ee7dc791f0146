"""What the command line shows: tables, progress and errors for people, JSON for programs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lepton.errors import LeptonError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from lepton.flow import OnProgress, Progress

T = TypeVar("T")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")]

console = Console(highlight=False)
progress_console = Console(stderr=True, highlight=False)

_STATE_STYLES = {
    "live": "green",
    "promoted": "green",
    "ready": "green",
    "failed": "red",
    "loading": "yellow",
    "shifting": "yellow",
    "failing": "red",
    "rolled_back": "red",
    "aborted": "yellow",
    "queued": "yellow",
}
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))
_STAGES = {
    "upload": "Uploading",
    "scoring": "Scoring",
    "loading": "Workers load it",
    "shifting": "Traffic moves",
    "promoted": "Live",
    "failing": "Giving up",
    "failed": "Failed",
    "rolled_back": "Taken back",
    "aborted": "Given up",
    "queued": "Waits for its turn",
}


def show(
    items: Sequence[T], columns: Mapping[str, Callable[[T], object]], *, json: bool = False, empty: str = "Nothing yet."
) -> None:
    """The items on stdout: a table with these columns, or their JSON; `empty` stands in for a table without rows."""
    if json:
        print_json(list(items))
    elif not items:
        console.print(empty)
    else:
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
        *short, last = columns
        for title in short:
            table.add_column(title, no_wrap=True)
        table.add_column(last, overflow="fold")
        for item in items:
            table.add_row(*(_cell(column(item)) for column in columns.values()))
        console.print(table)


def print_json(value: Any) -> None:
    """The value as indented JSON on stdout; NaN and infinities are null."""
    import orjson

    console.file.write(orjson.dumps(value, default=_plain, option=orjson.OPT_INDENT_2).decode() + "\n")


def print_json_line(value: Any) -> None:
    """The value as JSON in one line on stdout, at once."""
    import orjson

    console.file.write(orjson.dumps(value, default=_plain).decode() + "\n")
    console.file.flush()


def _plain(shape: "BaseModel") -> Any:
    return shape.model_dump(mode="json")


def print_error(error: LeptonError) -> None:
    """What went wrong and what to do next, on stderr."""
    progress_console.print(f"[bold red]Error:[/] {escape(error.message)}", soft_wrap=True)
    if error.hint:
        progress_console.print(f"[dim]{escape(error.hint)}[/]", soft_wrap=True)


def _cell(value: object) -> str:
    match value:
        case None:
            return "-"
        case datetime():
            return when(value, datetime.now(UTC))
        case float():
            return f"{value:g}"
    text = escape(str(value))
    style = _STATE_STYLES.get(text)
    return f"[{style}]{text}[/]" if style else text


def when(then: datetime, now: datetime) -> str:
    """How long ago or ahead, in the largest unit that fits."""
    seconds = round((now - then).total_seconds())
    length, unit = next((each for each in _UNITS if abs(seconds) >= each[0]), (1, "s"))
    count = abs(seconds) // length
    return f"{count} {unit} ago" if seconds >= 0 else f"in {count} {unit}"


def size(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def say(text: str) -> None:
    """The text on stdout, also while bars are shown; above them where both go to one terminal."""
    (progress_console if console.is_terminal and progress_console.is_terminal else console).print(text)


@contextmanager
def progress_bars(*, quiet: bool = False) -> Iterator["OnProgress"]:
    """A function to report progress to, shown as bars on stderr while a person watches."""
    from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
    )
    hidden = quiet or not progress_console.is_terminal
    bars = Bars(*columns, console=progress_console, transient=True, disable=hidden)
    upload: list[TaskID] = []
    deployment: list[TaskID] = []

    def report(progress: "Progress") -> None:
        tasks = upload if progress.stage == "upload" else deployment
        if not tasks:
            tasks.append(bars.add_task("", amount=""))
        match progress.stage:
            case "upload":
                amount = f"{size(progress.done)} of {size(progress.total)}"
            case "scoring":
                amount = f"{progress.done:,.0f} of {progress.total:,.0f} rows"
            case _:
                amount = f"{progress.done:g} % of traffic"
        amount += f" [dim]{escape(progress.note)}[/]" if progress.note else ""
        # While workers load there is no share to show, so the bar pulses.
        total = None if progress.stage == "loading" else progress.total
        description = _STAGES.get(progress.stage, progress.stage)
        bars.update(tasks[0], description=description, completed=progress.done, total=total, amount=amount)

    with bars:
        yield report
