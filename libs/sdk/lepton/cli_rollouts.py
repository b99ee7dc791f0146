"""The commands about a rollout: start, watch, steer, explain."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lepton.connect import connect
from lepton.render import Json, console, print_json, progress_bars, progress_console, show

if TYPE_CHECKING:
    from lepton.operations_rollouts import Command
    from lepton.rollouts import Rollout

commands = typer.Typer(no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="MODEL")]
Which = Annotated[
    str,
    typer.Argument(metavar="MODEL|ID", help="A model: its rollout under way, else its newest. Or a rollout's id."),
]
Wanted = Annotated[str, typer.Option("--policy", metavar="NAME|FILE", help="A preset's name, or a YAML or JSON file.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; the timeline keeps it.")]
MaybeReason = Annotated[str, typer.Option("--reason", help="Why, if there is more to say; the timeline keeps it.")]


@commands.command()
def start(
    ctx: typer.Context,
    model: Name,
    version: Annotated[int, typer.Argument(min=1)],
    policy: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="A preset's name, or a YAML or JSON file. Default: the model's own."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return when it has ended, or at once.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Although the same bytes were taken back before.")] = False,
    together: Annotated[
        list[str] | None, typer.Option("--with", metavar="OTHER=VERSION", help="A version that steps with this one.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait at most.")] = 3600.0,
    json: Json = False,
) -> None:
    """Bring a version to live traffic, step by step, as the policy says."""
    members = dict(_member(each) for each in together or [])
    with connect(ctx) as client, progress_bars(quiet=json) as progress:
        rollout = client.start_rollout(
            model,
            version,
            policy=policy,
            force=force,
            together=members,
            wait=wait,
            timeout=timeout,
            progress=progress,
        )
    if json:
        print_json(rollout)
        return
    from lepton.evidence import is_over, outcome, summary, waiting

    if is_over(rollout):
        console.print(outcome(rollout), markup=False)
        return
    console.print(f"{model} version {version} is on its way by {summary(rollout.policy)}.", markup=False)
    if rollout.waiting_for:
        console.print(f"{waiting(rollout)[:1].upper()}{waiting(rollout)[1:]}.", markup=False)
    console.print(f"`lepton rollout watch {model}` shows how it goes.")


@commands.command()
def status(ctx: typer.Context, which: Which, json: Json = False) -> None:
    """Show how a rollout stands."""
    from datetime import UTC, datetime

    from lepton.evidence import outcome
    from lepton.watch import Look, view

    with connect(ctx) as client:
        rollout = client.find_rollout(which)
        decisions = [] if json else client.decisions(rollout.id)
    if json:
        print_json(rollout)
        return
    console.print(view(Look(rollout, decisions), datetime.now(UTC)))
    console.print(outcome(rollout), markup=False)


@commands.command()
def watch(
    ctx: typer.Context,
    which: Which,
    every: Annotated[
        float, typer.Option(min=0.01, envvar="LEPTON_WATCH_S", help="Seconds from one look to the next.")
    ] = 1.0,
    json: Json = False,
) -> None:
    """Show a rollout as it goes, until it has ended; --json prints a document in a line at each change."""
    from lepton.evidence import outcome
    from lepton.watch import looks
    from lepton.watch import watch as shown

    with connect(ctx) as client:
        rollout = client.find_rollout(which)
        try:
            last = shown(looks(client, rollout, every), console, json=json)
        except KeyboardInterrupt:
            progress_console.print("No longer watched; the rollout goes on by itself.")
            return
    if last and not json:
        console.print(outcome(last), markup=False, soft_wrap=True)
        console.print(f"`lepton rollout explain {last.id}` tells why.", soft_wrap=True)


@commands.command()
def pause(ctx: typer.Context, which: Which, reason: MaybeReason = "", json: Json = False) -> None:
    """Keep a rollout from growing; harm still takes it back."""
    rollout = _steered(ctx, which, "pause", reason)
    _tell(rollout, f"stays at {rollout.percent:g} % until `lepton rollout resume {rollout.model}`", json)


@commands.command()
def resume(ctx: typer.Context, which: Which, reason: MaybeReason = "", json: Json = False) -> None:
    """Let a paused rollout go on, or give traffic that was taken by hand back to rollout."""
    from lepton.errors import NotFound

    with connect(ctx) as client:
        rollout = client.find_rollout(which)
        try:
            by_hand = rollout.by_hand or client.mesh(rollout.model).held_by != "rollout"
        except NotFound:  # Nothing of the model is served, so there is nothing to hold.
            by_hand = False
        if by_hand:
            client.release_mesh(rollout.model)
            rollout = client.rollout(rollout.id)
        else:
            rollout = client.steer(rollout.id, "resume", reason=reason)
    if not by_hand:
        _tell(rollout, "goes on", json)
    elif json:
        print_json(rollout)
    else:
        console.print(f"The traffic of {rollout.model} is rollout's again.", markup=False)
        if rollout.paused:
            console.print(f"The rollout is still paused: `lepton rollout resume {rollout.model}` lets it go on.")


@commands.command()
def promote(
    ctx: typer.Context,
    which: Which,
    reason: Reason,
    full: Annotated[bool, typer.Option("--full", help="Past all steps that are left.")] = False,
    json: Json = False,
) -> None:
    """Let a rollout take its next step on your word, without waiting for proof."""
    rollout = _steered(ctx, which, "promote", reason, full=full)
    _tell(rollout, "takes all traffic" if full else "takes its next step", json)


@commands.command()
def abort(ctx: typer.Context, which: Which, reason: Reason, json: Json = False) -> None:
    """Give a rollout up: all traffic goes back to the stable version."""
    rollout = _steered(ctx, which, "abort", reason)
    back = f"version {rollout.stable} takes all traffic again" if rollout.stable else "no version takes its place"
    _tell(rollout, f"is given up; {back}", json)


@commands.command()
def approve(ctx: typer.Context, which: Which, reason: Reason, json: Json = False) -> None:
    """Let a rollout pass the step that asks for a person."""
    rollout = _steered(ctx, which, "approve", reason)
    _tell(rollout, "has its approval and goes on as soon as the judge agrees", json)


@commands.command()
def retry(ctx: typer.Context, which: Which, reason: MaybeReason = "", json: Json = False) -> None:
    """Start the version of a rollout that has ended once more."""
    rollout = _steered(ctx, which, "retry", reason)
    _tell(rollout, "is on its way once more", json)


@commands.command()
def history(ctx: typer.Context, model: Name, json: Json = False) -> None:
    """List a model's rollouts, the newest first."""
    from lepton.evidence import duration

    with connect(ctx) as client:
        found = client.rollouts(model)

    def took(rollout: "Rollout") -> str:
        end = rollout.finished_at
        return duration((end - rollout.started_at).total_seconds()) if end else "under way"

    show(
        found,
        {
            "ID": lambda rollout: str(rollout.id)[:8],
            "VERSION": lambda rollout: rollout.version,
            "STATE": lambda rollout: rollout.state.value,
            "STRATEGY": lambda rollout: rollout.strategy.value,
            "STARTED": lambda rollout: rollout.started_at,
            "TOOK": took,
            "BY": lambda rollout: rollout.actor,
            "WHY": lambda rollout: rollout.reason,
        },
        json=json,
        empty=f"No rollouts of {model} yet. `lepton rollout start {model} VERSION` makes the first.",
    )


@commands.command()
def explain(ctx: typer.Context, which: Which, json: Json = False) -> None:
    """Tell each decision about a rollout, with the numbers it was made by."""
    with connect(ctx) as client:
        rollout = client.find_rollout(which)
        decisions = client.decisions(rollout.id)
    if json:
        print_json({"rollout": rollout, "decisions": decisions})
        return
    from lepton.explain import explanation

    console.print(explanation(rollout, decisions))


@commands.command()
def replay(ctx: typer.Context, which: Which, policy: Wanted, json: Json = False) -> None:
    """Tell what another policy would have decided on the same traffic; nothing moves."""
    with connect(ctx) as client:
        rollout = client.find_rollout(which)
        found = client.replay(rollout.id, policy)
    if json:
        print_json(found)
        return
    from lepton.explain import replayed

    console.print(replayed(rollout, found, policy))


@commands.command()
def report(
    ctx: typer.Context,
    which: Which,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", dir_okay=False, help="Default: MODEL-vVERSION-rollout.html")
    ] = None,
    json: Json = False,
) -> None:
    """Write a page about a rollout, with plots: one HTML file that needs nothing else."""
    from lepton.report import page

    with connect(ctx) as client:
        rollout = client.find_rollout(which)
        decisions, windows = client.decisions(rollout.id), client.rollout_windows(rollout.id)
    path = output or Path(f"{rollout.model}-v{rollout.version}-rollout.html")
    path.write_text(page(rollout, decisions, windows), encoding="utf-8")
    if json:
        print_json({"rollout": str(rollout.id), "report": str(path)})
    else:
        console.print(f"{path} tells the story of {rollout.model} version {rollout.version}.", markup=False)


def _steered(ctx: typer.Context, which: str, command: "Command", reason: str, *, full: bool = False) -> "Rollout":
    with connect(ctx) as client:
        return client.steer(which, command, reason=reason, full=full)


def _tell(rollout: "Rollout", told: str, json: bool) -> None:
    if json:
        print_json(rollout)
    else:
        console.print(f"{rollout.model} version {rollout.version} {told}.", markup=False)


def _member(text: str) -> tuple[str, int]:
    model, _, version = text.partition("=")
    if not (model and version.isdecimal() and int(version)):
        raise typer.BadParameter(f"{text!r} is not OTHER=VERSION, such as tokenizer=4")
    return model, int(version)
