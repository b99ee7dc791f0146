"""Wrong requests: broken HTTP, wrong paths, methods and keys. A 4xx that says why, and a platform that serves on."""

import json
from collections.abc import Callable, Iterator

import httpx
import pytest

from .local_platform import Platform
from .oip_requests import GOOD, MAX_BODY_BYTES, error_of, infer
from .onnx_models import mlp as mlp_model
from .raw_http import chunked, exchange, post

pytestmark = pytest.mark.usefixtures("serves_on")

# --- HTTP -------------------------------------------------------------------------------------------------------------


def test_body_over_the_limit_is_refused_before_it_is_sent(platform: Platform, mlp: str) -> None:
    request = post(f"/v2/models/{mlp}/infer", b"{", f"Content-Length: {MAX_BODY_BYTES + 1}")
    status, body = exchange(platform.port, request)
    assert status == 413
    assert str(MAX_BODY_BYTES) in json.loads(body)["error"]


def test_endless_chunks_are_cut_off(platform: Platform, mlp: str) -> None:
    megabyte = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"

    def endless() -> Iterator[bytes]:
        yield post(f"/v2/models/{mlp}/infer", b"", "Transfer-Encoding: chunked")
        for _ in range(2 * MAX_BODY_BYTES >> 20):
            yield megabyte

    status, _ = exchange(platform.port, endless())
    # The connection may be closed before the answer is read: what was still on its way makes the kernel reset it.
    assert status in {413, 0}


@pytest.mark.parametrize("size", [1, 7])
def test_chunks_of_any_size_are_one_body(platform: Platform, mlp: str, size: int) -> None:
    status, body = exchange(platform.port, chunked(f"/v2/models/{mlp}/infer", json.dumps(GOOD).encode(), size))
    assert status == 200, body
    assert json.loads(body)["id"] == "1"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /v2\r\n\r\n",
        b"GET /v2 HTTP/9.9\r\nHost: a\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nHost: a\r\nBad Header: x\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nHost: a\r\nx: \x00\r\n\r\n",
        b"GET /v2 /v2 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        post("/v2/models/mlp/infer", b"{}", "Content-Length: -1"),
        post("/v2/models/mlp/infer", b"{}", "Content-Length: two"),
        post("/v2/models/mlp/infer", b"{}", "Content-Length: 2", "Content-Length: 3"),
        post("/v2/models/mlp/infer", b"0\r\n\r\n", "Content-Length: 5", "Transfer-Encoding: chunked"),
        post("/v2/models/mlp/infer", b"zz\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
        post("/v2/models/mlp/infer", b"ffffffffffffffffff\r\n", "Transfer-Encoding: chunked"),
        post("/v2/models/mlp/infer", b"{}", "Transfer-Encoding: gzip"),
        post("/v2/models/mlp/infer", b"{}", "Transfer-Encoding: chunked, identity"),
        b"GET /v2 HTTP/1.1\r\nHost: a\r\n" + b"".join(b"h%d: x\r\n" % n for n in range(2000)) + b"\r\n",
        b"GET /v2 HTTP/1.1\r\nHost: a\r\nlong: " + b"x" * 300_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 300_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
    ids=lambda data: data[:30].decode("latin-1").strip(),
)
def test_broken_http_is_refused(platform: Platform, request_bytes: bytes) -> None:
    status, _ = exchange(platform.port, request_bytes)
    assert status == 0 or 400 <= status < 500 or status == 501, status


# --- paths, methods, versions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/v2/nothing",
        "/v2/models",
        "/v2/models/",
        "/v2/models//infer",
        "/v2/models/nothing",
        "/v2/models/nothing/infer",
        "/v2/models/mlp/nothing",
        "/v2/models/mlp/infer/more",
        "/v2/models/mlp/versions",
        "/v2/models/mlp/versions/",
        "/v2/models/mlp/versions/9/infer",
        "/v2/models/mlp/versions/0/infer",
        "/v2/models/mlp/versions/-1/infer",
        "/v2/models/mlp/versions/1.0/infer",
        "/v2/models/mlp/versions/latest/infer",
        "/v2/models/mlp/versions/99999999999999999999/infer",
        "/v2/models/mlp/versions/%31%30/infer",
        "/v2/models/MLP/infer",
        "/v2/models/mlp%20/infer",
        "/v2/models/m%6Cp%2Finfer",
        "/v2/models/default%2Fmlp/infer",
        "/v2/models/mlp.default/infer",
        "/v2/models/%2e%2e/%2e%2e/infer",
        "/v2/models/%00/infer",
        "/v2/models/%0d%0ax-lepton-version:%201/infer",
        "/v2/models/%ff%fe/infer",
        "/v2/models/%E6%A8%A1/infer",
        "/v2/models/%/infer",
        "/v2/models/%zz/infer",
        "/v2/models/" + "x" * 10_000 + "/infer",
        "/v2/repository/models/nothing/nothing",
        "/v2x",
        "/v3",
        "/",
        "/health/ready",
        "/metrics",
        "/v1",
        "/v1/nothing",
        "/v1/models/mlp/nothing",
        "/openapi.json",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_path_that_is_not_there_is_404_or_405(platform: Platform, mlp: str, method: str, path: str) -> None:
    body = json.dumps(GOOD)
    request = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nx-api-key: {platform.key}\r\nContent-Length: {len(body)}"
    status, answer = exchange(platform.port, f"{request}\r\n\r\n{body}".encode())
    assert status in {400, 404, 405}, answer
    assert json.loads(answer)["error" if path.startswith("/v2") else "detail"]


@pytest.mark.parametrize("path", ["/v2/models/m\xfc/infer", "/v2/models/\x01/infer", "/v2/models/a b/infer"])
def test_path_that_is_no_url_is_refused(platform: Platform, path: str) -> None:
    status, _ = exchange(platform.port, post(path, b"{}"))
    assert status in {400, 404, 0}


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v2/models/mlp/infer", {"POST"}),
        ("PUT", "/v2/models/mlp/infer", {"POST"}),
        ("DELETE", "/v2/models/mlp", {"GET", "HEAD"}),
        ("POST", "/v2/models/mlp", {"GET", "HEAD"}),
        ("POST", "/v2", {"GET", "HEAD"}),
        ("POST", "/v2/health/live", {"GET", "HEAD"}),
        ("GET", "/v2/repository/index", {"POST"}),
        ("PATCH", "/v2/logging", {"GET", "HEAD", "POST"}),
        ("OPTIONS", "/v2/models/mlp/infer", {"POST"}),
    ],
)
def test_wrong_method_says_which_are_right(
    http: httpx.Client, mlp: str, method: str, path: str, allowed: set[str]
) -> None:
    answer = http.request(method, path)
    assert "Not Allowed" in error_of(answer, 405)
    assert set(answer.headers["allow"].replace(" ", "").split(",")) == allowed


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/repository/index", b"[]"),
        ("/v2/repository/index", b"{"),
        ("/v2/repository/index", b'{"ready": "yes"}'),
        ("/v2/repository/models/mlp/load", b"{"),
        ("/v2/repository/models/mlp/load", b'{"parameters": 5}'),
        ("/v2/repository/models/mlp/load", b'{"parameters": {"config": "{}"}}'),
        ("/v2/repository/models/mlp/load", b'{"parameters": {"version": "x"}}'),
        ("/v2/repository/models/mlp/unload", b"nonsense"),
        ("/v2/repository/models/mlp/unload", b"\xff"),
        ("/v2/trace/setting", b"[]"),
        ("/v2/trace/setting", b'{"trace_rate": {}}'),
        ("/v2/models/mlp/trace/setting", b'{"trace_level": ["LOUD"]}'),
        ("/v2/logging", b'{"log_info": "yes"}'),
        ("/v2/logging", b'{"nonsense": 1}'),
        ("/v2/logging", b"[" * 50_000),
    ],
)
def test_wrong_control_request_is_refused(platform: Platform, mlp: str, path: str, body: bytes) -> None:
    with platform.http() as operator:
        assert error_of(operator.post(path, content=body), 400)
        assert operator.get(f"/v2/models/{mlp}/ready").status_code == 200


@pytest.mark.parametrize("timeout", ["soon", "-1", "1.5", "9" * 40, ""])
def test_wrong_timeout_header_is_refused(http: httpx.Client, mlp: str, timeout: str) -> None:
    assert "x-request-timeout-ms" in error_of(infer(http, mlp, GOOD, x_request_timeout_ms=timeout), 400)


def test_caller_cannot_steer_past_the_rollout(platform: Platform, http: httpx.Client, mlp: str) -> None:
    for version in ("1", "9", "x"):
        assert "'test'" in error_of(infer(http, mlp, GOOD, x_lepton_version=version), 403)
    for headers in (
        {"host": "echo.default.models.lepton", "x-api-key": platform.key},
        {"x-envoy-max-retries": "100", "x-envoy-upstream-rq-timeout-ms": "0"},
        {"x-forwarded-for": "10.0.0.1"},
    ):
        answer = http.post(f"/v2/models/{mlp}/infer", json=GOOD, headers=headers)
        if "x-forwarded-for" in headers:
            assert answer.status_code in {200, 401}  # What a proxy before us says of its caller may be believed.
        else:
            assert (answer.status_code, answer.headers["x-lepton-version"]) == (200, "1")


# --- keys -------------------------------------------------------------------------------------------------------------

UNKNOWN_KEYS = {
    "unknown": "Bearer lp_" + "A" * 43,
    "malformed": "Bearer hello",
    "empty": "Bearer",
    "basic": "Basic dXNlcjpwYXNzd29yZA==",
    "bare": "lp_" + "A" * 43,
    "long": "Bearer lp_" + "A" * 10_000,
    "latin": "Bearer lp_\xe9\xff",
}


@pytest.mark.parametrize("case", UNKNOWN_KEYS)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/models/mlp/infer"),
        ("GET", "/v2/models/mlp"),
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/repository/models/mlp/unload"),
        ("POST", "/v2/logging"),
        ("GET", "/v1/models"),
        ("POST", "/v1/keys"),
        ("GET", "/v1/serving"),
        ("POST", "/v1/rollouts"),
    ],
)
def test_unknown_key_opens_nothing(platform: Platform, mlp: str, method: str, path: str, case: str) -> None:
    with platform.http(None) as http:
        answer = http.request(
            method, path, json=GOOD, headers=[(b"authorization", UNKNOWN_KEYS[case].encode("latin-1"))]
        )
    assert answer.status_code == 401, answer.text
    assert "lp_A" not in answer.text
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/keys", "/v1/tenants", "/v1/serving", "/v1/rollouts"])
def test_api_needs_a_key_even_from_this_machine(http: httpx.Client, path: str) -> None:
    answer = http.get(path)
    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"


def test_foreign_model_does_not_exist(
    platform: Platform, http: httpx.Client, make_key: Callable[..., str], name: str
) -> None:
    with platform.client(make_key("deploy", "read", tenant="wrong-input")) as client:
        client.push(mlp_model(9), name=name)
    with platform.http(make_key("infer", "read", "deploy", tenant="wrong-input-2")) as stranger:
        for each in (http, stranger):
            assert name in error_of(infer(each, name, GOOD), 404)
            assert name in error_of(each.get(f"/v2/models/{name}"), 404)
            assert error_of(each.get(f"/v2/models/{name}/ready"), 404)
            assert error_of(each.get(f"/v2/models/{name}/stats"), 404)
        for path in (f"/v1/models/{name}", f"/v1/models/{name}/timeline", f"/v1/serving/{name}"):
            assert stranger.get(path).status_code == 404
        assert error_of(stranger.post(f"/v2/repository/models/{name}/unload"), 404)
        assert stranger.post("/v1/rollouts", json={"model": name, "version": 1}).status_code == 404
