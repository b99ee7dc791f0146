"""Operations without I/O: a flow yields the steps it needs done and is sent their results.

Each operation is written once, as a flow; `client.py` has one driver that blocks and one that awaits.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, TypeAdapter, ValidationError

from lepton.errors import Invalid, LeptonError
from lepton.models import Page

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

Body: TypeAlias = bytes | Callable[[], Iterator[bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One HTTP exchange; answered by a Reply.

    `repeatable`: sending it twice does no more than sending it once.
    `accepts`: statuses from 400 on that are answers and no errors.
    """

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Body | None = None
    timeout_s: float = 30.0
    repeatable: bool = False
    accepts: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Work:
    """Something that takes the processor for a while; answered by what `run` returns."""

    run: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Pause:
    """A wait; answered by a monotonic clock in seconds, read after it."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer; header names are lower-case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


Flow: TypeAlias = Generator[Ask | Work | Pause, Any, T]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a long operation is: `done` of `total` (bytes of an upload, percent of traffic of a deployment).

    `note` is what it waits for, where that is known.
    """

    stage: str
    done: float
    total: float
    note: str = ""


OnProgress: TypeAlias = Callable[[Progress], None]


def work(run: Callable[[], T]) -> Flow[T]:
    result: T = yield Work(run)
    return result


def pause(seconds: float) -> Flow[float]:
    now: float = yield Pause(seconds)
    return now


def ask(request: Ask) -> Flow[Reply]:
    reply: Reply = yield request
    return reply


def get(kind: type[M], path: str) -> Flow[M]:
    """What is at the path. Raises NotFound."""
    reply = yield from ask(Ask(method="GET", path=path, repeatable=True))
    return parsed(kind, reply)


def post(kind: type[M], path: str, content: BaseModel | None = None, *, repeatable: bool = False) -> Flow[M]:
    """What the platform made of the content."""
    return parsed(kind, (yield from ask(post_request(path, content, repeatable=repeatable))))


def post_request(path: str, content: BaseModel | None = None, *, repeatable: bool = False) -> Ask:
    body = b"" if content is None else content.model_dump_json().encode()
    headers = {} if content is None else {"content-type": "application/json"}
    return Ask(method="POST", path=path, headers=headers, body=body, repeatable=repeatable)


def get_list(kind: type[M], path: str, query: Mapping[str, str] | None = None) -> Flow[list[M]]:
    """All items of a short list, which comes whole."""
    reply = yield from ask(Ask(method="GET", path=path, query=query or {}, repeatable=True))
    return parsed(list[kind], reply)  # type: ignore[valid-type]  # mypy takes no type from a variable.


def get_pages(kind: type[M], path: str) -> Flow[list[M]]:
    """All items of a long list, from as many pages as it has."""
    items: list[M] = []
    cursor: dict[str, str] = {}
    while True:
        reply = yield from ask(Ask(method="GET", path=path, query=cursor, repeatable=True))
        page = parsed(Page[kind], reply)  # type: ignore[valid-type]  # mypy takes no type from a variable.
        items += page.items
        if page.next is None:
            return items
        cursor = {"after": page.next}


def parsed(kind: type[T], reply: Reply) -> T:
    """The shape in the reply's body. Raises LeptonError when something other than Lepton answered."""
    try:
        return TypeAdapter(kind).validate_json(reply.body)
    except ValidationError as error:
        hint = "Is the URL that of a Lepton platform, and is the platform of this version?"
        raise LeptonError("The platform's answer is not understood.", hint=hint) from error


def checked(kind: type[M], **fields: object) -> M:
    """A request's shape. Raises Invalid, naming the first field that is wrong."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Invalid(f"{where} {first['input']!r}: {first['msg']}") from error


def segment(name: object) -> str:
    """A name as one segment of a path."""
    return quote(str(name), safe="")
