"""Lepton's own processes, killed, frozen and restarted under load: callers do not notice, what was accepted is done."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import grpc
import httpx
import pytest
from lepton.processes import http_get
from tritonclient.grpc import service_pb2

from .faults import (
    CALLERS,
    ROW,
    SETTINGS,
    answering_version,
    ended,
    is_taken_out,
    load_on,
    push_versions,
    start_rollout,
    swap,
    wait_for_workers,
    wrong_raw,
)
from .load import GrpcLoad
from .local_platform import Platform, running_platform, until
from .onnx_models import mlp
from .pushes import Pushes

LEPTON = Path(sys.executable).with_name("lepton")
MODEL = "checked"


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder from which the platform takes models that are pushed by Kafka."""
    return tmp_path_factory.mktemp("pushed")


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory, pushed: Path) -> Iterator[Platform]:
    """A platform that these tests break; each leaves it ready. Versions 1 and 2 of MODEL are known."""
    settings = {**SETTINGS, "LEPTON_INGEST_FROM": f"file://{pushed}"}
    with running_platform(tmp_path_factory.mktemp("victim"), settings=settings) as victim:
        push_versions(victim, MODEL, 1, 2)
        yield victim


@pytest.fixture
def http(victim: Platform) -> Iterator[httpx.Client]:
    with victim.http() as http:
        yield http


# --- workers ----------------------------------------------------------------------------------------------------------


def test_killed_workers_fail_no_request(victim: Platform) -> None:
    with load_on(victim, MODEL) as load:
        for worker in ("worker-1", "worker-2"):
            load.wait_for(100)
            victim.kill(worker)
            load.wait_for(300)
            victim.wait_ready()
            wait_for_workers(victim, 2)
        load.wait_for(100)
    assert not load.failures, load.report()


def test_workers_restarted_one_after_the_other_fail_no_request(victim: Platform) -> None:
    with load_on(victim, MODEL) as load:
        for worker in ("worker-1", "worker-2"):
            load.wait_for(100)
            victim.restart(worker)
            wait_for_workers(victim, 2)
        load.wait_for(100)
    assert not load.failures, load.report()


def test_a_frozen_worker_delays_its_own_requests_only_and_is_used_again_when_it_thaws(victim: Platform) -> None:
    wait_for_workers(victim, 2)
    with load_on(victim, MODEL, timeout_ms=3000) as load:
        load.wait_for(100)
        with victim.frozen("worker-1"):
            until(lambda: is_taken_out(victim, "worker-1"), 40)
            # What was on its way to the frozen worker ends at its deadline. Nobody is sent there any more.
            load.wait_for(50)
            taken_out_at = time.monotonic()
            load.wait_for(300)
        wait_for_workers(victim, 2)
        before = _runs(victim, "worker-1")
        until(lambda: _runs(victim, "worker-1") > before)
    assert {answer.status for answer in load.failures} <= {504}, load.report()
    assert not [answer for answer in load.failures if answer.begun_s > taken_out_at], load.report()


def _runs(victim: Platform, worker: str) -> int:
    _, text = http_get(victim.layout.ports[worker], "/v2/models/stats")
    return sum(each["execution_count"] for each in httpx.Response(200, content=text).json()["model_stats"])


# --- versions ---------------------------------------------------------------------------------------------------------


def test_a_hundred_hot_swaps_fail_no_request_and_each_one_holds(victim: Platform, http: httpx.Client) -> None:
    with load_on(victim, MODEL) as load:
        for _ in range(100):
            version = swap(http, MODEL)
            assert answering_version(http, MODEL) == str(version)
        load.wait_for(100)
    assert not load.failures, load.report()
    assert set(load.versions) == {"1", "2"}


def test_a_rollout_that_was_accepted_goes_on_when_rollout_is_killed(victim: Platform, http: httpx.Client) -> None:
    with load_on(victim, MODEL) as load:
        for _ in range(2):
            version = 3 - int(answering_version(http, MODEL))
            accepted = start_rollout(http, MODEL, version)
            victim.kill("rollout")
            rollout = ended(http, accepted)
            assert rollout["state"] == "promoted", rollout
            assert answering_version(http, MODEL) == str(version)
    assert not load.failures, load.report()


# --- pushes by Kafka --------------------------------------------------------------------------------------------------


def test_every_push_by_kafka_has_its_one_outcome_when_the_registry_is_killed(victim: Platform, pushed: Path) -> None:
    good = [f"push-{number}" for number in range(6)]
    for number, request in enumerate(good):
        (pushed / f"{request}.onnx").write_bytes(mlp(seed=10 + number).SerializeToString())
    (pushed / "bad.onnx").write_bytes(b"not a model")
    (pushed / "last.onnx").write_bytes(mlp(seed=10).SerializeToString())
    with closing(Pushes(victim)) as pushes:

        def ask(*requests: str, folder: Path = pushed) -> None:
            for each in requests:
                pushes.ask(each, model="pushed", uri=f"file://{folder}/{each}.onnx", deploy=False)

        ask(*good[:3])
        until(victim.process("registry").children)  # A model is being looked at.
        victim.kill("registry")
        # A producer that was not told whether the third one is stored sends it again.
        ask(*good[2:], "bad")
        ask("outside", folder=Path("/etc"))
        victim.wait_ready()
        victim.kill("registry")
        pushes.wait_for(*good, "bad", "outside")
        # What would be done twice is done before this one, which has the bytes of the first.
        ask("last")
        pushes.wait_for("last")
        victim.wait_ready()
    assert {len(each) for each in pushes.outcomes.values()} == {1}, pushes.outcomes
    outcomes = {request: outcome for request, (outcome,) in pushes.outcomes.items()}
    assert {outcomes[each].kind for each in (*good, "last")} == {"IngestFinished"}, outcomes
    assert sorted(outcomes[each].told for each in good) == [1, 2, 3, 4, 5, 6]
    assert outcomes["last"].told == outcomes["push-0"].told
    assert len(pushes.registered["pushed"]) == len(good)
    assert outcomes["bad"].kind == "IngestFailed"
    assert "not an ONNX model" in str(outcomes["bad"].told)
    assert outcomes["outside"].kind == "dead letter"
    assert "is not below any prefix that the operator allows" in str(outcomes["outside"].told)
    with victim.client() as client:
        assert len(client.versions("pushed")) == len(good)


# --- every part -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["rollout", "registry", "postgres", "kafka", "etcd"])
def test_a_killed_part_fails_no_request_and_serves_again(victim: Platform, http: httpx.Client, part: str) -> None:
    with load_on(victim, MODEL) as load:
        load.wait_for(100)
        victim.kill(part)
        load.wait_for(200)
        victim.wait_ready()
        load.wait_for_version(swap(http, MODEL))
    assert not load.failures, load.report()


def test_callers_wait_for_a_gateway_that_is_killed_or_restarted(victim: Platform) -> None:
    with load_on(victim, MODEL) as load:
        for end in (victim.kill, victim.stop):
            load.wait_for(100)
            end("gateway")
            load.wait_for(200)
            victim.wait_ready()
            impatient = load.failures
            load.wait_for(100)
            assert load.failures == impatient, load.report()
    # The front door's patience is longer than a start of the gateway, unless the machine is very busy.
    assert len(impatient) <= CALLERS, load.report()
    assert {answer.status for answer in impatient} <= {503}, load.report()


def test_callers_over_grpc_notice_nothing_of_workers_killed_and_gateways_restarted(victim: Platform) -> None:
    request = service_pb2.ModelInferRequest(model_name=MODEL, raw_input_contents=[ROW.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=ROW.shape)
    with GrpcLoad(victim.port, request, callers=CALLERS, check=wrong_raw, pause_s=0.01) as load:
        for end, part in ((victim.kill, "worker-1"), (victim.stop, "gateway"), (victim.kill, "gateway")):
            load.wait_for(100)
            end(part)
            load.wait_for(200)
            victim.wait_ready()
            wait_for_workers(victim, 2)
            impatient = load.failures
            load.wait_for(100)
            assert load.failures == impatient, load.report()
    assert len(impatient) <= CALLERS, load.report()
    assert {answer.status for answer in impatient} <= {grpc.StatusCode.UNAVAILABLE.value[0]}, load.report()


def test_a_killed_envoy_fails_what_came_to_the_front_door_and_nothing_that_the_gateway_has(victim: Platform) -> None:
    front, inside = load_on(victim, MODEL), load_on(victim, MODEL, port=victim.layout.ports["gateway"])
    with front, inside:
        for _ in range(2):
            front.wait_for(100)
            victim.kill("envoy")
            inside.wait_for(200)
            victim.wait_ready()
            failed = front.failures
            front.wait_for(100)
            assert front.failures == failed, front.report()
    assert {answer.status for answer in failed} <= {0}, front.report()  # no connection, never a wrong answer
    assert not inside.failures, inside.report()


def test_a_killed_supervisor_is_followed_by_one_that_takes_over_every_part(victim: Platform) -> None:
    with load_on(victim, MODEL) as load:
        before = victim.pids()
        victim.kill_supervisor()
        load.wait_for(100)
        up = [str(LEPTON), "up", "--detach", "--home", str(victim.home.folder)]
        subprocess.run(up, env={**os.environ, **SETTINGS}, check=True, capture_output=True, timeout=60)
        assert victim.pids() == before
        victim.kill("worker-2")
        victim.wait_ready()
        wait_for_workers(victim, 2)
        load.wait_for(100)
    assert not load.failures, load.report()
    assert victim.pids().keys() == before.keys()


def test_after_all_this_every_rollout_is_told_once_and_production_is_what_answers(
    victim: Platform, http: httpx.Client
) -> None:
    with victim.client() as client:
        rollouts = http.get("/v1/rollouts", params={"model": MODEL, "limit": 1000}).json()

        def finished() -> list[object]:
            return [entry.id for entry in client.timeline(MODEL) if entry.type == "RolloutFinished"]

        until(lambda: len(finished()) >= len(rollouts), 30)
        assert len(set(finished())) == len(finished()) == len(rollouts)
        assert {each["state"] for each in rollouts} == {"promoted"}
        production = answering_version(http, MODEL)
        until(lambda: str(client.model(MODEL).aliases["production"]) == production)
