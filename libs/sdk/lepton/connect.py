"""The client of a command."""

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from lepton.client import Client


def connect(ctx: typer.Context) -> "Client":
    """A client for the platform that `--url`, the environment or the local platform names."""
    import stamina

    from lepton.client import Client

    # A retry is no news to who waits for a command, and stamina would log it into our output.
    stamina.instrumentation.set_on_retry_hooks([])
    url: str | None = ctx.obj
    return Client(url)
