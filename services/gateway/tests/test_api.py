"""What callers of the gateway see: infer and what is known of models."""

from datetime import UTC, datetime, timedelta

import httpx
import orjson
import pytest
from lepton_common.etcd import EtcdClient
from lepton_common.http11 import Request
from lepton_common.records import LoadState, Scope
from lepton_common.telemetry import Telemetry

from .lab import Lab, error_of, running

INFER = "/v2/models/m/infer"


async def test_an_infer_request_goes_through_the_mesh_unparsed(lab: Lab) -> None:
    response = await lab.client.post(INFER, content=b"\x00not json", headers={"x-lepton-bucket": "9", "x-other": "1"})
    assert response.status_code == 200
    assert response.json()["model_name"] == "m"
    assert response.headers["x-lepton-version"] == "1"
    request = lab.mesh.requests[-1]
    assert request.body == b"\x00not json"
    assert request.target == b"/v2/models/m/infer"
    assert request.headers[b"host"] == b"m.acme.models.lepton"
    assert request.headers.keys().isdisjoint({b"x-lepton-version", b"x-lepton-bucket", b"authorization", b"x-other"})


async def test_headers_of_the_protocol_pass_both_ways(lab: Lab) -> None:
    block = (
        b"content-type: application/octet-stream\r\ninference-header-content-length: 2\r\ncontent-encoding: gzip\r\n"
        b"server: envoy\r\n"
    )
    lab.mesh.handler = lambda request: request.respond(200, block, b"{}\0\0")
    sent = {
        "content-type": "application/octet-stream",
        "inference-header-content-length": "7",
        "content-encoding": "deflate",
        "accept-encoding": "gzip",
        "x-request-timeout-ms": "900",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
    }
    async with lab.client.stream("POST", INFER, content=b"x", headers=sent) as response:
        assert response.headers["inference-header-content-length"] == "2"
        assert response.headers["content-encoding"] == "gzip"
        assert "server" not in response.headers
        assert b"".join([chunk async for chunk in response.aiter_raw()]) == b"{}\0\0"
    seen = lab.mesh.requests[-1].headers
    assert {name.encode(): value.encode() for name, value in sent.items()}.items() <= seen.items()


async def test_a_version_in_the_path_is_asked_for_by_header(lab: Lab) -> None:
    await lab.serve("m", 1, 2)
    await lab.report("w", ("m", 1, LoadState.READY, ""), ("m", 2, LoadState.READY, ""))
    await lab.until("/v2/models/m/versions/2/ready", 200)
    for path in (INFER.replace("/infer", "/versions/2/infer"), "/v2/models/%6d/versions/2/infer"):
        assert (await lab.client.post(path, content=b"{}")).status_code == 200
        assert lab.mesh.requests[-1].target == b"/v2/models/m/infer"
        assert lab.mesh.requests[-1].headers[b"x-lepton-version"] == b"2"


async def test_metadata_and_config_are_the_workers_answers(lab: Lab) -> None:
    lab.mesh.handler = lambda request: request.respond(200, b"", request.method.encode() + b" " + request.target)
    assert (await lab.client.get("/v2/models/m")).content == b"GET /v2/models/m"
    assert (await lab.client.get("/v2/models/m/versions/1/config")).content == b"GET /v2/models/m/config"
    response = await lab.client.head("/v2/models/m")
    assert (response.status_code, response.content) == (200, b"")


async def test_metrics_are_on_the_admin_port_and_nothing_else_is(lab: Lab) -> None:
    assert (await lab.client.get("/metrics")).status_code == 404
    async with httpx.AsyncClient(base_url=lab.admin) as admin:
        answer = await admin.get("/metrics")
        assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (200, "text/plain")
        assert "lepton_gateway_connections" in answer.text
        assert (await admin.post("/metrics")).status_code == 405
        for path in ("/", "/v2", "/health/live", "/v2/models/m/infer", "/metrics/x"):
            assert error_of(await admin.get(path)).startswith("Not Found")


@pytest.mark.parametrize("path", ["/v2", "/v2/"])
async def test_the_server_describes_itself_to_anyone(lab: Lab, path: str) -> None:
    response = await lab.client.get(path, headers={"authorization": "Bearer nonsense"})
    assert response.json()["name"] == "lepton"
    assert {"binary_tensor_data", "model_repository", "statistics", "trace", "logging"} <= set(
        response.json()["extensions"]
    )


async def test_health_says_live_and_ready(lab: Lab) -> None:
    assert (await lab.client.get("/v2/health/live")).json() == {"live": True}
    assert (await lab.client.get("/v2/health/ready")).json() == {"ready": True}
    assert (await lab.client.get("/health/live")).status_code == 200
    assert (await lab.client.get("/health/ready")).status_code == 200


async def test_a_model_is_ready_when_a_worker_has_what_takes_traffic(lab: Lab) -> None:
    assert (await lab.client.get("/v2/models/m/ready")).json() == {"name": "m", "ready": True}
    await lab.report("w", ("m", 1, LoadState.FAILED, "it is not a model"))
    response = await lab.until("/v2/models/m/ready", 503)
    assert response.json()["ready"] is False
    assert "it is not a model" in error_of(response)
    assert response.headers["retry-after"] == "1"
    await lab.report("w2", ("m", 1, LoadState.READY, ""))
    await lab.until("/v2/models/m/ready", 200)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v2/models/nobody/infer", 404),
        ("GET", "/v2/models/nobody", 404),
        ("GET", "/v2/models/nobody/ready", 404),
        ("GET", "/v2/models/nobody/stats", 404),
        ("GET", "/v2/models/nobody/trace/setting", 404),
        ("POST", "/v2/models/m%2Fx/infer", 404),
        ("POST", "/v2/models/%ff%00/infer", 404),
        ("POST", "/v2/models/m/versions/9/infer", 404),
        ("POST", "/v2/models/m/versions/latest/infer", 404),
        ("GET", "/v2/models/m/versions/9/ready", 404),
        ("GET", "/v2/nothing", 404),
        ("GET", "/", 404),
        ("GET", "/v2/models", 404),
        ("GET", "/v2/models//infer", 404),
        ("GET", INFER, 405),
        ("POST", "/v2", 405),
        ("PUT", "/v2/models/m", 405),
        ("GET", "/v2/repository/index", 405),
        ("DELETE", "/v2/logging", 405),
        ("GET", "/v2/systemsharedmemory/status", 501),
        ("POST", "/v2/cudasharedmemory/region/x/register", 501),
    ],
)
async def test_what_is_not_there_is_an_error_of_the_protocol(lab: Lab, method: str, path: str, status: int) -> None:
    response = await lab.client.request(method, path)
    assert response.status_code == status
    assert error_of(response)
    assert ("allow" in response.headers) == (status == 405)


async def test_a_body_over_the_limit_is_413(lab: Lab) -> None:
    response = await lab.client.post(INFER, content=b"x" * 1_000_001)
    assert response.status_code == 413
    assert "1000001" in error_of(response)


@pytest.mark.parametrize("value", ["soon", "-1", "1.5", "9" * 13])
async def test_a_senseless_timeout_is_400(lab: Lab, value: str) -> None:
    response = await lab.client.post(INFER, headers={"x-request-timeout-ms": value})
    assert response.status_code == 400
    assert "x-request-timeout-ms" in error_of(response)


# --- who calls ---


async def test_keys_are_asked_for_and_checked(lab: Lab) -> None:
    expired = await lab.new_key(Scope.INFER, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    reader = await lab.new_key(Scope.READ)
    await lab.until("/v2/models/m/ready", 200, key=reader)
    await lab.until("/v2/models/m/ready", 401, key=expired)
    for header, status in [
        ({"authorization": f"Bearer {lab.key}"}, 200),
        ({"authorization": "", "x-api-key": lab.key}, 200),
        ({"authorization": f"Bearer {expired}"}, 401),
        ({"authorization": f"Bearer {reader}"}, 403),
        ({"authorization": "Bearer lp_" + "x" * 43}, 401),
        ({"authorization": "Bearer \xff"}, 401),
        ({"authorization": "Basic abc"}, 401),
    ]:
        response = await lab.client.post(
            INFER, headers=[(name.encode(), value.encode("latin-1")) for name, value in header.items()]
        )
        assert response.status_code == status, header
        if status != 200:
            assert error_of(response)
            assert lab.key not in response.text


async def test_another_tenants_model_is_404(lab: Lab) -> None:
    stranger = await lab.new_key(Scope.INFER, tenant="other")
    response = await lab.until("/v2/models/m/ready", 404, key=stranger)
    assert error_of(response) == error_of(await lab.client.get("/v2/models/x/ready")).replace("'x'", "'m'")


async def test_a_revoked_key_stops_working(lab: Lab) -> None:
    found, _ = await lab.etcd.list("/lepton/keys/")
    for each in found:
        await lab.etcd.delete(each.key)
    assert error_of(await lab.until("/v2/models/m/ready", 401)) == "unknown API key"


async def test_callers_on_this_machine_need_no_key_where_that_is_allowed(lab: Lab) -> None:
    await lab.serve("mine", 1, tenant="default")
    del lab.client.headers["authorization"]
    async with lab.patience():
        while (await lab.client.post("/v2/models/mine/infer")).status_code == 404:
            continue
    assert (await lab.client.post("/v2/models/mine/infer")).status_code == 200
    assert (await lab.client.post(INFER)).status_code == 404
    assert (await lab.client.post("/v2/repository/models/mine/unload")).status_code == 403
    for forwarded, status in [
        ("127.0.0.1", 200),
        ("127.0.0.1, ::1", 200),
        ("203.0.113.9", 401),
        ("127.0.0.1, 203.0.113.9", 401),
        ("0.0.0.0", 401),
        ("255.255.255.255", 401),
        ("x", 401),
    ]:
        response = await lab.client.post("/v2/models/mine/infer", headers={"x-forwarded-for": forwarded})
        assert response.status_code == status, forwarded


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:8080"}, 200),
        ({"host": "localhost"}, 200),
        ({"host": "[::1]:8080"}, 200),
        ({"origin": "http://localhost:3000"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"origin": "http://localhost.evil.example"}, 403),
        ({"origin": "http://localhost@evil.example"}, 403),
        ({"origin": "http://[::1"}, 403),
        ({"host": "evil.example:8080"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "evil.example", "origin": "http://evil.example"}, 403),
        ({"host": "0.0.0.0:8080"}, 403),
    ],
)
async def test_pages_from_elsewhere_need_a_key_in_a_browser_on_this_machine(
    lab: Lab, headers: dict[str, str], status: int
) -> None:
    await lab.serve("mine", 1, tenant="default")
    await lab.until("/v2/models/mine/stats", 200, key=await lab.new_key(Scope.READ, tenant="default"))
    with_key = {**headers, "x-api-key": await lab.new_key(Scope.INFER, Scope.READ, tenant="default")}
    await lab.until("/v2/models/mine/stats", 200, key=with_key["x-api-key"])
    del lab.client.headers["authorization"]
    for method, path in (("POST", "infer"), ("GET", "stats"), ("GET", "ready"), ("HEAD", "config")):
        answer = await lab.client.request(method, f"/v2/models/mine/{path}", headers=headers)
        assert (answer.status_code == 403) == (status == 403), (method, path)
        if status == 403 and method != "HEAD":
            assert "header origin" in error_of(answer) if "origin" in headers else "header host" in error_of(answer)
        # A key is nothing that a browser would send by itself.
        answer = await lab.client.request(method, f"/v2/models/mine/{path}", headers=with_key)
        assert answer.status_code != 403, (method, path)


async def test_without_that_setting_everyone_needs_a_key(etcd: EtcdClient, telemetry: Telemetry) -> None:
    async with running(etcd, telemetry, keyless=False) as lab:
        del lab.client.headers["authorization"]
        response = await lab.client.post(INFER)
        assert response.status_code == 401
        assert "API key" in error_of(response)
        assert response.headers["www-authenticate"] == "Bearer"


async def test_requests_are_counted_by_version_and_status(lab: Lab) -> None:
    def flaky(request: Request) -> None:
        request.respond(400 if request.body else 200, b"x-lepton-version: 1\r\n", orjson.dumps({"error": "bad"}))

    lab.mesh.handler = flaky
    await lab.client.post(INFER)
    await lab.client.post(INFER, content=b"bad")
    await lab.client.post("/v2/models/nobody/infer")
    text = await lab.metrics()
    assert 'lepton_gateway_refused_requests_total{code="404"} 1.0' in text
    labels = 'model="m",tenant="acme",version="1"'
    assert f'lepton_gateway_requests_total{{code="200",{labels}}} 1.0' in text
    assert f'lepton_gateway_requests_total{{code="400",{labels}}} 1.0' in text
    assert f'lepton_gateway_request_seconds_bucket{{le="+Inf",{labels}}} 2.0' in text
    assert 'lepton_gateway_in_flight{model="m",tenant="acme"} 0.0' in text
    assert "lepton_gateway_etcd_stale_seconds 0.0" in text
