"""VirtualServices and workers in Envoy's words: what each becomes in its configuration API, version 3. Pure."""

from collections.abc import Iterable, Sequence
from typing import Any

from lepton_common.records import WorkerState

from lepton_rollout.mesh import (
    BUCKET_HEADER,
    SHADOW_HEADER,
    VERSION_HEADER,
    HeaderMatch,
    HTTPRoute,
    HTTPRouteDestination,
    Mirror,
    Retries,
    VirtualService,
)

# The name of the route configuration that the bootstrap's mesh listener asks for.
ROUTES = "mesh"
# A request can go to another worker only if its body is still at hand: LEPTON_MAX_BODY_BYTES and a little.
_BUFFER_BYTES = 257 * 1024 * 1024
_TYPE = "type.googleapis.com/envoy"
_CATCH_ALL = "unknown-model"
_BACKOFF_MS = 5
# Neither begins with the other, so a cluster's name tells its pool.
_POOL = "pool-"
_MIRROR = "mirror-"
_METADATA = "lepton"

# A retry goes to another worker. A dead one has nothing to do, so least-request prefers it: with few draws the retry
# would often meet it again.
_ANOTHER_WORKER: dict[str, Any] = {
    "retry_host_predicate": [
        {
            "name": "envoy.retry_host_predicates.previous_hosts",
            "typed_config": {
                "@type": f"{_TYPE}.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate",
            },
        }
    ],
    "host_selection_retry_max_attempts": "100",
}

# The pools' queues and the gateway's limits say what is too much; Envoy's own breakers only stand in the way.
_NO_LIMIT = 1_000_000
_CIRCUIT_BREAKERS = {
    "thresholds": [
        {
            "max_connections": _NO_LIMIT,
            "max_pending_requests": _NO_LIMIT,
            "max_requests": _NO_LIMIT,
            "max_retries": _NO_LIMIT,
        }
    ]
}

# Quick while a worker comes up or is suspected, slow otherwise. Three seconds, because a worker in a heavy load of
# parsing answers late; a dead one refuses the connection at once.
_HEALTH_CHECK = {
    "http_health_check": {"path": "/v2/health/ready", "host": "health.lepton"},
    "timeout": "3s",
    "interval": "1s",
    "no_traffic_interval": "1s",
    "no_traffic_healthy_interval": "1s",
    "unhealthy_interval": "0.25s",
    "unhealthy_edge_interval": "0.25s",
    "unhealthy_threshold": 2,
    "healthy_threshold": 1,
}

# Only failures to reach a worker count: its own 5xx speak of one model or one request, not of the worker. At half of
# the pool, the last worker is never ejected.
_OUTLIER_DETECTION = {
    "split_external_local_origin_errors": True,
    "consecutive_local_origin_failure": 3,
    "enforcing_consecutive_local_origin_failure": 100,
    "enforcing_local_origin_success_rate": 0,
    "enforcing_consecutive_5xx": 0,
    "enforcing_consecutive_gateway_failure": 0,
    "enforcing_success_rate": 0,
    "interval": "1s",
    "base_ejection_time": "2s",
    "max_ejection_time": "10s",
    "max_ejection_percent": 50,
    "successful_active_health_check_uneject_host": True,
}


def cluster_name(pool: str) -> str:
    return f"{_POOL}{pool}"


def mirror_name(pool: str) -> str:
    """The cluster of the pool's workers that gets copies only, so that their figures do not mix with the callers'."""
    return f"{_MIRROR}{pool}"


def pool_of(cluster: str) -> str:
    """The pool of a cluster for callers or for copies."""
    return cluster.removeprefix(_POOL).removeprefix(_MIRROR)


def cluster(name: str, endpoints_file: str) -> dict[str, Any]:
    """A pool: its workers come from a file, and its health from Envoy's own checks, so it needs no one else alive.

    Envoy keeps a worker that left the file for as long as it answers the checks: leases lost by etcd cost no request.
    """
    return {
        "@type": f"{_TYPE}.config.cluster.v3.Cluster",
        "name": name,
        "type": "EDS",
        "eds_cluster_config": {
            "service_name": cluster_name(pool_of(name)),
            "eds_config": {"resource_api_version": "V3", "path_config_source": {"path": endpoints_file}},
        },
        "connect_timeout": "1s",
        "lb_policy": "LEAST_REQUEST",
        "per_connection_buffer_limit_bytes": 1024 * 1024,
        "circuit_breakers": _CIRCUIT_BREAKERS,
        "health_checks": [_HEALTH_CHECK],
        "outlier_detection": _OUTLIER_DETECTION,
        # What Envoy finds out about a worker's health counts at once; by default it may come a second late, merged.
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}, "update_merge_window": "0s"},
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{_TYPE}.extensions.upstreams.http.v3.HttpProtocolOptions",
                # Shorter than a worker's 75 s: a connection is never used while its worker is closing it.
                "common_http_protocol_options": {"idle_timeout": "30s"},
                "explicit_http_config": {"http_protocol_options": {}},
            }
        },
    }


def load_assignment(pool: str, workers: Sequence[WorkerState]) -> dict[str, Any]:
    """The pool's workers. A draining one finishes what it has and gets nothing new."""
    return {
        "@type": f"{_TYPE}.config.endpoint.v3.ClusterLoadAssignment",
        "cluster_name": cluster_name(pool),
        "endpoints": [{"lb_endpoints": [_endpoint(each) for each in sorted(workers, key=lambda each: each.address)]}],
    }


def _endpoint(worker: WorkerState) -> dict[str, Any]:
    host, _, port = worker.address.rpartition(":")
    endpoint = {"address": {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}}
    return {"endpoint": endpoint, "health_status": "DRAINING" if worker.draining else "UNKNOWN"}


def route_configuration(hosts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """All models' routes: Envoy takes them as one. A host that no model has is answered here."""
    unknown = {"name": _CATCH_ALL, "domains": ["*"], "routes": [_answer(503, "this model is not being served")]}
    return {
        "@type": f"{_TYPE}.config.route.v3.RouteConfiguration",
        "name": ROUTES,
        "validate_clusters": True,
        "virtual_hosts": [*sorted(hosts, key=lambda host: str(host["name"])), unknown],
    }


def model_hosts(routes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The virtual hosts of models in a route configuration, by name."""
    return {host["name"]: host for host in routes["virtual_hosts"] if host["name"] != _CATCH_ALL}


def virtual_host(service: VirtualService) -> dict[str, Any]:
    """The model's routes, by either form of its host name. Its metadata says which generation they are."""
    return {
        "name": service.name,
        "domains": [service.host, f"{service.host}:*"],
        "request_body_buffer_limit": _BUFFER_BYTES,
        "metadata": {"filter_metadata": {_METADATA: {"generation": service.generation}}},
        "routes": [entry for route in service.http for entry in _routes(route, service.timeout_ms)],
    }


def generation_of(host: dict[str, Any]) -> int:
    """The generation of a virtual host; 0 for one of a release that did not write it."""
    return int(host.get("metadata", {}).get("filter_metadata", {}).get(_METADATA, {}).get("generation", 0))


def clusters_of(hosts: Iterable[dict[str, Any]]) -> set[str]:
    """The clusters that the hosts' routes lead to, or send copies to."""
    return {name for host in hosts for route in host["routes"] for name in (*_clusters(route), *_mirrors(route))}


def live_pools_of(host: dict[str, Any] | None) -> set[str]:
    """The pools that take a share of the host's traffic: all but those that only a version asked for leads to."""
    routes = host["routes"] if host else []
    return {pool_of(name) for route in routes if not _is_forced(route) for name in _clusters(route)}


def _is_forced(route: dict[str, Any]) -> bool:
    return any(header["name"] == VERSION_HEADER for header in route["match"].get("headers", []))


def _clusters(route: dict[str, Any]) -> Iterable[str]:
    clusters = route.get("route", {}).get("weighted_clusters", {}).get("clusters", [])
    return (each["name"] for each in clusters)


def _mirrors(route: dict[str, Any]) -> Iterable[str]:
    return (each["cluster"] for each in route.get("route", {}).get("request_mirror_policies", []))


def _routes(route: HTTPRoute, timeout_ms: int) -> Iterable[dict[str, Any]]:
    """The route once for each alternative of its match: Envoy's are all of their headers, or nothing."""
    if route.direct_response:
        action = _answer(route.direct_response.status, route.direct_response.body)
    else:
        action = {"route": _action(route, route.timeout_ms or timeout_ms)}
    for alternative in route.match or ((),):
        match: dict[str, Any] = {"prefix": "/"}
        if alternative:
            match["headers"] = [_header(header) for header in alternative]
        yield action | {"name": route.name, "match": match}


def _header(header: HeaderMatch) -> dict[str, Any]:
    like: dict[str, Any] = {"present_match": True}
    if header.exact is not None:
        like = {"string_match": {"exact": header.exact}}
    elif header.prefix is not None:
        like = {"string_match": {"prefix": header.prefix}}
    elif header.regex is not None:
        like = {"string_match": {"safe_regex": {"regex": header.regex}}}
    if header.inverted:
        like["invert_match"] = True
        # Else a request without the header would not be one that is not like this.
        if "string_match" in like:
            like["treat_missing_header_as_empty"] = True
    return {"name": header.name, **like}


def _action(route: HTTPRoute, timeout_ms: int) -> dict[str, Any]:
    clusters: dict[str, Any] = {"clusters": [_weighted(destination) for destination in route.route]}
    if route.sticky:
        clusters["header_name"] = BUCKET_HEADER
    action: dict[str, Any] = {"weighted_clusters": clusters, "timeout": _seconds(timeout_ms)}
    if route.retries.attempts:
        action["retry_policy"] = _retry_policy(route.retries)
    if route.mirrors:
        action["request_mirror_policies"] = [_mirror(mirror) for mirror in route.mirrors]
    return action


def _retry_policy(retries: Retries) -> dict[str, Any]:
    statuses = [int(each) for each in retries.retry_on if each.isdigit()]
    names = [each for each in retries.retry_on if not each.isdigit()]
    backoff_ms = retries.backoff_ms or _BACKOFF_MS
    policy: dict[str, Any] = {
        "retry_on": ",".join([*names, "retriable-status-codes"] if statuses else names),
        "num_retries": retries.attempts,
        "retry_back_off": {"base_interval": _seconds(backoff_ms), "max_interval": _seconds(20 * backoff_ms)},
        **_ANOTHER_WORKER,
    }
    if statuses:
        policy["retriable_status_codes"] = statuses
    if retries.per_try_timeout_ms:
        policy["per_try_timeout"] = _seconds(retries.per_try_timeout_ms)
    return policy


def _mirror(mirror: Mirror) -> dict[str, Any]:
    # The copy is of the request as it goes to the version that answers, so it must be told which one it is for.
    mutations = ((VERSION_HEADER, str(mirror.version)), (SHADOW_HEADER, "1"))
    return {
        "cluster": mirror_name(mirror.pool),
        "runtime_fraction": {
            "default_value": {"numerator": round(mirror.percent * 10_000), "denominator": "MILLION"},
        },
        "trace_sampled": False,
        "disable_shadow_host_suffix_append": True,
        "request_headers_mutations": [{"append": _option(key, value)} for key, value in mutations],
    }


def _weighted(destination: HTTPRouteDestination) -> dict[str, Any]:
    weighted: dict[str, Any] = {"name": cluster_name(destination.pool), "weight": destination.weight}
    for side, edits in (("request", destination.request), ("response", destination.response)):
        own = (VERSION_HEADER, str(destination.version))
        added = [_option(key, value) for key, value in (*edits.set, own)]
        added += [_option(key, value, append=True) for key, value in edits.add]
        weighted[f"{side}_headers_to_add"] = added
        if edits.remove:
            weighted[f"{side}_headers_to_remove"] = list(edits.remove)
    return weighted


def _option(key: str, value: str, *, append: bool = False) -> dict[str, Any]:
    action = "APPEND_IF_EXISTS_OR_ADD" if append else "OVERWRITE_IF_EXISTS_OR_ADD"
    return {"header": {"key": key, "value": value}, "append_action": action}


def _seconds(milliseconds: int) -> str:
    return f"{milliseconds / 1000:.3f}s"


def _answer(status: int, message: str) -> dict[str, Any]:
    return {"match": {"prefix": "/"}, "direct_response": {"status": status, "body": {"inline_string": message}}}
