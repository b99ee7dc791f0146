"""`lepton up`, `down`, `status`, `logs` and `doctor`: the local platform on the command line."""

import contextlib
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from lepton.errors import LeptonError, Unreachable
from lepton.render import Json, console, print_json, progress_console, size

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType
    from rich.table import Table

    from lepton.doctor import Finding
    from lepton.home import Home, PartState
    from lepton.local import PlatformStatus
    from lepton.logs import Line

commands = typer.Typer()
_PANEL = "Local platform"
_TIMEOUT_S = 120.0
_STYLES = {"ready": "green", "ok": "green", "starting": "yellow", "waiting": "yellow", "warning": "yellow"}
_LEVEL_STYLES = {"warn": "yellow", "warning": "yellow", "error": "red", "critical": "bold red", "fatal": "bold red"}
_PART_STYLES = ("cyan", "magenta", "blue", "green", "bright_cyan", "bright_magenta", "bright_blue")

HomeOption = Annotated[
    Path | None,
    typer.Option("--home", metavar="DIR", help="The platform's data folder. Default: LEPTON_HOME, else ~/.lepton."),
]


@commands.command(rich_help_panel=_PANEL)
def up(
    home: HomeOption = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Port of the front door. Default: the last one, at first 8080 if it is free."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=64, help="Workers. Default: as before, at first one a core, at most 2.")
    ] = None,
    pool: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=N", help="N workers in another pool, for rollouts that name it; 0 ends them. Repeat."
        ),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when it is ready; it runs on.")] = False,
) -> None:
    """Start the whole platform on this machine. It listens on loopback only; Ctrl-C, or `lepton down`, ends it."""
    from lepton.local import Detached

    place, pools = _home(home), _pools(pool or [])
    place.create()
    if place.supervisor_pid():
        _wait_until_ready(place, lambda: None, _TIMEOUT_S)
        console.print(
            "It was running already." + (" `lepton down` first to change it." if port or workers or pools else "")
        )
    elif detach:
        _wait_until_ready(place, Detached(place, port, workers, pools).failure, _TIMEOUT_S)
        console.print("It runs in the background; `lepton down` ends it.")
    else:
        _run_here(place, port, workers, pools)


@commands.command(rich_help_panel=_PANEL)
def down(home: HomeOption = None) -> None:
    """End the local platform. Its data stays for the next `lepton up`."""
    from lepton import local

    with progress_console.status("Ending the platform"):
        ended = local.down(_home(home))
    console.print(f"Ended: {', '.join(ended)}." if ended else "Nothing was running.")


@commands.command(rich_help_panel=_PANEL)
def status(home: HomeOption = None, json: Json = False) -> None:
    """Show the parts of the local platform, with CPU, memory and restarts. Exit code 3 when it does not run."""
    from dataclasses import asdict

    from lepton import local

    found = local.status(_home(home))
    if found is None:
        if json:
            print_json({"ready": False, "parts": []})
        raise Unreachable("No platform is running.", hint="Start it with `lepton up`.")
    if json:
        print_json(asdict(found))
    else:
        console.print(_status_table(found))


@commands.command(rich_help_panel=_PANEL)
def logs(
    service: Annotated[str | None, typer.Argument(help="One part, such as registry or worker. Default: all.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written from now on.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Last lines of each part.")] = 50,
    home: HomeOption = None,
) -> None:
    """Show what the parts wrote to their logs, merged by time."""
    from lepton.logs import last_lines, log_files, new_lines

    folder = _home(home).folder / "logs"
    files = log_files(folder, service)
    if not files:
        known = ", ".join(log_files(folder, None)) or "none"
        raise LeptonError(f"There is no log of {service or 'a platform'} in {folder}.", hint=f"Logs there: {known}.")
    width = max(map(len, files))
    later = new_lines(files)
    for line in last_lines(files, lines):
        _print_line(line, width)
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            for line in later:
                _print_line(line, width)


@commands.command(rich_help_panel=_PANEL)
def doctor(home: HomeOption = None, port: int | None = None, json: Json = False) -> None:
    """Say what this machine lacks to run the platform, and how to get it. Exit code 1 when it cannot run."""
    from dataclasses import asdict

    from lepton.doctor import Verdict, examine

    findings = examine(_home(home), port)
    if json:
        print_json([asdict(finding) for finding in findings])
    else:
        console.print(_findings_table(findings))
    if any(finding.verdict is Verdict.MISSING for finding in findings):
        raise typer.Exit(1)


def _home(folder: Path | None) -> "Home":
    from lepton import endpoint
    from lepton.home import Home

    return Home.at(folder or endpoint.home())


def _pools(given: list[str]) -> dict[str, int]:
    """The workers of other pools, from `NAME=N`."""
    pools = {}
    for each in given:
        match = re.fullmatch(r"([a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)=([0-9]{1,2})", each)
        if match is None:
            raise typer.BadParameter(
                f"{each[:80]!r}: expected a pool and its workers, such as canary=1", param_hint="--pool"
            )
        pools[match[1]] = int(match[2])
    return pools


def _run_here(home: "Home", port: int | None, workers: int | None, pools: dict[str, int]) -> None:
    """The platform ran until Ctrl-C, SIGTERM or the end of the terminal; now it has ended."""
    import math
    import signal

    from lepton.local import Background

    endings = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in endings:
        signal.signal(number, signal.default_int_handler)
    supervisor = Background(home, port, workers, pools)
    try:
        _wait_until_ready(home, supervisor.failure, math.inf)
        console.print("Ctrl-C ends it.")
        supervisor.wait()
    except KeyboardInterrupt:
        progress_console.print("Ending the platform")
    finally:
        # Ending takes seconds, and must not be left half done for an impatient second Ctrl-C.
        for number in endings:
            signal.signal(number, signal.SIG_IGN)
        supervisor.stop()


def _wait_until_ready(home: "Home", failure: "Callable[[], LeptonError | None]", timeout_s: float) -> None:
    """The platform is ready; until then every part has a line that says how it is."""
    from rich.live import Live

    from lepton.local import follow

    begun = time.monotonic()
    on_terminal = progress_console.is_terminal
    shown: set[str] = set()
    with Live(console=progress_console, refresh_per_second=10, auto_refresh=on_terminal) as live:
        for states in follow(home, failure, timeout_s):
            if on_terminal:
                live.update(_progress(states))
            for state in states if not on_terminal else ():
                if state.is_ready and state.name not in shown:
                    shown.add(state.name)
                    progress_console.print(f"{state.name} ready, {state.ready_after_s:.1f} s")
    layout = home.layout()
    if layout is None:
        raise LeptonError(f"{home.folder}/platform.json is gone.", hint="`lepton down`, then `lepton up` again.")
    if layout.kafka.startswith("mock:"):
        progress_console.print(
            "[bold yellow]Kafka is a mock in memory: events are lost when it restarts.[/] `lepton doctor` says why."
        )
    console.print(f"Lepton is ready at [bold]{layout.url}[/] ({time.monotonic() - begun:.1f} s)")
    progress_console.print(f"[dim]HTTP and gRPC there, Kafka at {layout.kafka}[/]")


def _progress(states: "list[PartState]") -> "RenderableType":
    from rich.spinner import Spinner
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    for state in states:
        if state.is_ready:
            table.add_row("[green]✓[/]", f"[green]{state.name}[/]", f"{state.ready_after_s:.1f} s")
        else:
            reason = state.reason.splitlines()[0][:80] if state.restarts and state.reason else ""
            table.add_row(Spinner("dots"), state.name, f"[dim]{escape(reason)}[/]")
    return table


def _status_table(found: "PlatformStatus") -> "RenderableType":
    from rich.console import Group

    table = _table("part", "state", "address", "pid", "up", "cpu", "memory", "restarts")
    for part in found.parts:
        table.add_row(
            part.name,
            _styled(part.state),
            part.address or "-",
            str(part.pid or "-"),
            "-" if part.uptime_s is None else f"{timedelta(seconds=round(part.uptime_s))}",
            "-" if part.cpu_percent is None else f"{part.cpu_percent:.0f} %",
            "-" if part.pss_bytes is None else size(part.pss_bytes),
            str(part.restarts),
        )
    word = "[green]ready[/]" if found.ready else "[yellow]not ready[/]"
    head = f"{found.url} is {word}, with {size(found.pss_bytes)} of memory in all. Data: {escape(found.home)}"
    reasons = [f"[yellow]{part.name}[/]: {escape(part.reason)}" for part in found.parts if part.reason]
    return Group(head, table, *reasons)


def _findings_table(findings: "list[Finding]") -> "RenderableType":
    table = _table("", "state", "found", "what to do")
    for finding in findings:
        table.add_row(finding.what, _styled(finding.verdict), escape(finding.found), escape(finding.remedy))
    return table


def _table(*titles: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def _styled(state: str) -> str:
    return f"[{_STYLES.get(state, 'red')}]{state}[/]"


def _print_line(line: "Line", width: int) -> None:
    from rich.text import Text

    # A part keeps its colour, whichever parts are shown.
    style = _PART_STYLES[sum(line.part.encode()) % len(_PART_STYLES)]
    text = Text.assemble(
        (f"{line.at[11:23]:12} ", "dim"),
        (f"{line.part:{width}} ", style),
        (line.text, _LEVEL_STYLES.get(line.level, "")),
    )
    console.print(text, soft_wrap=True)
