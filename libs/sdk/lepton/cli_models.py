"""The commands about models: push, look, deploy, call."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from lepton.cli_options import Burst, Concurrency, Rate
from lepton.cli_traces import show_trace
from lepton.connect import connect
from lepton.render import Json, console, print_json, progress_bars, say, show, size

if TYPE_CHECKING:
    from lepton.models import Version
    from lepton.rollouts import Rollout

commands = typer.Typer()
_PANEL = "Models"

Name = Annotated[str, typer.Argument(metavar="MODEL")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Return when it serves, or at once.")]
Timeout = Annotated[float, typer.Option(min=0, help="Seconds to wait at most.")]


@commands.command(rich_help_panel=_PANEL)
def push(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="An .onnx file; weights beside it are packed in.", dir_okay=False)],
    name: Annotated[str, typer.Option(help="The model's name: lower-case letters, digits, hyphens.")],
    deploy: Annotated[bool, typer.Option("--deploy/--no-deploy", help="Serve it, or only keep it.")] = True,
    wait: Annotated[
        bool | None,
        typer.Option("--wait/--no-wait", help="Return when it serves (default where that is at once), or before."),
    ] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="A note on the version.")] = None,
    metric: Annotated[list[str] | None, typer.Option(metavar="KEY=NUMBER", help="A figure of the version.")] = None,
    timeout: Timeout = 300.0,
    json: Json = False,
) -> None:
    """Make a file a version of a model and serve it: by the model's policy if it has one, else at once."""
    labels = dict(_pair(each) for each in label or [])
    metrics = {key: _number(key, text) for key, text in map(_pair, metric or [])}
    earns = False

    def tell(version: "Version", rollout: "Rollout | None") -> None:
        from lepton.evidence import summary
        from lepton.policies import Strategy

        nonlocal earns
        earns = rollout is not None and rollout.strategy is not Strategy.IMMEDIATE
        if json:
            return
        if rollout is None:
            say(f"[bold]{name}[/] version [bold]{version.version}[/] ({size(version.size_bytes)}) is registered.")
        elif earns:
            say(f"Its rollout by {summary(rollout.policy)} is on its way.")
            say(f"`lepton rollout watch {name}` shows how it goes.")

    with connect(ctx) as client, progress_bars(quiet=json) as progress:
        version = client.push(
            file,
            name=name,
            labels=labels,
            metrics=metrics,
            deploy=deploy,
            wait=wait,
            timeout=timeout,
            progress=progress,
            tell=tell,
        )
    told = f"{name} version {version.version}"
    if json:
        print_json(version)
    elif not deploy:
        console.print(f"`lepton deploy {name} {version.version}` serves it.")
    elif wait or (wait is None and not earns):
        console.print(f"{told} serves all traffic. `lepton infer {name} --input x.json` calls it.")
    elif not earns:
        console.print(f"{told} is on its way. `lepton rollout watch {name}` shows how far.")


@commands.command(rich_help_panel=_PANEL)
def models(ctx: typer.Context, json: Json = False) -> None:
    """List the models."""
    with connect(ctx) as client:
        found = client.models()
    show(
        found,
        {
            "MODEL": lambda model: model.name,
            "PRODUCTION": lambda model: model.aliases.get("production"),
            "NEWEST": lambda model: model.latest_version,
            "MADE": lambda model: model.created_at,
        },
        json=json,
        empty="No models yet. `lepton push FILE --name MODEL` makes the first.",
    )


@commands.command(rich_help_panel=_PANEL)
def versions(ctx: typer.Context, model: Name, json: Json = False) -> None:
    """List a model's versions."""
    with connect(ctx) as client:
        found = client.versions(model)
        live = None if json else client.model(model).aliases.get("production")
    show(
        found,
        {
            "VERSION": lambda version: version.version,
            "STATE": lambda version: "live" if version.version == live else version.state.value,
            "SIZE": lambda version: size(version.size_bytes),
            "SHA256": lambda version: version.sha256[:12],
            "BY": lambda version: version.created_by,
            "MADE": lambda version: version.created_at,
            "WHY": lambda version: version.state_reason,
        },
        json=json,
    )


@commands.command(rich_help_panel=_PANEL)
def deploy(
    ctx: typer.Context,
    model: Name,
    version: Annotated[int, typer.Argument(min=1)],
    wait: Wait = True,
    timeout: Timeout = 300.0,
    json: Json = False,
) -> None:
    """Move all live traffic to a version at once, unjudged; `lepton rollout start` goes step by step."""
    with connect(ctx) as client, progress_bars(quiet=json) as progress:
        rollout = client.deploy(model, version, wait=wait, timeout=timeout, progress=progress)
    if json:
        print_json(rollout)
    else:
        console.print(f"{model} version {version} {'serves all traffic' if wait else 'is on its way'}.")


@commands.command(rich_help_panel=_PANEL)
def rollback(ctx: typer.Context, model: Name, wait: Wait = True, timeout: Timeout = 300.0, json: Json = False) -> None:
    """Move all live traffic back to the version before; it is still loaded, so that takes a moment only."""
    with connect(ctx) as client, progress_bars(quiet=json) as progress:
        rollout = client.rollback(model, wait=wait, timeout=timeout, progress=progress)
    if json:
        print_json(rollout)
    else:
        from lepton.rollouts import RolloutState

        gave_up = (RolloutState.FAILING, RolloutState.ABORTED, RolloutState.ROLLED_BACK)
        # A canary that gave up went back to the stable; else the rollout itself brought the version before.
        back_at = rollout.stable if rollout.state in gave_up else rollout.version
        console.print(f"{model} {'is' if wait else 'is on its way'} back at version {back_at}.")


@commands.command(rich_help_panel=_PANEL)
def rollouts(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Default: of all models.")] = None,
    json: Json = False,
) -> None:
    """List how versions came to live traffic, the newest first."""
    with connect(ctx) as client:
        found = client.rollouts(model)
    show(
        found,
        {
            "MODEL": lambda rollout: rollout.model,
            "VERSION": lambda rollout: rollout.version,
            "STATE": lambda rollout: rollout.state.value,
            "TRAFFIC": lambda rollout: f"{rollout.percent:g} %",
            "STARTED": lambda rollout: rollout.started_at,
            "BY": lambda rollout: rollout.actor,
            "WHY": lambda rollout: rollout.reason,
        },
        json=json,
    )


@commands.command(rich_help_panel=_PANEL)
def timeline(ctx: typer.Context, model: Name, json: Json = False) -> None:
    """Tell a model's story, every fact in order."""
    with connect(ctx) as client:
        entries = client.timeline(model)
    show(
        entries,
        {
            "AT": lambda entry: f"{entry.at.astimezone():%m-%d %H:%M:%S}",
            "WHAT": lambda entry: entry.type,
            "VERSION": lambda entry: entry.version,
            "BY": lambda entry: entry.actor,
            "WHY": lambda entry: entry.reason,
        },
        json=json,
    )


@commands.command(rich_help_panel=_PANEL)
def cache(
    ctx: typer.Context,
    model: Name,
    ttl: Annotated[float | None, typer.Option(min=0.001, help="Turn it on: seconds that an answer is kept.")] = None,
    max_mb: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Memory of each gateway for the answers. Default: 64.")
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="Turn it off.")] = False,
    json: Json = False,
) -> None:
    """Show, or change, whether requests that equal an earlier one are answered from memory."""
    if off and ttl is not None:
        raise typer.BadParameter("--ttl turns it on, --off turns it off: give one of them")
    if max_mb is not None and ttl is None:
        raise typer.BadParameter("--max-mb needs --ttl")
    with connect(ctx) as client:
        if ttl is not None:
            view = client.set_cache(model, ttl_s=ttl, max_bytes=(max_mb or 64) << 20)
        else:
            view = client.unset_cache(model) if off else client.serving(model)
    kept = view.cache
    if json:
        print_json({"model": model, "cache": kept})
    elif kept is None:
        console.print(f"{model} is asked every time. `lepton cache {model} --ttl 60` keeps its answers for a minute.")
    else:
        told = f"for {kept.ttl_s:g} s, in {kept.max_bytes / 2**20:.3g} MiB of each gateway"
        console.print(f"Answers of {model} are kept {told}, while one version has all of its traffic.")


@commands.command(rich_help_panel=_PANEL)
def limits(
    ctx: typer.Context,
    model: Name,
    rate: Rate = None,
    burst: Burst = None,
    concurrency: Concurrency = None,
    timeout: Annotated[
        int | None, typer.Option(min=1, max=3_600_000, metavar="MS", help="Milliseconds that an answer may take.")
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="Go back to the defaults.")] = False,
    json: Json = False,
) -> None:
    """Show, or change, what each gateway lets through to a model. What is not given stays as it is."""
    given = {"rate_per_s": rate, "burst": burst, "max_concurrency": concurrency, "timeout_ms": timeout}
    wanted = {name: value for name, value in given.items() if value is not None}
    if off and wanted:
        raise typer.BadParameter("--off goes back to the defaults: give no limit beside it")
    with connect(ctx) as client:
        view = client.unset_limits(model) if off else client.serving(model)
        if wanted:
            view = client.set_limits(model, **{**view.limits.model_dump(), **wanted})
    kept = view.limits
    if json:
        print_json({"model": model, "limits": kept})
        return
    at_once = "" if kept.burst is None else f" ({kept.burst} at once)"
    told = "any rate" if kept.rate_per_s is None else f"{kept.rate_per_s:g} requests/s{at_once}"
    rest = f"{kept.max_concurrency} under way at a time, each for {kept.timeout_ms} ms at most"
    console.print(f"{model} takes {told} at each gateway, {rest}.")
    if not (off or wanted):
        example = f"lepton limits {model} --rate 100 --burst 20 --concurrency 10 --timeout 500"
        console.print(f"`{example}` changes that, each option what it names; `--off` takes all back.")


@commands.command(rich_help_panel=_PANEL)
def infer(
    ctx: typer.Context,
    model: Name,
    file: Annotated[Path, typer.Option("--input", help="x.json, x.npy or x.npz; - reads JSON from standard input.")],
    version: Annotated[int | None, typer.Option(min=1, help="Default: whichever live traffic goes to.")] = None,
    output: Annotated[list[str] | None, typer.Option(help="An output wanted; may be repeated. Default: all.")] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds the answer may take.")] = 30.0,
    trace: Annotated[bool, typer.Option("--trace", help="Also tell where the time went, as `lepton trace`.")] = False,
    json: Json = False,
) -> None:
    """Call a model."""
    from lepton.inputs import read_inputs
    from lepton.tensors import to_json

    with connect(ctx) as client:
        inputs = read_inputs(file, client.metadata(model, version=version).inputs)
        outputs = client.infer(model, inputs, version=version, outputs=output, timeout=timeout, traced=trace)
        if json:
            tensors = {name: to_json(array) for name, array in outputs.items()}
            told = {"trace": client.trace(outputs.request_id)} if trace else {}
            print_json({"model": model, "version": outputs.version, "outputs": tensors, **told})
            return
        for name, array in outputs.items():
            console.print(f"[bold]{escape(name)}[/] [dim]{escape(f'{array.dtype} {array.shape}')}[/]")
            console.print(str(array), markup=False)
        console.print(f"[dim]answered by version {outputs.version}[/]")
        if trace:
            show_trace(client.trace(outputs.request_id))


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE")
    return key, value


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{key}: {text!r} is not a number") from None
