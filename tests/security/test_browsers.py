"""A page in a browser of the machine that runs a platform: it can reach every port, and must get nowhere."""

import json

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from ..integration.local_platform import Platform
from ..integration.oip_requests import GOOD, ROW
from ..integration.test_v1_apis import OPERATIONS
from .hostile import METHODS, assert_tells_nothing, calling

PATHS = (
    "/v2/models/mlp",
    "/v2/models/mlp/infer",
    "/v2/models/mlp/versions/1/infer",
    "/v2/models/mlp/config",
    "/v2/models/mlp/ready",
    "/v2/models/mlp/stats",
    "/v2/models/stats",
    "/v2/models/mlp/trace/setting",
    "/v2/trace/setting",
    "/v2/logging",
    "/v2/repository/index",
    "/v2/repository/models/mlp/load",
    "/v2/repository/models/mlp/unload",
)
# What a page cannot help saying: whose it is, or, of a name that was made to resolve to this machine, that name.
PAGES = {
    "origin": {"origin": "https://evil.example"},
    "file or frame": {"origin": "null"},
    "rebound": {"host": "evil.example:8080"},
    "rebound, its own": {"host": "evil.example:8080", "origin": "http://evil.example:8080"},
}


def _filled(path: str) -> str:
    return path.format(model="mlp", version=1, sha256="0" * 64, key_id="0" * 16, rollout="0" * 32)


ALL_PATHS = (*PATHS, *sorted({_filled(label.partition(" ")[2]) for _, label in OPERATIONS}))


@pytest.mark.parametrize("page", PAGES)
def test_page_gets_nothing_by_any_method(platform: Platform, mlp: str, page: str) -> None:
    for port in (platform.port, platform.layout.ports["gateway"]):
        with calling(port, **PAGES[page]) as caller:
            for path in ALL_PATHS if port == platform.port else PATHS:
                for method in METHODS:
                    status, text = caller.ask(method, path, json.dumps(GOOD).encode(), content_type="text/plain")
                    assert 400 <= status < 500 or status == 501, (method, path, status, text)
                    assert_tells_nothing(platform, text)


def test_page_gets_nothing_from_what_is_inside(platform: Platform, mlp: str) -> None:
    ports = platform.layout.ports
    body = json.dumps(GOOD).encode()
    with calling(ports["worker-1"], origin="https://evil.example") as worker:
        for method in METHODS:
            assert 400 <= worker.ask(method, "/v2/models/mlp/infer", body)[0] < 500, method
    with calling(ports["mesh"], origin="https://evil.example") as mesh:
        for method in METHODS:
            assert 400 <= mesh.ask(method, "/v2/models/mlp/infer", body)[0] < 600, method
    with calling(ports["envoy-admin"], origin="https://evil.example") as admin:
        for path in ("/quitquitquit", "/healthcheck/fail", "/drain_listeners", "/logging?level=off", "/reset_counters"):
            assert admin.ask("POST", path)[0] == 403, path
    with calling(ports["etcd"], content_type="text/plain") as etcd:
        etcd_put = b'{"key": "L2xlcHRvbi9rZXlzL2V2aWw=", "value": "e30="}'
        for path in ("/v3/kv/put", "/v3/kv/range", "/v3/lease/grant", "/v3/maintenance/snapshot", "/v2/keys/a"):
            with pytest.raises(AssertionError, match=path):  # etcd lets pages read, but there is nothing to read
                assert etcd.ask("POST", path, etcd_put)[0] != 404


def test_page_gets_nothing_by_grpc(platform: Platform, mlp: str) -> None:
    """Browsers speak no HTTP/2 without TLS, but the front door takes gRPC's paths over HTTP/1.1 too."""
    with calling(platform.port, origin="https://evil.example") as caller:
        for method in ("GET", "POST", "PUT"):
            for content_type in ("text/plain", "application/x-www-form-urlencoded"):
                path = "/inference.GRPCInferenceService/ModelInfer"
                status, _ = caller.ask(method, path, bytes(5), content_type=content_type)
                assert 400 <= status < 500, (method, content_type)
    tensor = InferInput("x", [1, 4], "FP32").set_data_from_numpy(np.array([ROW], np.float32))
    with InferenceServerClient(
        platform.address, channel_args=[("grpc.default_authority", "evil.example:8080")]
    ) as rebound:
        with pytest.raises(InferenceServerException, match="header host"):
            rebound.infer(mlp, [tensor])
        with pytest.raises(InferenceServerException, match="header host"):
            rebound.get_model_metadata(mlp)
    with InferenceServerClient(platform.address) as program:
        assert program.infer(mlp, [tensor])
        with pytest.raises(InferenceServerException, match="header origin"):
            program.infer(mlp, [tensor], headers={"origin": "https://evil.example"})


def test_program_of_this_machine_needs_no_key_and_pages_of_it_neither(platform: Platform, mlp: str) -> None:
    for headers in ({}, {"host": "localhost:8080"}, {"origin": "http://localhost:8888"}):
        with calling(platform.port, **headers) as caller:
            assert caller.ask("POST", f"/v2/models/{mlp}/infer", json.dumps(GOOD).encode())[0] == 200, headers


def test_no_method_gets_past_the_key(platform: Platform, mlp: str) -> None:
    outside = {"x_forwarded_for": "203.0.113.9"}
    for port, paths in (
        (platform.port, [path for path in ALL_PATHS if path.startswith("/v1")]),
        (platform.layout.ports["gateway"], PATHS),
    ):
        with calling(port, **outside) as nobody:
            for path in paths:
                for method in METHODS:
                    status, text = nobody.ask(method, path, json.dumps(GOOD).encode())
                    assert status in {400, 401, 404, 405, 501}, (method, path, status, text)
