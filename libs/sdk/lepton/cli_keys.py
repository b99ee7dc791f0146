"""`lepton keys` and `lepton tenants`: who may do what."""

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from lepton.cli_options import Burst, Concurrency, Rate
from lepton.connect import connect
from lepton.errors import Conflict, NotFound
from lepton.render import Json, console, print_json, progress_console, show

if TYPE_CHECKING:
    from lepton import Client
    from lepton.models import CreatedKey, Key

commands = typer.Typer(no_args_is_help=True)
tenants = typer.Typer(no_args_is_help=True)

_ID = re.compile("[0-9a-f]{16}")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|min|h|d)")
_UNITS = {"s": "seconds", "m": "minutes", "min": "minutes", "h": "hours", "d": "days"}
_HINT = "`lepton keys list` lists them."


def duration(text: str) -> timedelta:
    """`30d`, `12h`, `15min` or `90s`."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"{text!r}: expected a number and s, min, h or d, such as 30d")
    return timedelta(**{_UNITS[match[2]]: float(match[1])})


Name = Annotated[str, typer.Argument(metavar="NAME|ID", help="As `lepton keys list` shows it.")]
Tenant = Annotated[str | None, typer.Option(help="Another tenant than your own.")]


@commands.command()
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="What the key is for; told apart by it later.")],
    # typer only reads the lists, so they may be shared.
    scope: Annotated[
        list[str],
        typer.Option(
            "--scope",
            "--scopes",
            help="infer, read, test, deploy or admin; also several: a,b. deploy brings read and test along.",
        ),
    ] = ["infer"],  # noqa: B006 - typer copies it
    tenant: Tenant = None,
    models: Annotated[
        list[str],
        typer.Option(help="Only for these models, such as 'fraud-*'; also several: a,b. Default: all."),
    ] = [],  # noqa: B006 - typer copies it
    expires: Annotated[
        timedelta | None, typer.Option(parser=duration, metavar="30d", help="When it ends. Default: never.")
    ] = None,
    days: Annotated[float | None, typer.Option(min=0, help="The same, in days.")] = None,
    rate: Rate = None,
    burst: Burst = None,
    concurrency: Concurrency = None,
    per_day: Annotated[int | None, typer.Option(min=1, help="Requests from midnight UTC on.")] = None,
    json: Json = False,
) -> None:
    """Make a key. Its secret is printed here and never again."""
    from lepton.flow import checked
    from lepton.models import KeyLimits

    if expires is not None and days is not None:
        raise typer.BadParameter("give --expires or --days, not both")
    lifetime = timedelta(days=days) if days is not None else expires
    limits = checked(KeyLimits, rate_per_s=rate, burst=burst, max_concurrency=concurrency, per_day=per_day)
    with connect(ctx) as client:
        key = client.create_key(
            name,
            scopes=_split(scope),
            tenant=tenant,
            expires_at=None if lifetime is None else datetime.now(UTC) + lifetime,
            models=_split(models),
            limits=limits,
        )
    _show_secret(key, json=json)


@commands.command("list")
def list_keys(ctx: typer.Context, tenant: Tenant = None, json: Json = False) -> None:
    """List the keys, without their secrets."""
    with connect(ctx) as client:
        keys = client.keys(tenant)
    show(
        keys,
        {
            "ID": lambda key: key.id,
            "NAME": lambda key: key.name,
            "PREFIX": lambda key: key.prefix,
            "EXPIRES": lambda key: key.expires_at or "never",
            "USED": lambda key: key.last_used_at,
            "FOR": _rights,
        },
        json=json,
    )


@commands.command()
def rotate(
    ctx: typer.Context,
    key: Name,
    overlap: Annotated[
        timedelta,
        typer.Option(parser=duration, metavar="1h", help="How long the old secret goes on beside it."),
    ] = "1h",  # type: ignore[assignment]  # typer gives it to the parser.
    tenant: Tenant = None,
    json: Json = False,
) -> None:
    """Give a key's rights to a new secret, which is printed here and never again; the old one ends."""
    with connect(ctx) as client:
        # Of those that rotation left with one name it is the last.
        key_id = _ids(client, key, tenant)[-1]
        try:
            new = client.rotate_key(key_id, overlap=overlap)
        except NotFound as error:
            error.hint = _HINT
            raise
        except Conflict as error:
            error.hint = "`lepton keys list --json` tells which key has its place: `replaced_by`."
            raise
    _show_secret(new, json=json)


@commands.command()
def revoke(ctx: typer.Context, key: Name, tenant: Tenant = None, json: Json = False) -> None:
    """Revoke a key, by its name with all that rotation left of it; within a second it opens nothing any more."""
    with connect(ctx) as client:
        ids = _ids(client, key, tenant)
        for key_id in ids:
            try:
                client.revoke_key(key_id)
            except NotFound as error:
                error.hint = _HINT
                raise
    if json:
        print_json({"revoked": ids[-1]})
    else:
        console.print(f"Revoked {escape(key)}.")


@tenants.command("create")
def create_tenant(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits, hyphens.")],
    json: Json = False,
) -> None:
    """Make a tenant; it is no error when there is one of that name."""
    with connect(ctx) as client:
        tenant = client.create_tenant(name)
    if json:
        print_json(tenant)
    else:
        console.print(f"Tenant {escape(tenant.name)} is there.")
        told = f"`lepton keys create NAME --tenant {tenant.name}` makes a key for it."
        progress_console.print(f"[dim]{escape(told)}[/]")


@tenants.command("list")
def list_tenants(ctx: typer.Context, json: Json = False) -> None:
    """List the tenants that your key manages."""
    with connect(ctx) as client:
        found = client.tenants()
    show(found, {"NAME": lambda each: each.name, "MADE": lambda each: each.created_at}, json=json)


def _split(texts: list[str]) -> list[str]:
    """The words of `--scopes a,b --scopes c`."""
    return [word for text in texts for word in text.split(",")]


def _ids(client: "Client", key: str, tenant: str | None) -> list[str]:
    """The ids of the keys of that name, the oldest first, or the one that is named by its id. Raises NotFound.

    What looks like an id is one: a key of another tenant is not in the list.
    """
    if _ID.fullmatch(key):
        return [key]
    listed = client.keys(tenant)
    found = [each.id for each in listed if each.name == key]
    if not found:
        raise NotFound(f"no key {key!r}", hint=_HINT)
    return found


def _show_secret(key: "CreatedKey", *, json: bool) -> None:
    if json:
        print_json(key)
        return
    console.print(key.secret, soft_wrap=True)
    # On stderr, so that KEY=$(lepton keys create ci) is the key and nothing else.
    told = "Keep it now: it is not shown again. Use it as LEPTON_API_KEY, or as a Bearer token."
    progress_console.print(f"[dim]{told}[/]")


def _rights(key: "Key") -> str:
    """What the key is for: its scopes, its models if it has not all of them, its limits if it has any."""
    limits = {
        "{:g}/s": key.limits.rate_per_s,
        "burst {}": key.limits.burst,
        "{} at once": key.limits.max_concurrency,
        "{}/day": key.limits.per_day,
    }
    scopes = " ".join(sorted(key.scopes)) + (f" on {' '.join(key.models)}" if key.models else "")
    return ", ".join([scopes, *(word.format(value) for word, value in limits.items() if value is not None)])
