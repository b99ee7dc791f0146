"""Istio's objects and Lepton's routes: what is written to Istio, and what a person may write to Lepton. Pure."""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from lepton_common.errors import Invalid
from lepton_common.records import Serving, Share
from lepton_common.types import ModelRef

from lepton_rollout.istio_spec import (
    Destination,
    Headers,
    Match,
    Mirrored,
    Operations,
    Percentage,
    Route,
    Spec,
    Weighted,
    milliseconds,
    parsed,
)
from lepton_rollout.mesh import (
    BUCKET_HEADER,
    VERSION_HEADER,
    HeaderEdits,
    HeaderMatch,
    HTTPDirectResponse,
    HTTPRoute,
    HTTPRouteDestination,
    VirtualService,
    forced_route,
    virtual_service,
)
from lepton_rollout.ranges import range_regex
from lepton_rollout.record import TOTAL_WEIGHT

API_VERSION = "networking.istio.io/v1"
MANAGED_BY = "app.kubernetes.io/managed-by"
GENERATION = "lepton.ai/generation"
# A serving record is one value in etcd, of 64 KiB.
_MAX_SPEC_BYTES = 32 * 1024
_FORCED_NAME = re.compile(r"version-([1-9][0-9]{0,8})")
_P = TypeVar("_P")


def object_name(model: ModelRef) -> str:
    """The name of both objects. Neither a model's nor a tenant's has a dot, so no two models share one."""
    return f"{model.model}.{model.tenant}"


# --- what Lepton writes -----------------------------------------------------------------------------------------------


def documents(service: VirtualService) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's VirtualService and DestinationRule, as one would write them by hand."""
    routes = [_route(each, service) for route in service.http for each in _spread(route)]
    virtual = _object("VirtualService", service) | {"spec": {"hosts": [service.host], "http": routes}}
    pools = {each.version: each.pool for route in service.http for each in route.route}
    subsets = [{"name": f"v{version}", "labels": {"lepton.ai/pool": pool}} for version, pool in sorted(pools.items())]
    rule = _object("DestinationRule", service) | {
        "spec": {"host": service.host, "trafficPolicy": _TRAFFIC_POLICY, "subsets": subsets}
    }
    return virtual, rule


# As for the embedded Envoy: only failures to reach a worker count against it, and the last half is never ejected.
_TRAFFIC_POLICY: dict[str, Any] = {
    "loadBalancer": {"simple": "LEAST_REQUEST"},
    "connectionPool": {"tcp": {"connectTimeout": "1s"}, "http": {"idleTimeout": "30s"}},
    "outlierDetection": {
        "splitExternalLocalOriginErrors": True,
        "consecutiveLocalOriginFailures": 3,
        "consecutive5xxErrors": 0,
        "consecutiveGatewayErrors": 0,
        "interval": "1s",
        "baseEjectionTime": "2s",
        "maxEjectionPercent": 50,
        "minHealthPercent": 0,
    },
}


def _object(kind: str, service: VirtualService) -> dict[str, Any]:
    model = ModelRef.parse(service.name)
    return {
        "apiVersion": API_VERSION,
        "kind": kind,
        "metadata": {
            "name": object_name(model),
            "labels": {
                MANAGED_BY: "lepton-rollout",
                "lepton.ai/tenant": model.tenant,
                "lepton.ai/model": model.model,
            },
            "annotations": {GENERATION: str(service.generation)},
        },
    }


def _spread(route: HTTPRoute) -> Iterable[HTTPRoute]:
    """A sticky route in Istio, which knows no such thing: a route for each version's buckets, then the split."""
    total = 0
    for destination in route.route if route.sticky else ():
        buckets = HeaderMatch(BUCKET_HEADER, regex=range_regex(total, total + destination.weight - 1))
        total += destination.weight
        yield HTTPRoute(
            f"sticky-{route.name}-v{destination.version}",
            match=tuple((*alternative, buckets) for alternative in route.match or ((),)),
            route=(replace(destination, weight=TOTAL_WEIGHT),),
            mirrors=route.mirrors,
            timeout_ms=route.timeout_ms,
            retries=route.retries,
        )
    yield route


def _route(route: HTTPRoute, service: VirtualService) -> dict[str, Any]:
    written: dict[str, Any] = {"name": route.name}
    if route.match:
        written["match"] = [_alternative(each) for each in route.match]
    if route.direct_response:
        return written | _answer(route.direct_response)
    written["route"] = [_destination(each, service) for each in route.route]
    if route.mirrors:
        written["mirrors"] = [
            {"destination": _subset(each.version, service), "percentage": {"value": each.percent}}
            for each in route.mirrors
        ]
    retries = route.retries
    written["timeout"] = _duration(route.timeout_ms or service.timeout_ms)
    written["retries"] = {"attempts": retries.attempts, "retryOn": ",".join(retries.retry_on)}
    if retries.per_try_timeout_ms:
        written["retries"]["perTryTimeout"] = _duration(retries.per_try_timeout_ms)
    if retries.backoff_ms:
        written["retries"]["backoff"] = _duration(retries.backoff_ms)
    return written


def _alternative(headers: tuple[HeaderMatch, ...]) -> dict[str, Any]:
    written: dict[str, Any] = {}
    for header in headers:
        likes = {"exact": header.exact, "prefix": header.prefix, "regex": header.regex}
        like = {kind: value for kind, value in likes.items() if value is not None}
        written.setdefault("withoutHeaders" if header.inverted else "headers", {})[header.name] = like
    return written


def _answer(answer: HTTPDirectResponse) -> dict[str, Any]:
    # Here no listener of ours makes an OIP error of the message.
    return {
        "directResponse": {"status": answer.status, "body": {"string": json.dumps({"error": answer.body})}},
        "headers": {"response": {"set": {"content-type": "application/json"}}},
    }


def _destination(destination: HTTPRouteDestination, service: VirtualService) -> dict[str, Any]:
    version = {VERSION_HEADER: str(destination.version)}
    return {
        "destination": _subset(destination.version, service),
        "weight": destination.weight,
        "headers": {
            "request": _operations(destination.request, version),
            "response": _operations(destination.response, version),
        },
    }


def _operations(edits: HeaderEdits, version: Mapping[str, str]) -> dict[str, Any]:
    written: dict[str, Any] = {"set": {**dict(edits.set), **version}}
    if edits.add:
        written["add"] = dict(edits.add)
    if edits.remove:
        written["remove"] = list(edits.remove)
    return written


def _subset(version: int, service: VirtualService) -> dict[str, Any]:
    return {"host": service.host, "subset": f"v{version}"}


def _duration(milliseconds: int) -> str:
    return f"{milliseconds / 1000:.3f}".rstrip("0").rstrip(".") + "s"


# --- what a person may say --------------------------------------------------------------------------------------------


def checked(document: Mapping[str, Any], serving: Serving, ready: Collection[int]) -> dict[str, Any]:
    """The spec of a person's VirtualService for this model, in normal form: weights of 10 000, names in lower case.

    Routes that Lepton itself puts before the split are left out, so what it prints can be edited and applied. `ready`
    are the versions that workers have. Raises Invalid, naming the field, for what Lepton would not do exactly so.
    """
    spec = parsed(_without_own(document, serving))
    if spec.hosts != [serving.ref.host]:
        raise Invalid(f"spec.hosts: expected [{serving.ref.host}], the host of model {serving.model!r}")
    routes = []
    for number, route in enumerate(spec.http):
        path = f"spec.http[{number}]"
        if not route.match and number < len(spec.http) - 1:
            raise Invalid(f"{path}.match: it matches every request, so spec.http[{number + 1}] would never get one")
        routes.append(_checked_route(route, path, serving, ready))
    if spec.http[-1].match:
        raise Invalid(f"spec.http[{len(routes) - 1}].match: the last route must match every request, so without match")
    normal = spec.model_copy(update={"http": routes}).model_dump(by_alias=True, exclude_defaults=True)
    if len(json.dumps(normal)) > _MAX_SPEC_BYTES:
        raise Invalid(f"spec: it has more than {_MAX_SPEC_BYTES // 1024} KiB")
    return normal


def shares(spec: Mapping[str, Any]) -> tuple[Share, ...]:
    """The split that the last route of a checked spec makes."""
    last = Spec.model_validate(spec).http[-1]
    return tuple(
        Share(version=each.destination.version, percent=each.weight * 100 / TOTAL_WEIGHT)
        for each in last.route
        if each.weight
    )


def header_names(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """The headers of callers that a checked spec routes by."""
    matches = [match for route in Spec.model_validate(spec).http for match in route.match]
    return tuple(sorted({name for match in matches for name in (*match.headers, *match.without_headers)}))


def versions(spec: Mapping[str, Any]) -> frozenset[int]:
    """Every version that a checked spec names, those that only get copies or no share included."""
    routes = Spec.model_validate(spec).http
    return frozenset(each.version for route in routes for _, each in _destinations(route, ""))


def _without_own(document: Mapping[str, Any], serving: Serving) -> Mapping[str, Any]:
    """The document without the routes that Lepton puts before a person's own."""
    match document:
        case {"spec": {"http": [*routes]} as spec}:
            service = virtual_service(serving)
            own = {each["name"]: each for each in documents(service)[0]["spec"]["http"]}
            fixed = {name: each for name, each in own.items() if name.startswith(("unknown-version", "sticky-"))}
            # Also those of versions that are not loaded any more.
            for name in (each.get("name") for each in routes if isinstance(each, dict)):
                if isinstance(name, str) and (found := _FORCED_NAME.fullmatch(name)):
                    fixed[name] = _route(forced_route(int(found[1]), pool=""), service)
            theirs = [each for each in routes if not (isinstance(each, dict) and each in fixed.values())]
            return {**document, "spec": {**spec, "http": theirs}}
    return document


def _checked_route(route: Route, path: str, serving: Serving, ready: Collection[int]) -> Route:
    for where, destination in _destinations(route, path):
        _check_destination(destination, where, serving, ready)
    for where, each in _numbered(route.route, f"{path}.route"):
        version = str(each.destination.version)
        if [other.destination.version for other in route.route].count(each.destination.version) > 1:
            raise Invalid(f"{where}.destination: version {version} is there more than once")
        for side, edits in (("request", each.headers.request), ("response", each.headers.response)):
            named = {**edits.set, **edits.add, **dict.fromkeys(edits.remove, "")}
            if named.get(VERSION_HEADER, version) != version:
                raise Invalid(f"{where}.headers.{side}: {VERSION_HEADER} is always the number of the version")
    for where, match in _numbered(route.match, f"{path}.match"):
        if not (match.headers or match.without_headers):
            raise Invalid(f"{where}: it matches every request; a route for all requests is the last, without match")
    timeouts = {"timeout": route.timeout, "retries.perTryTimeout": route.retries and route.retries.per_try_timeout}
    for name, told in timeouts.items():
        if told and milliseconds(told) > serving.limits.timeout_ms:
            limit = _duration(serving.limits.timeout_ms)
            raise Invalid(f"{path}.{name}: {told} is longer than the model's own limit of {limit}")
    return _normal(route, path)


def _normal(route: Route, path: str) -> Route:
    """The route with weights of 10 000 in all, its mirrors in one list, and nothing that says nothing."""
    given = [each.weight for each in route.route]
    written = [each or 0 for each in given] if given != [None] else [TOTAL_WEIGHT]
    if sum(written) not in (100, TOTAL_WEIGHT):
        where = f"{path}.route[0].weight" if len(written) == 1 else f"{path}.route"
        raise Invalid(
            f"{where}: the weights add up to {sum(written)}, expected 100, or {TOTAL_WEIGHT} for 0.01 % steps"
        )
    factor = TOTAL_WEIGHT // sum(written)
    weighted = [
        Weighted(
            destination=_plain(each.destination),
            weight=weight * factor,
            headers=Headers(request=_others(each.headers.request), response=_others(each.headers.response)),
        )
        for each, weight in zip(route.route, written, strict=True)
    ]
    mirrors = [Mirrored(destination=_plain(each.destination), percentage=each.percentage) for each in route.mirrors]
    if route.mirror:
        if route.mirrors:
            raise Invalid(f"{path}.mirror: it excludes mirrors")
        percentage = route.mirror_percentage or Percentage(value=100.0)
        mirrors = [Mirrored(destination=_plain(route.mirror), percentage=percentage)]
    elif route.mirror_percentage:
        raise Invalid(f"{path}.mirrorPercentage: it is the percentage of a mirror, and there is none")
    match = [Match(headers=each.headers, without_headers=each.without_headers) for each in route.match]
    return Route(
        name=route.name, match=match, route=weighted, timeout=route.timeout, retries=route.retries, mirrors=mirrors
    )


def _plain(destination: Destination) -> Destination:
    return Destination(host=destination.host, subset=destination.subset)


def _others(edits: Operations) -> Operations:
    """What is done to headers besides naming the version, which is done anyway."""
    return Operations(
        set={name: value for name, value in edits.set.items() if name != VERSION_HEADER},
        add={name: value for name, value in edits.add.items() if name != VERSION_HEADER},
        remove=edits.remove,
    )


def _destinations(route: Route, path: str) -> Iterable[tuple[str, Destination]]:
    """Every destination of the route with its path."""
    for where, each in _numbered(route.route, f"{path}.route"):
        yield f"{where}.destination", each.destination
    for where, mirrored in _numbered(route.mirrors, f"{path}.mirrors"):
        yield f"{where}.destination", mirrored.destination
    if route.mirror:
        yield f"{path}.mirror", route.mirror


def _check_destination(destination: Destination, path: str, serving: Serving, ready: Collection[int]) -> None:
    if destination.host != serving.ref.host:
        raise Invalid(f"{path}.host: {destination.host[:80]!r} is not this model's: expected {serving.ref.host}")
    if serving.assigned(destination.version) is None:
        loaded = ", ".join(f"v{version}" for version in sorted({each.version for each in serving.versions}))
        raise Invalid(
            f"{path}.subset: {destination.subset} of {destination.host} is not loaded; loaded: {loaded or 'none'}"
        )
    if destination.version not in ready:
        raise Invalid(f"{path}.subset: {destination.subset} of {destination.host} is not ready on any worker yet")


def _numbered(parts: Iterable[_P], path: str) -> Iterable[tuple[str, _P]]:
    return ((f"{path}[{number}]", part) for number, part in enumerate(parts))
