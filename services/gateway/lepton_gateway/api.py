"""The gateway's HTTP: Open Inference Protocol v2 for every model of the caller's tenant, and health."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

import orjson
import structlog
from lepton_common import oip
from lepton_common.auth import NO_LIMITS, Caller, forbidden
from lepton_common.errors import Denied, Forbidden, Invalid, LeptonError, NotFound, Unavailable, Unsupported, status_of
from lepton_common.health import Readiness
from lepton_common.http11 import JSON, Head, Refused, Request, error_body
from lepton_common.records import Scope
from lepton_common.signature import Signature
from lepton_common.types import checked_name

from lepton_gateway.callers import Callers
from lepton_gateway.docs import Docs
from lepton_gateway.domain import (
    METHODS,
    NotAllowed,
    Page,
    Target,
    index_of,
    json_object,
    target_of,
    unready_reason,
    user_of,
    version_of,
)
from lepton_gateway.proxy import Proxy
from lepton_gateway.repository import Repository, ready_only
from lepton_gateway.request_ids import id_line
from lepton_gateway.routes import Route, Routes

_VERSION = version("lepton-gateway")
_MAX_TARGETS, _MAX_TARGET_BYTES = 4096, 1024
# What is answered before etcd's tables are read, and how long everything else waits for them.
_AT_ONCE = frozenset({Page.SERVER, Page.LIVE, Page.READY, Page.PROCESS_LIVE, Page.PROCESS_READY})
_CHALLENGE = b"www-authenticate: Bearer\r\n"
_START_PATIENCE_S, _START_GRAIN_S = 5.0, 0.05

_log: structlog.stdlib.BoundLogger = structlog.get_logger()

T = TypeVar("T")
Handler = Callable[[Request, Target], None]


class Api:
    """Answers requests. `handle` is the server's handler."""

    def __init__(
        self,
        routes: Routes,
        callers: Callers,
        proxy: Proxy,
        repository: Repository,
        readiness: Readiness,
    ) -> None:
        self._routes = routes
        self._callers = callers
        self._proxy = proxy
        self._repository = repository
        self._readiness = readiness
        self._ways = proxy.ways(self._refuse)
        self.refused: dict[int, int] = {}  # answers that the gateway gave instead of the mesh, by status
        self._targets: dict[bytes, Target] = {}
        self._docs = Docs()
        self._tasks: set[asyncio.Task[None]] = set()
        self._pages: dict[Page, Handler] = {
            Page.INFER: self._infer,
            Page.SERVER: self._server,
            Page.LIVE: lambda request, target: answer(request, {"live": True}),
            Page.READY: self._ready,
            Page.MODEL: lambda request, target: self._ask(request, target, "GET"),
            Page.CONFIG: lambda request, target: self._ask(request, target, "GET /config"),
            Page.MODEL_READY: self._model_ready,
            Page.STATS: self._statistics,
            Page.INDEX: self._index,
            Page.LOAD: self._change,
            Page.UNLOAD: self._change,
            Page.TRACE: self._trace,
            Page.LOGGING: self._logging,
            Page.TRACES: self._traces,
            Page.TRACED: self._traced,
            Page.DOCS: self._docs_index,
            Page.MODEL_DOCS: self._docs_of_model,
            Page.SHARED_MEMORY: self._shared_memory,
            Page.PROCESS_LIVE: lambda request, target: answer(request, {"status": "live"}),
            Page.PROCESS_READY: self._process_ready,
        }

    def handle(self, request: Request) -> None:
        """The request is answered, now or when the mesh has. Nothing the caller sent raises."""
        try:
            target = self._targets.get(request.target) or self._understand(request.target)
            if request.method not in METHODS[target.page]:
                raise NotAllowed(METHODS[target.page])
            if self._readiness.started or target.page in _AT_ONCE:
                self._pages[target.page](request, target)
            else:
                self._when_started(request)
        except LeptonError as error:
            self._refuse(request, error)

    def screen(self, head: Head, peer: str) -> None:
        """See `http11.Server`: only who has a key, or needs none, may send what is large."""
        headers = head.headers
        try:
            self._callers.check_head(headers, headers.get(b"host", b""), peer, Scope.INFER)
        except Denied as error:
            # Who has a key hears what it is not good for when all is there.
            if not (isinstance(error, Forbidden) and error.key_id):
                self._callers.refused(headers, peer, error, f"{head.method} with a large body")
                status = status_of(error)
                raise Refused(status, error.message, _CHALLENGE if status == 401 else b"") from None
        except Unavailable:
            pass  # The table of keys is not read yet: the request itself waits for it.

    def _when_started(self, request: Request, patience_s: float = _START_PATIENCE_S) -> None:
        """Callers of a gateway that was just restarted wait for its tables rather than fail."""
        if self._readiness.started:
            self.handle(request)
        elif patience_s <= 0:
            self._refuse(request, Unavailable("the gateway is starting", retry_after_s=1))
        else:
            loop = asyncio.get_running_loop()
            loop.call_later(_START_GRAIN_S, self._when_started, request, patience_s - _START_GRAIN_S)

    def _understand(self, raw: bytes) -> Target:
        target = target_of(raw)
        if len(raw) <= _MAX_TARGET_BYTES:  # Longer ones are nobody's habit.
            if len(self._targets) >= _MAX_TARGETS:
                self._targets.clear()
            self._targets[raw] = target
        return target

    # --- through the mesh ---

    def _infer(self, request: Request, target: Target) -> None:
        caller = self._callers.check(request, Scope.INFER, target.model)
        version = _wanted_version(request, caller, target)
        route = self._route(caller, target, version)
        ask = partial(self._ask_model, caller, route, version)
        # The limits of a key are counted where the model is asked. Work in the background, of which there is much, must
        # not push out what callers ask for.
        cache = route.cache if caller.limits is NO_LIMITS and not request.background else None
        if cache is None or not cache.answer(request, version, ask):
            ask(request)

    def _ask_model(self, caller: Caller, route: Route, version: int | None, request: Request) -> None:
        """The model is asked, or the request refused."""
        user = None if route.sticky is None or version is not None else user_of(route.sticky, request.headers, caller)
        try:
            self._proxy.infer(self._ways, request, route, caller, version, user)
        except LeptonError as error:
            self._refuse(request, error)

    def _ask(self, request: Request, target: Target, line: str) -> None:
        """Something that a worker knows of the model."""
        caller = self._callers.check_reader(request, target.model)
        version = _wanted_version(request, caller, target)
        self._proxy.send(request, self._route(caller, target, version), line, version, b"")

    def _route(self, caller: Caller, target: Target, version: int | None) -> Route:
        route = self._known(caller.tenant, target.model, version)
        if version is None and not route.serving.split:
            raise Unavailable(f"model {target.model!r} takes no traffic: it is not loaded", retry_after_s=1)
        return route

    def _known(self, tenant: str, model: str, version: int | None) -> Route:
        """The model's route; the version, where one is named, is loaded or being loaded."""
        route = self._routes.get(tenant, model)
        if version is not None and not route.has(version):
            raise NotFound(f"model {model!r} has no version {version} that is loaded")
        return route

    # --- from memory ---

    def _server(self, request: Request, target: Target) -> None:
        answer(request, {"name": "lepton", "version": _VERSION, "extensions": oip.EXTENSIONS})

    def _ready(self, request: Request, target: Target) -> None:
        reasons = self._readiness.reasons()
        if reasons:
            answer(request, {"ready": False, "error": "; ".join(reasons.values())}, 503, b"retry-after: 1\r\n")
        else:
            answer(request, {"ready": True})

    def _process_ready(self, request: Request, target: Target) -> None:
        status, body = self._readiness.answer()
        request.respond(status, JSON, body)

    def _model_ready(self, request: Request, target: Target) -> None:
        caller = self._callers.check_reader(request, target.model)
        serving = self._known(caller.tenant, target.model, target.version).serving
        reason = unready_reason(serving, target.version, self._routes.workers())
        if reason is None:
            answer(request, {"name": target.model, "ready": True})
        else:
            answer(request, {"name": target.model, "ready": False, "error": reason}, 503, b"retry-after: 1\r\n")

    def _shared_memory(self, request: Request, target: Target) -> None:
        raise Unsupported("shared memory is not supported: send tensors as binary data")

    # --- control ---

    def _index(self, request: Request, target: Target) -> None:
        caller = self._callers.check_reader(request)
        wanted = ready_only(request)
        workers = tuple(self._routes.workers())
        routes = self._routes.of(caller)
        entries = [entry for route in routes for entry in index_of(route.serving, workers)]
        answer(request, [entry for entry in entries if entry["state"] == "READY" or not wanted])

    def _change(self, request: Request, target: Target) -> None:
        self._callers.check(request, Scope.DEPLOY, target.model)
        checked_name("model", target.model)  # It becomes part of a path.
        self._later(request, self._repository.change(request, target.model, target.page.name.lower()))

    def _statistics(self, request: Request, target: Target) -> None:
        caller = self._callers.check_reader(request, target.model or None)
        known = [self._known(caller.tenant, target.model, target.version)] if target.model else None
        routes = self._routes.of(caller) if known is None else known
        self._later(request, self._repository.statistics(routes, target.version))

    def _trace(self, request: Request, target: Target) -> None:
        changes = request.method == "POST"
        model = None
        if target.model:
            check = partial(self._callers.check, scope=Scope.DEPLOY) if changes else self._callers.check_reader
            caller = check(request, model=target.model)
            model = self._routes.get(caller.tenant, target.model).serving.ref
        elif changes:
            self._callers.check_operator(request)
        else:
            self._callers.check_reader(request)
        tracing = self._proxy.tracing
        answer(request, tracing.update(model, json_object(request.body)) if changes else tracing.view(model))

    def _logging(self, request: Request, target: Target) -> None:
        logs = self._proxy.logs
        if request.method == "POST":
            self._callers.check_operator(request)
            answer(request, logs.update(json_object(request.body)))
        else:
            self._callers.check_reader(request)
            answer(request, logs.view())

    def _traces(self, request: Request, target: Target) -> None:
        caller = self._callers.check(request, Scope.READ)
        found = self._proxy.tracing.traces.newest_first(caller)
        answer(request, [each.model_dump(mode="json") for each in found])

    def _traced(self, request: Request, target: Target) -> None:
        caller = self._callers.check(request, Scope.READ)
        answer(request, self._proxy.tracing.traces.get(caller, target.request_id).model_dump(mode="json"))

    def _docs_index(self, request: Request, target: Target) -> None:
        caller = self._callers.check_reader(request)
        self._docs.index(request, [route.serving.model for route in self._routes.of(caller)])

    def _docs_of_model(self, request: Request, target: Target) -> None:
        caller = self._callers.check_reader(request, target.model)
        route = self._route(caller, target, target.version)
        version = target.version or route.serving.stable or route.serving.split[0].version
        named = "" if target.version is None else str(version)

        def show(request: Request, signature: Signature) -> None:
            self._docs.model(request, target.model, named, signature, keyless=not caller.key_id)

        self._later(request, self._repository.signature(route, version), show)

    def _later(self, request: Request, work: Awaitable[T], show: Callable[[Request, T], None] | None = None) -> None:
        """Answer with what `work` returns, by `show`, else as JSON; None is an empty answer."""
        task = asyncio.ensure_future(self._answer_later(request, work, show or answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer_later(self, request: Request, work: Awaitable[T], show: Callable[[Request, T], None]) -> None:
        try:
            document = await work
        except LeptonError as error:
            self._refuse(request, error)
        except Exception:
            _log.exception("a request failed", path=request.path)
            self._refuse(request, LeptonError("internal error"))
        else:
            if document is None:
                request.respond(200, JSON + id_line(request))
            else:
                show(request, document)

    def _refuse(self, request: Request, error: LeptonError) -> None:
        """The error as every OIP client reads it."""
        status = status_of(error)
        headers = JSON
        if isinstance(error, NotAllowed):
            status = 405
            headers += b"allow: %b\r\n" % ", ".join(error.allowed).encode()
        elif status == 401:
            headers += _CHALLENGE
        elif status in (429, 503, 504):
            headers += b"retry-after: %d\r\n" % math.ceil(error.retry_after_s or 1)
        if isinstance(error, Denied):
            self._callers.refused(request.headers, request.peer, error, self._asked(request))
        self.refused[status] = self.refused.get(status, 0) + 1
        request.respond(status, headers + id_line(request), error_body(error.message))

    def _asked(self, request: Request) -> str:
        """What the caller wanted, without what it sent: there may be a secret in a path."""
        target = self._targets.get(request.target)
        return request.method if target is None else f"{request.method} {target.page.name.lower()}"


def _wanted_version(request: Request, caller: Caller, target: Target) -> int | None:
    """The version that the caller names, in the path or by header; None leaves it to the split.

    By header it is asked of the model's own address, in the place of its users: that takes a scope. Raises Forbidden,
    NotFound, and Invalid when header and path name different ones.
    """
    header = request.headers.get(b"x-lepton-version")
    if header is None:
        return target.version
    if not caller.has(Scope.TEST):
        raise forbidden(caller, f"header x-lepton-version needs an API key with the scope {Scope.TEST.value!r}")
    version = version_of(target.model, header.decode("latin-1"))
    if target.version not in (None, version):
        raise Invalid(f"the path names version {target.version}, header x-lepton-version {version}")
    return version


def answer(request: Request, document: Any, status: int = 200, headers: bytes = b"") -> None:
    request.respond(status, JSON + headers + id_line(request), orjson.dumps(document))
