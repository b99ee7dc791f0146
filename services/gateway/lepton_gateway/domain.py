"""What a caller may ask of `/v2`, and what the state of the pools means for a model. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from hashlib import blake2b
from typing import Any
from urllib.parse import unquote

import orjson
from lepton_common.auth import Caller
from lepton_common.errors import Invalid, LeptonError, NotFound
from lepton_common.records import Loaded, LoadState, Serving, Sticky, WorkerState

# Where users are told apart by their API keys and not by a header.
BY_KEY = "key"


class Page(Enum):
    """The kinds of thing behind a path."""

    SERVER = auto()
    LIVE = auto()
    READY = auto()
    MODEL = auto()
    MODEL_READY = auto()
    INFER = auto()
    CONFIG = auto()
    STATS = auto()
    INDEX = auto()
    LOAD = auto()
    UNLOAD = auto()
    TRACE = auto()
    LOGGING = auto()
    TRACES = auto()
    TRACED = auto()
    DOCS = auto()
    MODEL_DOCS = auto()
    SHARED_MEMORY = auto()
    PROCESS_LIVE = auto()
    PROCESS_READY = auto()


METHODS: Mapping[Page, tuple[str, ...]] = {
    **dict.fromkeys(Page, ("GET", "HEAD")),
    **dict.fromkeys((Page.INFER, Page.INDEX, Page.LOAD, Page.UNLOAD), ("POST",)),
    **dict.fromkeys((Page.TRACE, Page.LOGGING), ("GET", "HEAD", "POST")),
    Page.SHARED_MEMORY: ("GET", "HEAD", "POST"),
}

_PAGES: Mapping[tuple[str, ...], Page] = {
    ("v2",): Page.SERVER,
    ("v2", "health", "live"): Page.LIVE,
    ("v2", "health", "ready"): Page.READY,
    ("v2", "models", "stats"): Page.STATS,
    ("v2", "repository", "index"): Page.INDEX,
    ("v2", "trace", "setting"): Page.TRACE,
    ("v2", "logging"): Page.LOGGING,
    ("v2", "traces"): Page.TRACES,
    ("v2", "docs"): Page.DOCS,
    ("health", "live"): Page.PROCESS_LIVE,
    ("health", "ready"): Page.PROCESS_READY,
}
_OF_MODEL: Mapping[tuple[str, ...], Page] = {
    (): Page.MODEL,
    ("ready",): Page.MODEL_READY,
    ("infer",): Page.INFER,
    ("config",): Page.CONFIG,
    ("stats",): Page.STATS,
    ("trace", "setting"): Page.TRACE,
    ("docs",): Page.MODEL_DOCS,
}
_OF_REPOSITORY: Mapping[tuple[str, ...], Page] = {("load",): Page.LOAD, ("unload",): Page.UNLOAD}


class NotAllowed(LeptonError):
    """A method that this path does not take."""

    def __init__(self, allowed: tuple[str, ...]) -> None:
        super().__init__(f"Method Not Allowed: use {', '.join(allowed)}")
        self.allowed = allowed


@dataclass(frozen=True, slots=True)
class Target:
    """A path, understood. `model` and `request_id` are empty, `version` is None where the path names none."""

    page: Page
    model: str = ""
    version: int | None = None
    request_id: str = ""


def target_of(raw: bytes) -> Target:
    """What a request's target asks for; names may be percent-encoded. Raises NotFound for a path that is not there."""
    path = raw.partition(b"?")[0].decode("ascii", "replace")
    if not path.startswith("/"):  # the absolute form, http://host/path
        path = "/" + path.partition("://")[2].partition("/")[2]
    segments = tuple(unquote(segment) for segment in path.strip("/").split("/"))
    page = _PAGES.get(segments)
    if page is not None:
        return Target(page)
    match segments:
        case ("v2", "models", model, "versions", version, *rest) if tuple(rest) in _OF_MODEL:
            return Target(_OF_MODEL[tuple(rest)], model, version_of(model, version))
        case ("v2", "models", model, *rest) if model and tuple(rest) in _OF_MODEL:
            return Target(_OF_MODEL[tuple(rest)], model)
        case ("v2", "repository", "models", model, *rest) if tuple(rest) in _OF_REPOSITORY:
            return Target(_OF_REPOSITORY[tuple(rest)], model)
        case ("v2", "traces", identity) if identity:
            return Target(Page.TRACED, request_id=identity)
        case ("v2", "systemsharedmemory" | "cudasharedmemory", *_):
            return Target(Page.SHARED_MEMORY)
    raise NotFound("Not Found")


def version_of(model: str, text: str) -> int:
    """The number of a version that a caller names. Raises NotFound for what is none."""
    if text.isascii() and text.isdigit() and len(text) < 10:
        return int(text)
    raise NotFound(f"model {model[:80]!r} has no version {text[:80]!r}")


def user_of(sticky: Sticky, headers: Mapping[bytes, bytes], caller: Caller) -> int | None:
    """A hash of who is asking, by what the model's record says names them; None for nobody in particular."""
    name = (
        caller.key_id.encode() if sticky.by == BY_KEY else headers.get(sticky.by.lower().encode("latin-1", "replace"))
    )
    if not name:
        return None
    return int.from_bytes(blake2b(sticky.salt.encode() + name, digest_size=8).digest(), "big")


# --- documents -------------------------------------------------------------------------------------------------------


def json_object(body: bytes) -> dict[str, Any]:
    """The object in the body; an empty body is an empty object. Raises Invalid."""
    if not body.strip():
        return {}
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Invalid(f"the request is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise Invalid("the request must be a JSON object")
    return document


# --- states ---------------------------------------------------------------------------------------------------------

_BEST_FIRST = (LoadState.READY, LoadState.LOADING, LoadState.UNLOADING, LoadState.FAILED)
_OIP_STATES = {
    LoadState.READY: "READY",
    LoadState.LOADING: "LOADING",
    LoadState.UNLOADING: "UNLOADING",
    LoadState.FAILED: "UNAVAILABLE",
}


def state_of(serving: Serving, version: int, workers: Iterable[WorkerState]) -> tuple[LoadState, str]:
    """The best state any worker has the version in, and the reason if that is a failure; LOADING before any has it."""
    found: list[Loaded] = [
        loaded
        for worker in workers
        for loaded in worker.versions
        if (loaded.tenant, loaded.model, loaded.version) == (serving.tenant, serving.model, version)
    ]
    if not found:
        return LoadState.LOADING, "no worker has it yet"
    best = min(found, key=lambda loaded: _BEST_FIRST.index(loaded.state))
    return best.state, best.reason


def unready_reason(serving: Serving, version: int | None, workers: Iterable[WorkerState]) -> str | None:
    """Why the model, or the given version of it, cannot answer now; None when it can.

    A model is ready when every version that takes traffic is ready on some worker.
    """
    workers = tuple(workers)
    if version is not None:
        wanted = [version]
    else:
        wanted = [share.version for share in serving.split if share.percent > 0]
        if not wanted:
            return f"model {serving.model!r} takes no traffic: it is not loaded"
    for each in wanted:
        if serving.assigned(each) is None:
            return f"version {each} of model {serving.model!r} is not loaded"
        state, reason = state_of(serving, each, workers)
        if state is not LoadState.READY:
            return f"version {each} of model {serving.model!r} is {state}" + (f": {reason}" if reason else "")
    return None


def index_of(serving: Serving, workers: Iterable[WorkerState]) -> list[dict[str, str]]:
    """The model's entries in the repository index, one for each version that is loaded or being loaded."""
    workers = tuple(workers)
    if not serving.versions:
        return [{"name": serving.model, "state": "UNAVAILABLE", "reason": "unloaded"}]
    entries = []
    for assigned in sorted(serving.versions, key=lambda assigned: assigned.version):
        state, reason = state_of(serving, assigned.version, workers)
        entries.append(
            {
                "name": serving.model,
                "version": str(assigned.version),
                "state": _OIP_STATES[state],
                "reason": "" if state is LoadState.READY else reason,
            }
        )
    return entries


# --- statistics -----------------------------------------------------------------------------------------------------


def summed(statistics: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Several workers' `model_stats` entries as one of each model and version: counts and times add up."""
    by_version: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in statistics:
        key = (entry["name"], entry["version"])
        by_version[key] = _added(by_version[key], entry) if key in by_version else dict(entry)
    return [by_version[key] for key in sorted(by_version)]


def _added(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for name, value in one.items():
        match value:
            case int() if name == "last_inference":
                total[name] = max(value, other[name])
            case int():
                total[name] = value + other[name]
            case dict():
                total[name] = _added(value, other[name]) if value else other[name]
            case list() if name == "batch_stats":
                total[name] = _added_batches([*value, *other[name]])
            case list():
                total[name] = [*value, *other[name]]
            case _:
                total[name] = value
    return total


def _added_batches(entries: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    by_size: dict[int, dict[str, Any]] = {}
    for entry in entries:
        size = entry["batch_size"]
        by_size[size] = {**_added(by_size[size], entry), "batch_size": size} if size in by_size else dict(entry)
    return [by_size[size] for size in sorted(by_size)]
