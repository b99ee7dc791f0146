"""The live table of models: what etcd says is served, and what the gateway counts of it."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from lepton_common.errors import NotFound
from lepton_common.records import Serving, WorkerState

# Upper bounds in seconds: about a tenth of a millisecond to a minute, each 2 to 2.5 times the one before.
BUCKETS_S = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1),
    *(0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)


class Tally:
    """Answers of one version: how many of each status, and how long they took."""

    __slots__ = ("buckets", "seconds", "statuses")

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.buckets = [0] * (len(BUCKETS_S) + 1)
        self.seconds = 0.0

    def add(self, status: int, seconds: float) -> None:
        self.statuses[status] = self.statuses.get(status, 0) + 1
        self.buckets[bisect_left(BUCKETS_S, seconds)] += 1
        self.seconds += seconds


class Route:
    """One model: its record, its way through the mesh, and its requests under way."""

    __slots__ = ("_heads", "_host", "in_flight", "max_concurrency", "serving", "tallies", "timeout_s")

    def __init__(self, serving: Serving) -> None:
        self._host = serving.ref.host
        self._heads: dict[tuple[str, int | None], bytes] = {}
        self.in_flight = 0
        # By the version that answered, as the mesh says it; b"" when none did.
        self.tallies: dict[bytes, Tally] = {}
        self.update(serving)

    def update(self, serving: Serving) -> None:
        self.serving = serving
        self.max_concurrency = serving.limits.max_concurrency
        self.timeout_s = serving.limits.timeout_ms / 1e3

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

    def count(self, version: bytes, status: int, seconds: float) -> None:
        tally = self.tallies.get(version)
        if tally is None:
            tally = self.tallies[version] = Tally()
        tally.add(status, seconds)

    def has(self, version: int) -> bool:
        return self.serving.assigned(version) is not None


class Routes:
    """Every model, by tenant and name. `changed` is the callback of the mirror of serving records."""

    def __init__(self, workers: Mapping[str, WorkerState]) -> None:
        self._workers = workers
        self._routes: dict[tuple[str, str], Route] = {}
        self.all: Mapping[tuple[str, str], Route] = MappingProxyType(self._routes)

    def changed(self, key: str, serving: Serving | None) -> None:
        """The record under `tenant/model` changed, or is gone."""
        tenant, _, model = key.partition("/")
        route = self._routes.get((tenant, model))
        if serving is None:
            self._routes.pop((tenant, model), None)
        elif route is None:
            self._routes[tenant, model] = Route(serving)
        else:
            route.update(serving)

    def get(self, tenant: str, model: str) -> Route:
        """The model's route. Raises NotFound, for another tenant's model too."""
        route = self._routes.get((tenant, model))
        if route is None:
            raise NotFound(f"model {model[:80]!r} is not known")
        return route

    def of_tenant(self, tenant: str) -> list[Route]:
        """The tenant's models by name."""
        return [route for (owner, _), route in sorted(self._routes.items()) if owner == tenant]

    def workers(self) -> Iterable[WorkerState]:
        return self._workers.values()
