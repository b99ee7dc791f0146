"""`lepton keys`: who may do what."""

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from rich.markup import escape

from lepton.connect import connect
from lepton.errors import NotFound
from lepton.render import Json, console, print_json, progress_console, show

commands = typer.Typer(no_args_is_help=True)

_ID = re.compile("[0-9a-f]{16}")


@commands.command()
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="What the key is for; told apart by it later.")],
    # typer only reads the list, so it may be shared.
    scope: Annotated[
        list[str],
        typer.Option(help="infer, read, test, deploy or admin; may be repeated. deploy brings read and test with it."),
    ] = ["infer"],  # noqa: B006
    tenant: Annotated[str | None, typer.Option(help="Another tenant than your own.")] = None,
    days: Annotated[float | None, typer.Option(min=0, help="Days until it expires. Default: never.")] = None,
    json: Json = False,
) -> None:
    """Make a key. Its secret is printed here and never again."""
    expires_at = None if days is None else datetime.now(UTC) + timedelta(days=days)
    with connect(ctx) as client:
        key = client.create_key(name, scopes=scope, tenant=tenant, expires_at=expires_at)
    if json:
        print_json(key)
    else:
        console.print(key.secret, soft_wrap=True)
        # On stderr, so that KEY=$(lepton keys create ci) is the key and nothing else.
        told = "Keep it now: it is not shown again. Use it as LEPTON_API_KEY, or as a Bearer token."
        progress_console.print(f"[dim]{told}[/]")


@commands.command("list")
def list_keys(ctx: typer.Context, json: Json = False) -> None:
    """List the keys, without their secrets."""
    with connect(ctx) as client:
        keys = client.keys()
    show(
        keys,
        {
            "ID": lambda key: key.id,
            "NAME": lambda key: key.name,
            "PREFIX": lambda key: key.prefix,
            "MADE": lambda key: key.created_at,
            "EXPIRES": lambda key: key.expires_at or "never",
            "SCOPES": lambda key: " ".join(sorted(key.scopes)),
        },
        json=json,
    )


@commands.command()
def revoke(
    ctx: typer.Context,
    key: Annotated[str, typer.Argument(metavar="NAME|ID", help="As `lepton keys list` shows it.")],
    json: Json = False,
) -> None:
    """Revoke a key; within a second it opens nothing any more."""
    with connect(ctx) as client:
        # A tenant has a name once. What looks like an ID is one: a key of another tenant is not in the list.
        listed = [] if _ID.fullmatch(key) else client.keys()
        key_id = next((each.id for each in listed if each.name == key), key)
        try:
            if not _ID.fullmatch(key_id):
                raise NotFound(f"no key {key!r}")
            client.revoke_key(key_id)
        except NotFound as error:
            error.hint = "`lepton keys list` lists them."
            raise
    if json:
        print_json({"revoked": key_id})
    else:
        console.print(f"Revoked {escape(key)}.")
