"""Requests that are traced, and the id that every answer has."""

import re
from datetime import UTC, datetime
from functools import partial

import pytest
from lepton import models as shapes
from lepton_common.auth import Caller
from lepton_common.errors import NotFound
from lepton_common.http11 import JSON
from lepton_common.records import Cache, LoadState, Scope
from lepton_gateway.traces import Traces

from .lab import Lab, error_of

INFER = "/v2/models/m/infer"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SAMPLED = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01", "tracestate": "shop=7"}
WORKER = (
    b'server-timing: decode;dur=0.010, queue;dur=0.020, run;dur=0.030;desc="8 rows of 3 requests", encode;dur=0.040'
)


def worker_tells(lab: Lab) -> None:
    headers = JSON + b"x-lepton-version: 1\r\n" + WORKER + b"\r\n"
    lab.mesh.handler = lambda request: request.respond(200, headers, b'{"model_name":"m","outputs":[]}')


async def reader(lab: Lab, tenant: str = "acme") -> dict[str, str]:
    secret = await lab.new_key(Scope.READ, tenant=tenant)
    await lab.until("/v2/traces", 200, secret)
    return {"authorization": f"Bearer {secret}"}


@pytest.mark.parametrize("path", [INFER, "/v2/models/nobody/infer", "/v2/models/m/versions/9/infer", "/v2/nothing"])
async def test_every_answer_names_its_request(lab: Lab, path: str) -> None:
    own = await lab.client.post(path, headers={b"x-request-id": "order 7/ä".encode()})
    assert own.headers.raw.count((b"x-request-id", "order 7/ä".encode())) == 1
    new = {(await lab.client.post(path)).headers["x-request-id"] for _ in range(2)}
    assert len(new) == 2
    too_long = await lab.client.post(path, headers={"x-request-id": "x" * 257})
    assert re.fullmatch("[0-9a-f]{32}", too_long.headers["x-request-id"])
    assert "traceparent" not in own.headers


async def test_a_request_that_asks_for_it_is_traced(lab: Lab) -> None:
    worker_tells(lab)
    answer = await lab.client.post(INFER, headers={**SAMPLED, "x-request-id": "order-7", "x-request-start": "t=1.5"})
    assert re.fullmatch(f"00-{TRACE_ID}-[0-9a-f]{{16}}-01", answer.headers["traceparent"])
    seen = lab.mesh.requests[-1].headers
    assert re.fullmatch(f"00-{TRACE_ID}-[0-9a-f]{{16}}-01", seen[b"traceparent"].decode())
    assert seen[b"traceparent"] not in (SAMPLED["traceparent"].encode(), answer.headers["traceparent"].encode())
    assert seen[b"tracestate"] == b"shop=7"

    key = await reader(lab)
    trace = shapes.Trace.model_validate_json((await lab.client.get("/v2/traces/order-7", headers=key)).content)
    assert (trace.model, trace.version, trace.status, trace.trace_id) == ("m", "1", 200, TRACE_ID)
    assert [each.name for each in trace.stages] == ["front", "wait", "mesh", "decode", "queue", "run", "encode"]
    assert [each.ms for each in trace.stages[3:]] == [0.01, 0.02, 0.03, 0.04]
    assert (trace.batch_rows, trace.batch_requests, trace.tries) == (8, 3, 1)
    assert sum(each.ms for each in trace.stages) == pytest.approx(trace.total_ms, rel=1e-6, abs=0.1)
    told = dict(each.split(";dur=") for each in answer.headers["server-timing"].split(", "))
    assert {name: float(ms) for name, ms in told.items()} == {each.name: each.ms for each in trace.stages}


async def test_a_failure_is_traced_as_far_as_it_got(lab: Lab) -> None:
    lab.mesh.handler = lambda request: request.respond(504, JSON, b"upstream request timeout")
    answer = await lab.client.post(INFER, headers={**SAMPLED, "x-request-id": "late"})
    assert answer.status_code == 504
    trace = (await lab.client.get("/v2/traces/late", headers=await reader(lab))).json()
    assert (trace["status"], [each["name"] for each in trace["stages"]]) == (504, ["wait", "mesh+worker"])


async def test_traces_are_their_tenants_and_want_the_scope_read(lab: Lab) -> None:
    await lab.client.post(INFER, headers={**SAMPLED, "x-request-id": "ours"})
    assert (await lab.client.get("/v2/traces/ours")).status_code == 403
    foreign = await reader(lab, "globex")
    assert "'ours'" in error_of(await lab.client.get("/v2/traces/ours", headers=foreign))
    assert (await lab.client.get("/v2/traces", headers=foreign)).json() == []
    assert [each["request_id"] for each in (await lab.client.get("/v2/traces", headers=await reader(lab))).json()] == [
        "ours"
    ]


async def test_beyond_the_allowance_requests_go_on_unsampled_in_the_same_trace(lab: Lab) -> None:
    answers = [await lab.client.post(INFER, headers=SAMPLED) for _ in range(150)]
    traced = sum("traceparent" in each.headers for each in answers)
    assert 50 <= traced < 150
    flags = [each.headers[b"traceparent"].decode() for each in lab.mesh.requests[-150:]]
    assert all(TRACE_ID in each for each in flags)
    assert sum(each.endswith("-01") for each in flags) == traced
    assert all(each.headers[b"tracestate"] == b"shop=7" for each in lab.mesh.requests[-150:])
    await lab.client.post(INFER, headers={"traceparent": "00-nonsense-01"})
    assert lab.mesh.requests[-1].headers[b"traceparent"] == b"00-nonsense-01"


async def test_what_is_not_sampled_has_no_trace(lab: Lab) -> None:
    own = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-00", "x-request-id": "quiet"}
    answer = await lab.client.post(INFER, headers=own)
    assert answer.headers.keys().isdisjoint({"traceparent", "server-timing"})
    assert lab.mesh.requests[-1].headers[b"traceparent"].decode() == own["traceparent"]
    assert (await lab.client.get("/v2/traces/quiet", headers=await reader(lab))).status_code == 404


async def test_what_the_cache_answers_names_its_own_request_and_no_others_trace(lab: Lab) -> None:
    await lab.serve("cached", 1, cache=Cache(ttl_s=60, max_bytes=100_000))
    await lab.report("c", ("cached", 1, LoadState.READY, ""))
    await lab.until("/v2/models/cached/ready", 200)
    worker_tells(lab)
    ask = partial(lab.client.post, "/v2/models/cached/infer")
    first, second = [await ask(headers={**SAMPLED, "x-request-id": name}) for name in ("first", "second")]
    assert [each.headers["x-lepton-cache"] for each in (first, second)] == ["miss", "hit"]
    assert [each.headers["x-request-id"] for each in (first, second)] == ["first", "second"]
    assert "traceparent" in first.headers
    assert second.headers.keys().isdisjoint({"traceparent", "server-timing"})


def test_one_tenants_traces_push_out_no_others() -> None:
    traces = Traces()
    traces.add("other", ended("kept"))
    for number in range(1000):
        traces.add("one", ended(str(number)))
    assert traces.get(reads("other"), "kept").request_id == "kept"
    newest = traces.newest_first(reads("one"))
    assert [each.request_id for each in newest[:2]] == ["999", "998"]
    assert len(newest) == 200
    with pytest.raises(NotFound, match="'799'"):
        traces.get(reads("one"), "799")


def test_a_key_for_other_models_sees_no_trace() -> None:
    traces = Traces()
    traces.add("one", ended("7"))
    traces.get(reads("one", "fr*"), "7")
    with pytest.raises(NotFound):
        traces.get(reads("one", "x*"), "7")
    assert traces.newest_first(reads("one", "x*")) == []


def reads(tenant: str, *models: str) -> Caller:
    return Caller(tenant, frozenset({Scope.READ}), "id", "test", models)


def ended(request_id: str) -> shapes.Trace:
    at = datetime(2026, 1, 2, tzinfo=UTC)
    return shapes.Trace(
        request_id=request_id, trace_id=TRACE_ID, model="fraud", version="1", status=200, at=at, total_ms=1, stages=[]
    )
