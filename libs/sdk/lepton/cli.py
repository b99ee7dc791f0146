"""The `lepton` command: what it is made of, and how it ends.

Modules that take long to import are imported inside the commands, so that `lepton --help` answers at once.
"""

import os
from importlib.metadata import version as version_of
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lepton import (
    cli_batch,
    cli_events,
    cli_keys,
    cli_mesh,
    cli_models,
    cli_platform,
    cli_policies,
    cli_rollouts,
    cli_traces,
    render,
)
from lepton.errors import Forbidden, LeptonError, NotFound, Unauthenticated, Unavailable, Unreachable

# The first matching kind wins, so the narrower ones stand first; any other error is 1, wrong usage is 2.
_EXIT_CODES: tuple[tuple[type[LeptonError], int], ...] = (
    (Unreachable, 3),
    (NotFound, 4),
    (Unauthenticated, 5),
    (Forbidden, 5),
    (Unavailable, 6),
)

_ENDINGS = (
    "Exit codes: 0 done, 1 error, 2 wrong usage, 3 the platform does not answer, 4 no such thing, "
    "5 key missing or not allowed, 6 busy or timed out: try again."
)


class _Commands(TyperGroup):
    """The commands; whatever goes wrong in one ends in a message, a next step and an exit code, not in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.TyperException, typer.Exit, typer.Abort, BrokenPipeError):
            raise  # typer's own endings; a broken pipe is one too: the reader of our output has gone.
        except LeptonError as error:
            failure = error
        except OSError as error:
            failure = LeptonError(f"{error.strerror}: {error.filename}" if error.filename else str(error))
        except Exception as error:
            if "LEPTON_DEBUG" in os.environ:
                raise
            hint = "That should not happen. LEPTON_DEBUG=1 shows where it did."
            failure = LeptonError(f"{type(error).__name__}: {error}", hint=hint)
        render.print_error(failure)
        raise typer.Exit(next((code for kind, code in _EXIT_CODES if isinstance(failure, kind)), 1))


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog=_ENDINGS,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_platform.commands)
app.add_typer(cli_models.commands)
app.add_typer(cli_batch.commands)
app.add_typer(cli_traces.commands)
_TRAFFIC = "Traffic"
app.add_typer(
    cli_rollouts.commands,
    name="rollout",
    help="Bring a version to live traffic: start, watch, steer, explain.",
    rich_help_panel=_TRAFFIC,
)
app.add_typer(
    cli_policies.commands,
    name="policy",
    help="How versions come to live traffic: presets, and a model's own.",
    rich_help_panel=_TRAFFIC,
)
app.add_typer(
    cli_mesh.commands, name="mesh", help="Look at the mesh, or move traffic by hand.", rich_help_panel=_TRAFFIC
)
app.add_typer(
    cli_events.commands,
    name="events",
    help="Follow what the platform tells on Kafka; look at dead letters and replay them.",
    rich_help_panel="Events",
)
_ACCESS = "Access"
app.add_typer(cli_keys.commands, name="keys", help="Make, list, rotate and revoke API keys.", rich_help_panel=_ACCESS)
app.add_typer(cli_keys.tenants, name="tenants", help="Make and list tenants.", rich_help_panel=_ACCESS)


def _print_version(wanted: bool) -> None:
    if wanted:
        render.console.print(version_of("lepton"))
        raise typer.Exit


@app.callback()
def lepton(
    ctx: typer.Context,
    url: Annotated[
        str | None, typer.Option(envvar="LEPTON_URL", help="The platform. Default: the one that `lepton up` started.")
    ] = None,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Push trained models, serve them, call them. The key comes from LEPTON_API_KEY or the local platform's folder."""
    ctx.obj = url
