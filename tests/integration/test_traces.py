"""Where the time of a request went, asked for the way each kind of caller can, and told by the command."""

import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import numpy as np
import pytest
from confluent_kafka import Producer
from lepton import Client
from lepton.errors import NotFound
from lepton.models import Trace
from tritonclient.grpc import InferenceServerClient, InferInput

from .command import Lepton
from .local_platform import Platform, until
from .oip_requests import GOOD, ROW, infer

WORKER = ["decode", "queue", "run", "encode"]


@pytest.fixture
def traceparent() -> str:
    """A new trace, sampled."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


def names(trace: Trace) -> list[str]:
    return [stage.name for stage in trace.stages]


def test_over_http_every_stage_is_told_and_they_add_up(
    http: httpx.Client, client: Client, mlp: str, traceparent: str
) -> None:
    answer = infer(http, mlp, GOOD, traceparent=traceparent, x_request_id=f"order-{traceparent}")
    assert answer.headers["x-request-id"] == f"order-{traceparent}"
    assert answer.headers["traceparent"][:35] == traceparent[:35]
    trace = client.trace(f"order-{traceparent}")
    assert (trace.model, trace.version, trace.status, trace.trace_id) == (mlp, "1", 200, traceparent[3:35])
    assert names(trace) == ["front", "wait", "mesh", *WORKER]
    assert sum(stage.ms for stage in trace.stages) == pytest.approx(trace.total_ms, abs=1)
    assert (trace.batch_rows, trace.batch_requests, trace.tries) == (1, 1, 1)
    assert trace in client.traces()


def test_a_slow_models_time_is_in_its_run(client: Client, slow: str) -> None:
    outputs = client.infer(slow, {"rounds": np.array([5000])}, traced=True)
    stages = {stage.name: stage.ms for stage in client.trace(outputs.request_id).stages}
    assert stages["run"] > stages["decode"] + stages["encode"]
    assert stages["run"] > 5


def test_grpc_metadata_ask_for_it_too(platform: Platform, client: Client, mlp: str, traceparent: str) -> None:
    tensor = InferInput("x", [1, 4], "FP32")
    tensor.set_data_from_numpy(np.array([ROW], np.float32))
    identity = str(uuid4())
    with InferenceServerClient(platform.address) as triton:
        triton.infer(mlp, [tensor], headers={"traceparent": traceparent, "x-request-id": identity})
    trace = client.trace(identity)
    assert trace.trace_id == traceparent[3:35]
    assert names(trace) == ["front", "wait", "mesh", *WORKER]


def test_a_kafka_message_asks_for_it_too(
    platform: Platform, client: Client, mlp: str, make_key: Callable[..., str], traceparent: str
) -> None:
    identity = str(uuid4())
    told: dict[str, str | bytes | None] = {
        "id": identity,
        "authorization": f"Bearer {make_key('infer')}",
        "traceparent": traceparent,
    }
    producer = Producer({"bootstrap.servers": platform.layout.kafka})
    producer.produce("lepton.inference.requests", json.dumps({"model": mlp, **GOOD}), headers=told)
    producer.flush(10)

    def found() -> Trace | None:
        try:
            return client.trace(identity)
        except NotFound:
            return None

    trace: Trace = until(found, 40)
    assert trace.trace_id == traceparent[3:35]
    assert names(trace) == ["kafka", "wait", "mesh", *WORKER]


def test_trace_settings_trace_what_did_not_ask(
    http: httpx.Client, client: Client, platform: Platform, mlp: str
) -> None:
    with platform.http() as operator:
        setting = f"/v2/models/{mlp}/trace/setting"
        operator.post(setting, json={"trace_level": ["TIMESTAMPS"], "trace_rate": "1"}).raise_for_status()
        try:
            identity = infer(http, mlp, GOOD).headers["x-request-id"]
        finally:
            operator.post(setting, json={"trace_level": None, "trace_rate": None}).raise_for_status()
    assert names(client.trace(identity))[-4:] == WORKER
    quiet = infer(http, mlp, GOOD)
    assert "traceparent" not in quiet.headers
    with pytest.raises(NotFound, match=quiet.headers["x-request-id"]):
        client.trace(quiet.headers["x-request-id"])


def test_command_shows_the_stages_of_its_own_and_of_any_traced_request(
    lepton: Lepton, mlp: str, make_key: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "x.json").write_text(json.dumps([ROW]))
    traced = lepton("infer", mlp, "--input", "x.json", "--trace")
    assert (traced.code, traced.err) == (0, "")
    assert "worker: batch run" in traced.out
    told: dict[str, Any] = lepton("infer", mlp, "--input", "x.json", "--trace", "--json").json["trace"]
    assert lepton("trace", told["request_id"], "--json").json == told
    assert "mesh, there and back" in lepton("trace", told["request_id"]).out
    assert told["request_id"] in [each["request_id"] for each in lepton("trace", "--json").json]
    foreign = lepton("trace", told["request_id"], LEPTON_API_KEY=make_key("read", tenant="traced"))
    assert foreign.code == 4
    assert told["request_id"] in foreign.err
