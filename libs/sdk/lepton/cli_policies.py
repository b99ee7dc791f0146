"""The commands about policies: how a model's versions come to live traffic."""

from typing import Annotated

import typer

from lepton.connect import connect
from lepton.render import Json, console, print_json, show

commands = typer.Typer(no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="MODEL")]


@commands.command("list")
def list_presets(ctx: typer.Context, json: Json = False) -> None:
    """List the presets."""
    from lepton.evidence import summary

    with connect(ctx) as client:
        found = client.policies().presets
    if json:
        print_json(found)
        return
    show(
        list(found.items()),
        {
            "NAME": lambda named: named[0],
            "ON FAILURE": lambda named: named[1].on_failure.value,
            "WHAT IT DOES": lambda named: summary(named[1]),
        },
    )


@commands.command("show")
def show_policy(
    ctx: typer.Context,
    which: Annotated[str, typer.Argument(metavar="MODEL|PRESET", help="A preset's name wins over a model's.")],
    json: Json = False,
) -> None:
    """Print a policy as YAML, as `policy set` and `rollout start` take it."""
    from lepton.rollouts import StoredPolicy

    with connect(ctx) as client:
        presets = client.policies().presets
        if which in presets:
            stored = StoredPolicy(model="", policy=presets[which], source=which)
            told = f"the preset {which}"
        else:
            stored = client.policy(which)
            told = f"{which}: {f'set by {stored.source}' if stored.at else 'the default, no policy is set'}"
    if json:
        print_json(stored.policy if which in presets else stored)
        return
    from lepton.documents import to_yaml

    console.file.write(f"# {told}\n{to_yaml(stored.policy.model_dump(mode='json'))}")


@commands.command("set")
def set_policy(
    ctx: typer.Context,
    model: Name,
    policy: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A preset's name, or a YAML or JSON file.")],
    json: Json = False,
) -> None:
    """Make a policy the model's, for its rollouts from now on."""
    with connect(ctx) as client:
        stored = client.set_policy(model, policy)
    if json:
        print_json(stored)
        return
    from lepton.evidence import summary

    console.print(f"Versions of {model} now come to live traffic by {summary(stored.policy)}.", markup=False)


@commands.command("unset")
def unset_policy(ctx: typer.Context, model: Name, json: Json = False) -> None:
    """Take the model's own policy away; the default holds again."""
    with connect(ctx) as client:
        client.unset_policy(model)
    if json:
        print_json({"unset": model})
    else:
        console.print(f"{model} has no policy of its own any more.", markup=False)


@commands.command()
def schema(json: Json = False) -> None:
    """Print the JSON schema of a policy (docs/policy.schema.json), by which editors check and complete."""
    from lepton.policies import Policy

    print_json(Policy.model_json_schema())
