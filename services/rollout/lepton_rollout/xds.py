"""VirtualServices and workers in Envoy's words: what each becomes in its configuration API, version 3. Pure."""

from collections.abc import Iterable, Sequence
from typing import Any

from lepton_common.records import WorkerState

from lepton_rollout.mesh import HTTPRoute, HTTPRouteDestination, VirtualService

# The name of the route configuration that the bootstrap's mesh listener asks for.
ROUTES = "mesh"
# A request can go to another worker only if its body is still at hand: LEPTON_MAX_BODY_BYTES and a little.
_BUFFER_BYTES = 65 * 1024 * 1024
_TYPE = "type.googleapis.com/envoy"
_CATCH_ALL = "unknown-model"

# Inference has no side effects, so what failed before an answer came is tried again, on another worker. Twice only:
# a request that kills its worker must not go through the whole pool.
_RETRY_POLICY: dict[str, Any] = {
    "retry_on": "connect-failure,refused-stream,reset,retriable-status-codes",
    "retriable_status_codes": [503],
    "num_retries": 2,
    "retry_host_predicate": [
        {
            "name": "envoy.retry_host_predicates.previous_hosts",
            "typed_config": {
                "@type": f"{_TYPE}.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate",
            },
        }
    ],
    # A dead worker has nothing to do, so least-request prefers it: with few draws the retry would often meet it again.
    "host_selection_retry_max_attempts": "100",
    "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.1s"},
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
    return f"pool-{pool}"


def pool_of(cluster: str) -> str:
    """The inverse of `cluster_name`."""
    return cluster.removeprefix("pool-")


def cluster(pool: str, endpoints_file: str) -> dict[str, Any]:
    """A pool: its workers come from a file, and its health from Envoy's own checks, so it needs no one else alive.

    Envoy keeps a worker that left the file for as long as it answers the checks: leases lost by etcd cost no request.
    """
    return {
        "@type": f"{_TYPE}.config.cluster.v3.Cluster",
        "name": cluster_name(pool),
        "type": "EDS",
        "eds_cluster_config": {
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
    """The model's routes, by either form of its host name."""
    return {
        "name": service.name,
        "domains": [service.host, f"{service.host}:*"],
        "request_body_buffer_limit": _BUFFER_BYTES,
        "routes": [_route(route, service.timeout_ms) for route in service.http],
    }


def pools_of(hosts: Iterable[dict[str, Any]]) -> set[str]:
    """The pools that the hosts' routes lead to."""
    return {pool for host in hosts for route in host["routes"] for pool in _pools(route)}


def live_pools_of(host: dict[str, Any] | None) -> set[str]:
    """The pools that take a share of the host's traffic."""
    return _pools(host["routes"][-1]) if host else set()


def _pools(route: dict[str, Any]) -> set[str]:
    return (
        {pool_of(each["name"]) for each in route["route"]["weighted_clusters"]["clusters"]}
        if "route" in route
        else set()
    )


def _route(route: HTTPRoute, timeout_ms: int) -> dict[str, Any]:
    match: dict[str, Any] = {"prefix": "/"}
    if route.match:
        wanted = {"string_match": {"exact": route.match.exact}} if route.match.exact else {"present_match": True}
        match["headers"] = [{"name": route.match.name, **wanted}]
    if route.direct_response:
        return _answer(route.direct_response.status, route.direct_response.body) | {"match": match}
    action = {
        "weighted_clusters": {"clusters": [_weighted(destination) for destination in route.route]},
        "timeout": f"{timeout_ms / 1000:.3f}s",
        "retry_policy": _RETRY_POLICY,
    }
    return {"match": match, "route": action}


def _weighted(destination: HTTPRouteDestination) -> dict[str, Any]:
    headers = [
        {"header": {"key": key, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
        for key, value in destination.headers
    ]
    return {
        "name": cluster_name(destination.pool),
        "weight": destination.weight,
        "request_headers_to_add": headers,
        "response_headers_to_add": headers,
    }


def _answer(status: int, message: str) -> dict[str, Any]:
    return {"match": {"prefix": "/"}, "direct_response": {"status": status, "body": {"inline_string": message}}}
