"""`lepton keys`: who may do what."""

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from lepton.connect import connect
from lepton.render import Json, console, print_json, show

commands = typer.Typer(no_args_is_help=True)


@commands.command()
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="What the key is for; told apart by it later.")],
    # typer only reads the list, so it may be shared.
    scope: Annotated[list[str], typer.Option(help="infer, read, deploy or admin; may be repeated.")] = ["infer"],  # noqa: B006
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
        console.print("[dim]Keep it now: it is not shown again. Use it as LEPTON_API_KEY, or as a Bearer token.[/]")


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
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `lepton keys list` shows it.")],
    json: Json = False,
) -> None:
    """Revoke a key; within a second it opens nothing any more."""
    with connect(ctx) as client:
        client.revoke_key(key_id)
    if json:
        print_json({"revoked": key_id})
    else:
        console.print(f"Revoked {key_id}.")
