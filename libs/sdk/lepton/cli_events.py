"""`lepton events`: what the platform tells on Kafka, and what of it could not be handled."""

import contextlib
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from lepton.render import Json, console, print_json, print_json_line, progress_console, when

if TYPE_CHECKING:
    from lepton.dead_letters import Letter
    from lepton.events import Record

commands = typer.Typer(no_args_is_help=True)
letters = typer.Typer(no_args_is_help=True)
commands.add_typer(letters, name="dlq", help="Dead letters: messages that could not be handled, and why.")

OfTopic = Annotated[str | None, typer.Option("--topic", help="Those of one topic, such as lepton.ingest.")]
_MOST_CHARS = 300


@commands.command()
def tail(
    topic: Annotated[
        list[str] | None,
        typer.Option(help="Repeat for more. Default: all but dead letters and what speaks all the time."),
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--type", help="Only events of this type, such as TrafficShifted.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Only what is about this model.")] = None,
    from_beginning: Annotated[bool, typer.Option("--from-beginning", help="Begin with the oldest kept.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", "-n", min=1, help="End after so many.")] = None,
    json: Json = False,
) -> None:
    """Follow events as they come; Ctrl-C ends it. Talks to Kafka itself: LEPTON_KAFKA, else the local platform's."""
    from lepton.events import DEAD, LOUD, Kafka, address, unknown_topic

    kafka = Kafka(address())
    known = kafka.topics()
    for each in topic or []:
        if each not in known:
            raise unknown_topic(each, known)
    wanted = topic or [each for each in known if not each.endswith(DEAD) and each not in LOUD]
    found = (
        each
        for each in kafka.read(wanted, follow=True, from_beginning=from_beginning)
        if kind in (None, each.type) and model in (None, each.model)
    )
    if console.is_terminal:
        which = (f" of the type {escape(kind)}" if kind else "") + (f" about {escape(model)}" if model else "")
        progress_console.print(f"[dim]waiting for events{which} …, Ctrl-C ends[/]")
    with contextlib.suppress(KeyboardInterrupt):
        for record in islice(found, limit):
            if json:
                print_json_line(record.shown())
            else:
                _print(record)


def _print(record: "Record") -> None:
    from lepton.events import fields, local_time

    data = record.data
    subject = record.header("ce_subject") or (record.key or b"").decode(errors="replace") or record.id
    told = fields(data) if isinstance(data, dict) else str(data)
    cut = told if len(told) <= _MOST_CHARS else f"{told[:_MOST_CHARS]}…"
    kind = record.type if record.type != "-" else record.topic
    console.print(
        f"[dim]{local_time(record.at)}[/] [bold]{escape(kind):<18}[/] {escape(subject)} {escape(cut)}", soft_wrap=True
    )


@letters.command("list")
def list_letters(topic: OfTopic = None, json: Json = False) -> None:
    """List dead letters, the oldest first, and whether they were replayed."""
    from lepton import dead_letters
    from lepton.events import Kafka, address

    found = dead_letters.letters(Kafka(address()), topic)
    if json:
        print_json([each.shown() for each in found])
    else:
        _show(found)


@letters.command()
def replay(
    topic: OfTopic = None,
    identity: Annotated[str | None, typer.Option("--id", help="One of them, as `dlq list` names it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show which they are.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also what was replayed before.")] = False,
    json: Json = False,
) -> None:
    """Put messages back where they were, with the same id: what took effect before changes nothing.

    One that came with an API key gets that of LEPTON_API_KEY: dead letters keep none.
    """
    from lepton import dead_letters
    from lepton.events import Kafka, address

    if topic is None and identity is None:
        raise typer.BadParameter("say which: --topic, or --id as `lepton events dlq list` names it")
    kafka = Kafka(address())
    wanted = dead_letters.chosen(dead_letters.letters(kafka, topic), identity, force=force)
    prepared = dead_letters.replays(wanted, os.environ.get("LEPTON_API_KEY"))
    if not dry_run:
        dead_letters.send(kafka, prepared)
    if json:
        print_json({"replayed": not dry_run, "letters": [each.shown() for each in wanted]})
        return
    _show(wanted)
    count = f"{len(wanted)} dead letter{'s' if len(wanted) > 1 else ''}"
    progress_console.print(f"Would replay {count}." if dry_run else f"Replayed {count}.")


def _show(found: "Sequence[Letter]") -> None:
    """Two lines for each: an id and an error do not fit beside each other."""
    if not found:
        console.print("No dead letters.")
    now = datetime.now(UTC)
    for letter in found:
        told = [letter.topic, letter.record.header("lepton-dlq-reason"), when(letter.record.at, now)]
        if letter.replayed_at is not None:
            told.append(f"replayed {when(letter.replayed_at, now)}")
        console.print(f"[bold]{escape(letter.id)}[/]  {escape(', '.join(told))}", soft_wrap=True)
        console.print(f"    {escape(letter.error)}", soft_wrap=True)
