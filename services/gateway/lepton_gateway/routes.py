"""The live table of models: what etcd says is served, and how requests for it go into the mesh."""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from lepton_common.auth import Caller
from lepton_common.errors import NotFound
from lepton_common.records import Serving, WorkerState

from lepton_gateway.cache import Memory
from lepton_gateway.flights import CacheCounts, ResponseCache
from lepton_gateway.lanes import Lane
from lepton_gateway.limits import Use
from lepton_gateway.windows import Counts, Windows

# What a caller says that the worker needs to know. All else ends here, but for what a model's record names.
_FORWARDED_TRACED = (
    b"content-type",
    b"content-encoding",
    b"accept-encoding",
    b"inference-header-content-length",
    b"x-request-timeout-ms",
    b"x-request-id",
)
_TRACE = (b"traceparent", b"tracestate")
# No record can name these: they are the gateway's own, or the connection's, or secret.
_HEADER_NAME = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+")
_KEPT_BACK = frozenset(
    (
        *("authorization", "x-api-key", "host", "content-length", "transfer-encoding", "connection", "keep-alive"),
        *("te", "trailer", "upgrade", "expect"),
    )
)
_KEPT_BACK_PREFIXES = ("x-lepton-", "x-envoy-", "proxy-")


class Route:
    """One model: its record, its way through the mesh, its counts, what it uses of its limits, and its cache if it has
    one."""

    __slots__ = (
        "_heads",
        "_host",
        "_memory",
        "cache",
        "cache_counts",
        "counts",
        "forwarded",
        "forwarded_traced",
        "lanes",
        "pool",
        "serving",
        "shadow",
        "stable",
        "sticky",
        "timeout_s",
        "use",
    )

    def __init__(self, serving: Serving, counts: Counts, memory: Memory) -> None:
        self._host = serving.ref.host
        self._memory = memory
        self.cache: ResponseCache | None = None
        self.cache_counts = CacheCounts()
        self._heads: dict[tuple[str, int | None], bytes] = {}
        self.counts = counts
        self.lanes: dict[str, Lane] = {}
        self.use = Use(f"model {serving.model!r}", serving.limits)
        self.update(serving)

    def update(self, serving: Serving) -> None:
        self.serving = serving
        self.use.change(serving.limits)
        self.timeout_s = serving.limits.timeout_ms / 1e3
        self.counts.pools = {each.version: each.pool for each in serving.versions}
        # Where the mesh is to choose the version: the pool of the largest share.
        largest = max(serving.split, key=lambda share: share.percent, default=None)
        self.pool = "" if largest is None else self.pool_of(largest.version)
        own = tuple(name.encode() for name in serving.forwarded if _may_be_forwarded(name))
        # A traced request gets a trace header of our own.
        self.forwarded_traced = tuple(dict.fromkeys((*_FORWARDED_TRACED, *own)))
        self.forwarded = tuple(dict.fromkeys((*_FORWARDED_TRACED, *_TRACE, *own)))
        self.sticky = serving.sticky
        self.counts.sticky = serving.sticky is not None
        self.shadow = serving.shadow
        self.stable = b"" if serving.stable is None else b"%d" % serving.stable
        self.close()
        # Whatever changed, nothing that was answered before is an answer now.
        self.cache = ResponseCache(serving, self._memory, self.cache_counts) if serving.cache else None

    def close(self) -> None:
        """Its answers take no memory any more."""
        if self.cache is not None:
            self.cache.close()

    def head(self, line: str, version: int | None) -> bytes:
        """Request line (`line` is "GET" or "POST …/infer" with its path) and the headers that the mesh routes by."""
        head = self._heads.get((line, version))
        if head is None:
            method, _, verb = line.partition(" ")
            lines = [f"{method} /v2/models/{self.serving.model}{verb} HTTP/1.1", f"host: {self._host}"]
            if version is not None:
                lines.append(f"x-lepton-version: {version}")
            head = self._heads[line, version] = "".join(f"{each}\r\n" for each in lines).encode()
        return head

    def pool_of(self, version: int) -> str:
        """The pool that the version runs in."""
        return self.counts.pools.get(version, "")

    def has(self, version: int) -> bool:
        return self.serving.assigned(version) is not None


def _may_be_forwarded(name: str) -> bool:
    return bool(_HEADER_NAME.fullmatch(name)) and name not in _KEPT_BACK and not name.startswith(_KEPT_BACK_PREFIXES)


class Routes:
    """Every model, by tenant and name. `changed` is the callback of the mirror of serving records."""

    def __init__(self, workers: Mapping[str, WorkerState], windows: Windows, cache_bytes: int) -> None:
        """`cache_bytes`: what the answers kept of all models may take."""
        self._workers = workers
        self._windows = windows
        self._memory = Memory(cache_bytes)
        self._routes: dict[tuple[str, str], Route] = {}
        self.all: Mapping[tuple[str, str], Route] = MappingProxyType(self._routes)

    def changed(self, key: str, serving: Serving | None) -> None:
        """The record under `tenant/model` changed, or is gone."""
        tenant, _, model = key.partition("/")
        route = self._routes.get((tenant, model))
        if serving is None:
            if route is not None:
                route.close()
                del self._routes[tenant, model]
        elif route is None:
            self._routes[tenant, model] = Route(serving, self._windows.of(serving.ref), self._memory)
        else:
            route.update(serving)

    def get(self, tenant: str, model: str) -> Route:
        """The model's route. Raises NotFound, for another tenant's model too."""
        route = self._routes.get((tenant, model))
        if route is None:
            raise NotFound(f"model {model[:80]!r} is not known")
        return route

    def of(self, caller: Caller) -> list[Route]:
        """The models that the caller sees, by name."""
        return [
            route
            for (tenant, model), route in sorted(self._routes.items())
            if tenant == caller.tenant and caller.sees(model)
        ]

    def workers(self) -> Iterable[WorkerState]:
        return self._workers.values()
