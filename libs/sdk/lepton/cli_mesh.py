"""The commands about the mesh: look at a model's live objects, move its traffic by hand, give the wheel back."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lepton.connect import connect
from lepton.render import Json, console, print_json, progress_console

if TYPE_CHECKING:
    from lepton.rollouts import MeshView

commands = typer.Typer(no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="MODEL")]
# The host of a model in the mesh is MODEL.TENANT and this.
_HOSTS = ".models.lepton"


class Form(StrEnum):
    YAML = "yaml"
    JSON = "json"


@commands.command()
def show(
    ctx: typer.Context,
    model: Name,
    form: Annotated[Form, typer.Option("-o", "--output", help="How to print it.")] = Form.YAML,
    json: Json = False,
) -> None:
    """Print a model's live VirtualService and DestinationRule, as `mesh apply` takes them."""
    with connect(ctx) as client:
        view = client.mesh(model)
    if json or form is Form.JSON:
        print_json(view)
        return
    from lepton.documents import to_yaml

    documents = "---\n".join(map(to_yaml, (view.virtual_service, view.destination_rule)))
    console.file.write(f"# {_holder(view)}\n{documents}")


@commands.command()
def apply(
    ctx: typer.Context,
    file: Annotated[Path, typer.Option("-f", "--file", dir_okay=False, exists=True, help="A VirtualService in YAML.")],
    model: Annotated[str | None, typer.Option(help="Default: as the file's host or name says.")] = None,
    reason: Annotated[str | None, typer.Option(help="Why; the timeline keeps it.")] = None,
    json: Json = False,
) -> None:
    """Move a model's traffic by hand, with an Istio VirtualService; the judge only watches until you give it back."""
    service, others = _virtual_service(file)
    for kind in others:
        progress_console.print(f"[dim]{kind} in {file} is left as it is: rollout makes it from what is loaded.[/]")
    name = model or _model_of(service, file)
    with connect(ctx) as client:
        view = client.apply_mesh(name, service, reason=reason)
    if json:
        print_json(view)
        return
    console.print(f"{_holder(view)}; the judge only watches.", markup=False)
    console.print(f"`lepton rollout resume {name}` gives it back to rollout.")


@commands.command()
def release(ctx: typer.Context, model: Name, json: Json = False) -> None:
    """Give a model's traffic back to rollout."""
    with connect(ctx) as client:
        view = client.release_mesh(model)
    if json:
        print_json(view)
    else:
        console.print(f"The traffic of {model} is rollout's again.", markup=False)


def _holder(view: "MeshView") -> str:
    by = "by rollout" if view.held_by == "rollout" else f"by hand, by {view.held_by}"
    return f"The traffic of {view.model} is moved {by}"


def _virtual_service(file: Path) -> tuple[dict[str, Any], list[str]]:
    """The file's only VirtualService, and the kinds of what else is in it."""
    from lepton.documents import read_documents
    from lepton.errors import Invalid

    found: list[dict[str, Any]] = []
    others: list[str] = []
    for document in read_documents(file):
        content = document.content
        if not isinstance(content, dict):
            continue
        if content.get("kind") == "VirtualService":
            found.append(content)
        else:
            others.append(str(content.get("kind", "A document without a kind")))
    if len(found) != 1:
        number = f"{len(found)} VirtualServices" if found else "no VirtualService"
        hint = "`lepton mesh show MODEL` prints the live one, to begin with."
        raise Invalid(f"{file} has {number}, expected one (a document with `kind: VirtualService`).", hint=hint)
    return found[0], others


def _model_of(service: dict[str, Any], file: Path) -> str:
    """The model that the document is about, by its first host or its own name."""
    from lepton.errors import Invalid

    match service:
        case {"spec": {"hosts": [str(host), *_]}} if host.endswith(_HOSTS):
            return host.partition(".")[0]
        case {"metadata": {"name": str(name)}}:
            return name
    hint = "Name it with --model, or give spec.hosts as MODEL.TENANT.models.lepton."
    raise Invalid(f"{file} does not say which model it is about.", hint=hint)
