"""Dead letters: what could not be handled and why; and how it is put back. The services write them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import uuid4

from lepton.errors import Conflict, Invalid, NotFound
from lepton.events import DEAD, Header, Kafka, Record, unknown_topic

_STORY = "lepton-dlq-"
_REPLAY = "lepton-replay"
_REPLAY_OF = "lepton-replay-of"
_FORBIDDEN = "forbidden"
# Of Lepton's own errors the name says nothing that the message does not.
_CLASS_PATH = re.compile(r"^(?:lepton_common\.errors\.\w+: |(?:\w+\.)+(?=\w+(?:: |$)))")


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter; `replayed_at` is when it was put back last."""

    record: Record
    replayed_at: datetime | None = None

    @property
    def topic(self) -> str:
        """The topic that it is of."""
        return self.record.topic.removesuffix(DEAD)

    @property
    def place(self) -> str:
        """Where the message was."""
        return "/".join([self.topic, *(self.record.header(f"{_STORY}{name}") for name in ("partition", "offset"))])

    @property
    def id(self) -> str:
        return self.place if self.record.id == self.record.place else self.record.id

    @property
    def error(self) -> str:
        """The end of the error, which says what it was, without the path of its class."""
        return _CLASS_PATH.sub("", (self.record.header(f"{_STORY}error").splitlines() or [""])[-1])

    def shown(self) -> dict[str, Any]:
        """All of it, for programs."""
        story = {
            name: self.record.header(f"{_STORY}{name}")
            for name in ("reason", "error", "attempts", "first-failure", "consumer", "without")
        }
        replayed = self.replayed_at.isoformat() if self.replayed_at else None
        return {"id": self.id, "of": self.topic, **story, "replayed_at": replayed, "message": self.record.shown()}


def letters(kafka: Kafka, topic: str | None = None) -> list[Letter]:
    """The dead letters, of one topic or of all, the oldest first. Raises NotFound for a topic that has none."""
    known = kafka.topics()
    wanted = [each for each in known if each.endswith(DEAD)]
    if topic is not None:
        wanted = [each for each in wanted if topic in (each, each.removesuffix(DEAD))]
        if not wanted:
            raise unknown_topic(topic, [each.removesuffix(DEAD) for each in known if each.endswith(DEAD)])
    found: list[Record] = []
    replayed: dict[str, datetime] = {}
    for record in kafka.read(wanted, follow=False, from_beginning=True):
        if of := record.header(_REPLAY_OF):
            replayed[of] = record.at
        else:
            found.append(record)
    return [Letter(each, replayed.get(each.place)) for each in found]


def chosen(found: Sequence[Letter], identity: str | None, *, force: bool) -> list[Letter]:
    """Those with the id, or all, that were not replayed before (with `force` those, too). Raises NotFound, Conflict.

    A letter whose sender had no right is replayed by its id only: with a key of ours it would have ours.
    """
    meant = [
        each
        for each in found
        if identity in (each.id, each.place)
        or (identity is None and each.record.header(f"{_STORY}reason") != _FORBIDDEN)
    ]
    if not meant:
        raise NotFound(
            f"There is no dead letter {identity!r}." if identity else "There are no dead letters.",
            hint="`lepton events dlq list` lists them.",
        )
    fresh = [each for each in meant if force or each.replayed_at is None]
    if not fresh:
        raise Conflict(
            f"{'It was' if len(meant) == 1 else 'All of them were'} replayed before.",
            hint="What failed again is a new dead letter. --force replays it once more all the same.",
        )
    return fresh


@dataclass(frozen=True, slots=True)
class Replay:
    """A letter whose message goes back, with which headers; `run` marks what goes back together."""

    letter: Letter
    headers: list[Header]
    run: str


def replays(wanted: Sequence[Letter], key: str | None) -> list[Replay]:
    """What is to be sent. Each message keeps its own id, and has the header `lepton-replay`.

    One that came with an API key gets `key`, since dead letters keep none. Raises Invalid where that is missing.
    """
    run = uuid4().hex
    return [Replay(each, _as_it_was(each, key), run) for each in wanted]


def send(kafka: Kafka, prepared: Sequence[Replay]) -> None:
    """Every message is where it was; its letter counts as replayed."""
    for each in prepared:
        letter, record, mark = each.letter, each.letter.record, (_REPLAY, each.run)
        kafka.send(letter.topic, record.key, record.value, [*each.headers, mark])
        # Not before: should this fail, the message may come once more, and a repeat changes nothing.
        kafka.send(record.topic, record.key, None, [mark, (_REPLAY_OF, record.place)])


def _as_it_was(letter: Letter, key: str | None) -> list[Header]:
    headers: list[Header] = [
        (name, value) for name, value in letter.record.headers if not name.startswith(_STORY) and name != _REPLAY
    ]
    if "authorization" in letter.record.header(f"{_STORY}without"):
        if not key:
            raise Invalid(
                f"{letter.id} came with an API key, and dead letters keep none.",
                hint="Set LEPTON_API_KEY to a key of the tenant that the message is for.",
            )
        headers.append(("authorization", f"Bearer {key}"))
    return headers
