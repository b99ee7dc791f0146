"""The mesh as rollout sees it: one VirtualService a model, in Istio's words, given to whatever moves the traffic."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from lepton_common.records import Serving, WorkerState

from lepton_rollout.domain import weights

VERSION_HEADER = "x-lepton-version"


@dataclass(frozen=True, slots=True)
class HeaderMatch:
    """A request header that must be there; with `exact`, with that value."""

    name: str
    exact: str | None = None


@dataclass(frozen=True, slots=True)
class HTTPRouteDestination:
    """A version on its pool. `headers` are set on the request and on the response, so every failure has its version."""

    pool: str
    weight: int
    headers: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class HTTPDirectResponse:
    """An answer the mesh gives itself; `body` is the message, which the mesh's listener wraps as an OIP error."""

    status: int
    body: str


@dataclass(frozen=True, slots=True)
class HTTPRoute:
    """Where requests go that match: to the destinations by weight, or straight back with an answer."""

    name: str
    match: HeaderMatch | None = None
    route: tuple[HTTPRouteDestination, ...] = ()
    direct_response: HTTPDirectResponse | None = None


@dataclass(frozen=True, slots=True)
class VirtualService:
    """How one model's requests find their version. The first matching route wins; the last one matches everything."""

    name: str
    host: str
    timeout_ms: int
    http: tuple[HTTPRoute, ...]

    @property
    def pools(self) -> frozenset[str]:
        """Every pool a route leads to."""
        return frozenset(destination.pool for route in self.http for destination in route.route)

    @property
    def live_pools(self) -> frozenset[str]:
        """The pools that take a share of the traffic: they must be able to answer before a route may lead there."""
        return frozenset(destination.pool for destination in self.http[-1].route)


class Mesh(Protocol):
    """What moves live traffic. Both calls say what shall be true; repeating them changes nothing."""

    async def apply(self, *services: VirtualService) -> None:
        """The mesh has acknowledged these models' routes; those of other models are as they were.

        Raises Invalid when it refuses them, and Unavailable when it did not acknowledge in time or a pool that newly
        takes traffic has no healthy worker. Either way what was routed before goes on.
        """

    async def place(self, workers: Iterable[WorkerState]) -> None:
        """The pools consist of these workers; a draining one takes no new request."""


def virtual_service(serving: Serving) -> VirtualService:
    """The routes of a serving record: a version forced by header, then unknown versions, then the split by weight."""
    pools = {each.version: each.pool for each in serving.versions}
    routes = [
        HTTPRoute(
            name=f"version-{version}",
            match=HeaderMatch(VERSION_HEADER, exact=str(version)),
            route=(_destination(pool, version, weight=1),),
        )
        for version, pool in sorted(pools.items())
    ]
    routes.append(
        HTTPRoute(
            name="unknown-version",
            match=HeaderMatch(VERSION_HEADER),
            direct_response=HTTPDirectResponse(503, f"this version of model {serving.model!r} is not loaded"),
        )
    )
    if split := weights(serving.split):
        destinations = tuple(_destination(pools[version], version, weight) for version, weight in split.items())
        routes.append(HTTPRoute(name="split", route=destinations))
    else:
        nothing = HTTPDirectResponse(503, f"model {serving.model!r} is not being served")
        routes.append(HTTPRoute(name="unserved", direct_response=nothing))
    return VirtualService(
        name=str(serving.ref),
        host=serving.ref.host,
        timeout_ms=serving.limits.timeout_ms,
        http=tuple(routes),
    )


def _destination(pool: str, version: int, weight: int) -> HTTPRouteDestination:
    return HTTPRouteDestination(pool, weight, headers=((VERSION_HEADER, str(version)),))
