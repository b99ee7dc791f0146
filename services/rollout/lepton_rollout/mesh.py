"""The mesh as rollout sees it: one VirtualService a model, in Istio's words, given to whatever moves the traffic."""

from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from lepton_common.errors import Conflict
from lepton_common.records import Serving, WorkerState
from lepton_common.types import ModelRef

from lepton_rollout.istio_spec import Match, Operations, Retrying, Route, Spec, milliseconds
from lepton_rollout.record import TOTAL_WEIGHT, weights

VERSION_HEADER = "x-lepton-version"
BUCKET_HEADER = "x-lepton-bucket"
SHADOW_HEADER = "x-lepton-shadow"


@dataclass(frozen=True, slots=True)
class HeaderMatch:
    """A request header that must be there; with `exact`, `prefix` or `regex` (RE2, of the whole value), like that.

    `inverted`: the request must not be so.
    """

    name: str
    exact: str | None = None
    prefix: str | None = None
    regex: str | None = None
    inverted: bool = False


@dataclass(frozen=True, slots=True)
class HeaderEdits:
    """What becomes of a message's headers: `set` replaces, `add` appends."""

    set: tuple[tuple[str, str], ...] = ()
    add: tuple[tuple[str, str], ...] = ()
    remove: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HTTPRouteDestination:
    """A version on its pool, with its weight in ten-thousandths.

    Besides these edits the mesh sets the version's header on the request and on the response, its own failures
    included, so every answer has its version.
    """

    pool: str
    version: int
    weight: int = TOTAL_WEIGHT
    request: HeaderEdits = HeaderEdits()
    response: HeaderEdits = HeaderEdits()


@dataclass(frozen=True, slots=True)
class Mirror:
    """A version that gets a copy of this part of the requests. Its answers are dropped."""

    pool: str
    version: int
    percent: float


@dataclass(frozen=True, slots=True)
class Retries:
    """How often a request that failed is tried again on another worker. `retry_on` are Envoy's names and statuses.

    `backoff_ms` None is the mesh's own.
    """

    attempts: int
    retry_on: tuple[str, ...]
    per_try_timeout_ms: int | None = None
    backoff_ms: int | None = None


# Inference has no side effects, so what failed before an answer came is tried again, on another worker. Twice only:
# a request that kills its worker must not go through the whole pool.
RETRIES = Retries(attempts=2, retry_on=("connect-failure", "refused-stream", "reset", "503"))


@dataclass(frozen=True, slots=True)
class HTTPDirectResponse:
    """An answer the mesh gives itself; `body` is the message of an OIP error."""

    status: int
    body: str


@dataclass(frozen=True, slots=True)
class HTTPRoute:
    """Where requests go that match: to the destinations by weight, or straight back with an answer.

    A request matches when all headers of one of the alternatives do; without any, every request does. `sticky`: a
    request with a bucket (0 to 9999) goes to the destination whose cumulative weight first exceeds it, always the same.
    `timeout_ms` None is the model's own.
    """

    name: str
    match: tuple[tuple[HeaderMatch, ...], ...] = ()
    route: tuple[HTTPRouteDestination, ...] = ()
    direct_response: HTTPDirectResponse | None = None
    mirrors: tuple[Mirror, ...] = ()
    timeout_ms: int | None = None
    retries: Retries = RETRIES
    sticky: bool = False

    @property
    def forced(self) -> bool:
        """Whether only requests come here that ask for a version by name."""
        return any(header.name == VERSION_HEADER for headers in self.match for header in headers)


@dataclass(frozen=True, slots=True)
class VirtualService:
    """How one model's requests find their version. The first matching route wins; the last one matches everything.

    `generation` is that of the serving record it was made from.
    """

    name: str
    host: str
    timeout_ms: int
    http: tuple[HTTPRoute, ...]
    generation: int = 0

    @property
    def pools(self) -> frozenset[str]:
        """Every pool a route leads to."""
        return frozenset(destination.pool for route in self.http for destination in route.route)

    @property
    def mirror_pools(self) -> frozenset[str]:
        """Every pool that gets copies."""
        return frozenset(mirror.pool for route in self.http for mirror in route.mirrors)

    @property
    def live_pools(self) -> frozenset[str]:
        """The pools that take a share of the traffic: they must be able to answer before a route may lead there."""
        return frozenset(each.pool for route in self.http if not route.forced for each in route.route)


@dataclass(frozen=True, slots=True)
class Edit:
    """Somebody else changed a model's VirtualService in the mesh itself.

    `by` is the name under which they wrote, `document` the whole object as it is now, `revision` the mesh's name for
    that state of it.
    """

    model: ModelRef
    by: str
    document: dict[str, Any]
    revision: str


class Stale(Conflict):
    """The mesh already has newer generations of these models, by name, than it was given: theirs stay."""

    def __init__(self, newer: Mapping[str, int]) -> None:
        told = ", ".join(f"{name} (generation {generation})" for name, generation in sorted(newer.items()))
        super().__init__(f"the mesh already has newer routes of {told}")
        self.newer = dict(newer)


class Mesh(Protocol):
    """What moves live traffic. `apply` and `place` say what shall be true; repeating them changes nothing."""

    async def apply(self, *services: VirtualService) -> None:
        """The mesh has acknowledged these models' routes; those of other models are as they were.

        Raises Invalid when it refuses them, Unavailable when it did not acknowledge in time or a pool that newly takes
        traffic has no healthy worker, Stale when it has a newer generation (an equal one is replaced), and Conflict
        when somebody else has changed them there and the edit is not noted. What was routed before goes on for all
        models of which that is true; the others have their new routes.
        """

    async def place(self, workers: Iterable[WorkerState]) -> None:
        """The pools consist of these workers; a draining one takes no new request."""

    async def live(self, serving: Serving) -> tuple[dict[str, Any], dict[str, Any]]:
        """The model's VirtualService and DestinationRule, as the mesh runs them now.

        Raises NotFound when it runs none, and Unavailable when that cannot be told, or is not yet what `serving` says.
        """

    def edits(self) -> AsyncIterator[Edit]:
        """For ever: what others change, oldest first; once again after a restart what is not noted yet.

        Raises Unavailable when the mesh is away.
        """

    async def note(self, edit: Edit) -> None:
        """The edit is on record, taken over or refused: `apply` may write over it. Raises Conflict when there is a
        newer edit, which `edits` tells of."""

    async def close(self) -> None:
        """Its connections are closed."""


def virtual_service(serving: Serving) -> VirtualService:
    """The routes of a serving record: a version forced by header, then unknown versions, then the split by weight.

    Before the split come the requests that a header's value sends to a version. When a person moves the traffic, their
    own routes take the place of both.
    """
    pools = {each.version: each.pool for each in serving.versions}
    return VirtualService(
        name=str(serving.ref),
        host=serving.ref.host,
        timeout_ms=serving.limits.timeout_ms,
        http=(*_forced(serving, pools), *(_by_hand(serving, pools) if serving.hand else _by_record(serving, pools))),
        generation=serving.generation,
    )


def forced_route(version: int, pool: str) -> HTTPRoute:
    """Requests that ask for the version by its number."""
    match = HeaderMatch(VERSION_HEADER, exact=str(version))
    return HTTPRoute(f"version-{version}", match=((match,),), route=(HTTPRouteDestination(pool, version),))


def _forced(serving: Serving, pools: Mapping[int, str]) -> Iterable[HTTPRoute]:
    for version, pool in sorted(pools.items()):
        yield forced_route(version, pool)
    message = f"this version of model {serving.model!r} is not loaded"
    yield HTTPRoute("unknown-version", ((HeaderMatch(VERSION_HEADER),),), direct_response=_unavailable(message))


def _by_record(serving: Serving, pools: Mapping[int, str]) -> Iterable[HTTPRoute]:
    for number, each in enumerate(serving.matches):
        if each.version in pools:
            match = HeaderMatch(each.header.lower(), exact=each.value)
            destination = HTTPRouteDestination(pools[each.version], each.version)
            yield HTTPRoute(f"match-{number}", match=((match,),), route=(destination,))
    # With the stable first, a version that grows takes buckets from the stable and from nobody else.
    split = sorted(serving.split, key=lambda share: share.version != serving.stable)
    if not (shares := weights(tuple(split))):
        message = f"model {serving.model!r} is not being served"
        yield HTTPRoute("unserved", direct_response=_unavailable(message))
        return
    destinations = tuple(HTTPRouteDestination(pools[version], version, weight) for version, weight in shares.items())
    yield HTTPRoute("split", route=destinations, sticky=serving.sticky is not None and len(destinations) > 1)


def _by_hand(serving: Serving, pools: Mapping[int, str]) -> Iterable[HTTPRoute]:
    assert serving.hand is not None
    routes = Spec.model_validate(serving.hand.spec).http
    for number, route in enumerate(routes):
        is_last = number == len(routes) - 1
        name = route.name or ("split" if is_last else f"hand-{number}")
        yield _hand_route(route, name, pools, sticky=is_last and serving.sticky is not None)


def _hand_route(route: Route, name: str, pools: Mapping[int, str], *, sticky: bool) -> HTTPRoute:
    """A person's route. Versions that are not loaded any more are left out."""
    match = tuple(_alternative(each) for each in route.match)
    destinations = tuple(
        HTTPRouteDestination(
            pools[version], version, each.weight, _edits(each.headers.request), _edits(each.headers.response)
        )
        for each in route.route
        if (version := each.destination.version) in pools and each.weight
    )
    if not destinations:
        message = "the version that this route leads to is not loaded"
        return HTTPRoute(name, match, direct_response=_unavailable(message))
    return HTTPRoute(
        name,
        match,
        destinations,
        mirrors=tuple(
            Mirror(pools[version], version, each.percentage.value)
            for each in route.mirrors
            if (version := each.destination.version) in pools and each.percentage.value
        ),
        timeout_ms=milliseconds(route.timeout) if route.timeout else None,
        retries=_retries(route.retries) if route.retries else RETRIES,
        sticky=sticky and len(destinations) > 1,
    )


def _alternative(match: Match) -> tuple[HeaderMatch, ...]:
    wanted = [(name, like, False) for name, like in match.headers.items()]
    unwanted = [(name, like, True) for name, like in match.without_headers.items()]
    return tuple(
        HeaderMatch(name, like.exact, like.prefix, like.regex, inverted) for name, like, inverted in wanted + unwanted
    )


def _edits(operations: Operations) -> HeaderEdits:
    return HeaderEdits(tuple(operations.set.items()), tuple(operations.add.items()), tuple(operations.remove))


def _retries(retries: Retrying) -> Retries:
    return Retries(
        attempts=retries.attempts,
        retry_on=tuple(each.strip() for each in retries.retry_on.split(",")) if retries.retry_on else RETRIES.retry_on,
        per_try_timeout_ms=milliseconds(retries.per_try_timeout) if retries.per_try_timeout else None,
        backoff_ms=milliseconds(retries.backoff) if retries.backoff else None,
    )


def _unavailable(message: str) -> HTTPDirectResponse:
    return HTTPDirectResponse(503, message)
