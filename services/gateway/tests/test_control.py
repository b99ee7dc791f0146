"""The control pages, called by NVIDIA's client as it stands."""

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
import tritonclient.http as triton
from lepton_common.etcd import EtcdClient
from lepton_common.http11 import JSON, Request, Server
from lepton_common.records import LoadState, Scope
from lepton_common.settings import Settings
from lepton_common.telemetry import Telemetry, configure
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from tritonclient.utils import InferenceServerException

from .lab import Lab, error_of, running

# A number so long that Python refuses to read it.
LONG = b'{"parameters": {"version": "%b"}}' % (b"0" * 9 + b"1" * 5000)
PROBLEM = b"content-type: application/problem+json\r\n"


class Caller:
    """tritonclient, off the event loop, with a key."""

    def __init__(self, lab: Lab, key: str) -> None:
        self.key = key
        self._url = "{}:{}".format(*lab.address)
        self._headers = {"authorization": f"Bearer {key}"}

    async def __call__(self, method: str, *arguments: Any, **options: Any) -> Any:
        def call() -> Any:
            with triton.InferenceServerClient(self._url) as client:
                return getattr(client, method)(*arguments, headers=self._headers, **options)

        return await asyncio.to_thread(call)


async def admin_of(lab: Lab, tenant: str) -> Caller:
    """A caller with an admin key of that tenant, which the gateway has heard of."""
    key = await lab.new_key(Scope.ADMIN, tenant=tenant)
    await lab.until("/v2/logging", 200, key=key)
    return Caller(lab, key)


@pytest.fixture
async def admin(lab: Lab) -> Caller:
    return await admin_of(lab, "acme")


@pytest.fixture
async def operator(lab: Lab) -> Caller:
    return await admin_of(lab, "default")


@asynccontextmanager
async def answering(handler: Callable[[Request], None]) -> AsyncIterator[Server]:
    server = Server(handler)
    await server.start("127.0.0.1")
    try:
        yield server
    finally:
        await server.drain(0)


# --- repository ---


async def test_the_index_lists_the_tenants_versions(lab: Lab, admin: Caller) -> None:
    await lab.serve("m", 1, 2)
    await lab.serve("alien", 1, tenant="other")
    await lab.until("/v2/models/m/versions/2/ready", 503)
    entries = await admin("get_model_repository_index")
    assert [(entry["name"], entry["version"], entry["state"]) for entry in entries] == [
        ("m", "1", "READY"),
        ("m", "2", "LOADING"),
    ]
    response = await lab.client.post("/v2/repository/index", content=b'{"ready": true}')
    assert [entry["version"] for entry in response.json()] == ["1"]
    response = await lab.client.post("/v2/repository/index", content=b'{"ready": 1}')
    assert (response.status_code, error_of(response)) == (400, "ready must be true or false")


async def test_loading_and_unloading_are_asked_of_rollout(etcd: EtcdClient, telemetry: Telemetry) -> None:
    asked: list[tuple[str, Any, bytes | None]] = []

    def rollout(request: Request) -> None:
        asked.append((request.path, orjson.loads(request.body), request.headers.get(b"authorization")))
        if "nobody" in request.path:
            request.respond(404, PROBLEM, b'{"detail": "model \'nobody\' is not known"}')
        elif "broken" in request.path:
            request.respond(500, b"", b"oops")
        else:
            request.respond(200, JSON, b"{}")

    async with answering(rollout) as server:
        url = "http://{}:{}".format(*server.address)
        async with running(etcd, telemetry, rollout_url=url) as lab:
            key = await lab.new_key(Scope.DEPLOY)
            await lab.until("/v2/models/m/ready", 200, key=key)
            deployer = Caller(lab, key)
            await deployer("load_model", "m")
            await deployer("load_model", "m", query_params={"version": 2})
            await deployer("unload_model", "m", unload_dependents=True)
            bearer = f"Bearer {key}".encode()
            assert asked == [
                ("/v1/serving/m/load", {"version": None}, bearer),
                ("/v1/serving/m/load", {"version": 2}, bearer),
                ("/v1/serving/m/unload", {"version": None}, bearer),
            ]
            with pytest.raises(InferenceServerException, match="'nobody' is not known"):
                await deployer("load_model", "nobody")
            with pytest.raises(InferenceServerException, match="answered with status 500"):
                await deployer("load_model", "broken")
            with pytest.raises(InferenceServerException, match="config is not supported"):
                await deployer("load_model", "m", config="{}")
            for name, status in [("../../v1/keys", 404), ("a%2Fb", 400), ("m?x", 404)]:
                headers = {"authorization": f"Bearer {key}"}
                response = await lab.client.post(f"/v2/repository/models/{name}/load", headers=headers)
                assert response.status_code == status, name
            assert (await lab.client.post("/v2/repository/models/m/load")).status_code == 403


async def test_a_rollout_that_is_away_is_503(lab: Lab, admin: Caller) -> None:
    with pytest.raises(InferenceServerException, match="does not answer") as caught:
        await admin("load_model", "m")
    assert caught.value.status() == "503"


@pytest.mark.parametrize("body", [b"[]", b"{", b'{"parameters": 1}', b'{"parameters": {"version": "x"}}', LONG])
async def test_senseless_load_requests_are_400(lab: Lab, admin: Caller, body: bytes) -> None:
    key = await lab.new_key(Scope.DEPLOY)
    await lab.until("/v2/models/m/ready", 200, key=key)
    headers = {"authorization": f"Bearer {key}"}
    response = await lab.client.post("/v2/repository/models/m/load", content=body, headers=headers)
    assert response.status_code == 400
    assert error_of(response)


# --- statistics ---


async def test_statistics_are_summed_over_the_workers_that_answer(lab: Lab, admin: Caller) -> None:
    def worker(request: Request) -> None:
        assert request.headers[b"host"] == b"m.acme.models.lepton"
        version = request.path.split("/")[5]
        entry = {"name": "m", "version": version, "inference_count": 3}
        request.respond(200, JSON, orjson.dumps({"model_stats": [entry]}))

    async with answering(worker) as server:
        address = "{}:{}".format(*server.address)
        await lab.serve("m", 1, 2)
        for name in ("a", "b"):
            loaded = [("m", version, LoadState.READY, "") for version in (1, 2)]
            await lab.report(name, *loaded, address=address)
        await lab.report("dead", ("m", 1, LoadState.READY, ""), address="127.0.0.1:1")
        await lab.until("/v2/models/m/versions/2/ready", 200)
        everything = (await admin("get_inference_statistics"))["model_stats"]
        assert [(entry["version"], entry["inference_count"]) for entry in everything] == [("1", 6), ("2", 6)]
        assert len((await admin("get_inference_statistics", "m", "2"))["model_stats"]) == 1
        with pytest.raises(InferenceServerException, match="no version 7"):
            await admin("get_inference_statistics", "m", "7")


# --- trace ---


async def test_trace_settings_change_what_is_traced(etcd: EtcdClient, telemetry: Telemetry) -> None:
    spans = InMemorySpanExporter()
    tracing = configure("traced", Settings(otlp="http://127.0.0.1:1"), CollectorRegistry())
    tracing.provider.add_span_processor(SimpleSpanProcessor(spans))
    async with running(etcd, tracing) as lab:
        operator, admin = await admin_of(lab, "default"), await admin_of(lab, "acme")
        assert (await admin("get_trace_settings"))["trace_level"] == ["OFF"]
        changed = await operator("update_trace_settings", settings={"trace_level": ["TIMESTAMPS"], "trace_rate": "2"})
        assert (changed["trace_level"], changed["trace_rate"], changed["trace_count"]) == (["TIMESTAMPS"], "2", "-1")
        for _ in range(4):
            await lab.client.post("/v2/models/m/infer")
        finished = spans.get_finished_spans()
        assert [span.name for span in finished] == ["mesh", "infer"] * 2
        sent = lab.mesh.requests[-2].headers[b"traceparent"].decode()
        assert format(finished[2].context.span_id, "016x") in sent
        assert finished[2].parent is not None
        assert finished[2].parent.span_id == finished[3].context.span_id
        assert dict(finished[1].attributes or {})["lepton.version"] == "1"

        await admin("update_trace_settings", "m", {"trace_rate": "1", "trace_count": "1"})
        assert (await admin("get_trace_settings", "m"))["trace_rate"] == "1"
        assert (await admin("get_trace_settings"))["trace_rate"] == "2"
        for _ in range(3):
            await lab.client.post("/v2/models/m/infer")
        assert len(spans.get_finished_spans()) == 6
        assert (await admin("update_trace_settings", "m", {"trace_rate": None}))["trace_rate"] == "2"
        await operator("update_trace_settings", settings={"trace_level": ["OFF"]})
        await lab.client.post("/v2/models/m/infer")
        assert len(spans.get_finished_spans()) == 6
    tracing.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"trace_level": ["TENSORS"]},
        {"trace_level": []},
        {"trace_rate": "0"},
        {"trace_rate": 1.5},
        {"trace_count": "x"},
        {"trace_mode": "triton"},
        {"color": "red"},
    ],
)
async def test_wrong_trace_settings_are_400(operator: Caller, settings: dict[str, Any]) -> None:
    with pytest.raises(InferenceServerException, match=next(iter(settings))) as caught:
        await operator("update_trace_settings", settings=settings)
    assert caught.value.status() == "400"


# --- logging ---


async def test_log_settings_change_what_is_logged(etcd: EtcdClient) -> None:
    out = io.BytesIO()
    telemetry = configure("logged", Settings(), CollectorRegistry(), out)
    async with running(etcd, telemetry) as lab:
        operator = await admin_of(lab, "default")
        before = await operator("get_log_settings")
        assert before == {
            "log_file": "",
            "log_info": True,
            "log_warning": True,
            "log_error": True,
            "log_verbose_level": 0,
            "log_format": "ISO8601",
        }
        await lab.client.post("/v2/models/m/infer", content=b"quiet")
        changed = await operator("update_log_settings", {"log_verbose_level": 1, "log_format": "default"})
        assert changed == {**before, "log_verbose_level": 1, "log_format": "default"}
        await lab.client.post("/v2/models/m/infer", content=b"loud!!")
        await operator("update_log_settings", {"log_info": False})
        await lab.client.post("/v2/models/m/infer", content=b"hushed!")
    telemetry.close()
    lines = [orjson.loads(line) for line in out.getvalue().splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["bytes_in"] for line in requests] == [6]
    assert requests[0]["model"] == "acme/m"
    assert requests[0]["status"] == 200
    assert len(requests[0]["at"]) == len("1123 23:59:59.123456")


@pytest.mark.parametrize(
    "settings",
    [{"log_info": 1}, {"log_verbose_level": -1}, {"log_format": "x"}, {"log_file": "/etc/passwd"}, {"color": "red"}],
)
async def test_wrong_log_settings_are_400(operator: Caller, settings: dict[str, Any]) -> None:
    with pytest.raises(InferenceServerException, match=next(iter(settings))):
        await operator("update_log_settings", settings)


async def test_only_the_operator_changes_settings_of_all_tenants(lab: Lab, admin: Caller, operator: Caller) -> None:
    for path in ("/v2/logging", "/v2/trace/setting"):
        assert (await lab.client.get(path)).status_code == 200
        for key, status in ((lab.key, 403), (admin.key, 403), (operator.key, 200)):
            headers = {"authorization": f"Bearer {key}"}
            assert (await lab.client.post(path, content=b"{}", headers=headers)).status_code == status
