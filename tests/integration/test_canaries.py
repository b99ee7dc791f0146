"""Bad versions on live traffic, on the real parts: how fast each is taken back, and what callers saw meanwhile."""

import contextlib
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import onnx
import pytest
from lepton import Client
from lepton.errors import RolloutFailed
from lepton.policies import Policy
from lepton.rollouts import Rollout, RolloutState

from . import onnx_models
from .faults import away
from .load import Answer, Load
from .local_platform import Platform, running_platform, until

# The time that a bad version may have: from its first bad answer to its last answer of any kind.
WITHIN_S = 10.0
# What the stable is used to is measured before a canary begins.
USUAL_ANSWERS = 1500
BODY = json.dumps(
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1.0, 2.0, 3.0, 4.0]}]}
).encode()
# Ten percent, for as long as it takes to be found out.
TENTH = {"steps": [10.0, 50.0], "dwell_s": 120, "on_newer": "supersede", "cool_down_s": 0}


@dataclass(frozen=True, slots=True)
class Case:
    """A version that is bad in one way. Callers give up after `timeout_ms`."""

    name: str
    model: onnx.ModelProto
    pool: str | None = None
    timeout_ms: int = 5000
    kill: str = ""
    slow: bool = False
    """Each of its answers is a bad one."""


@pytest.fixture(scope="module")
def canary_platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Two workers for everybody, and one for canaries that may kill theirs."""
    with running_platform(tmp_path_factory.mktemp("canaries"), pools={"canary": 1}) as platform:
        yield platform


def traffic(platform: Platform, name: str, timeout_ms: int) -> Load:
    headers = {"x-request-timeout-ms": str(timeout_ms)}
    return Load(platform.port, f"/v2/models/{name}/infer", BODY, headers=headers, callers=6, pause_s=0.02)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "case",
    [
        # Its workers are its own: at the stable's it would rightly keep the stable's callers waiting, too.
        Case("answers-504", onnx_models.laborious(60_000), pool="canary", timeout_ms=300),
        Case("answers-503", onnx_models.crashing_at_four(), pool="canary"),
        Case("refuses", onnx_models.failing_at_four()),
        Case("slower", onnx_models.laborious(1_000), slow=True),
        Case("worker-dies", onnx_models.mlp(2), pool="canary", kill="worker-canary-1"),
    ],
    ids=lambda case: case.name,
)
def test_a_bad_version_is_taken_back_within_seconds_and_the_stable_never_fails(
    canary_platform: Platform, case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    platform = canary_platform
    with platform.client() as client:
        client.push(onnx_models.mlp(1), name=case.name)
        bad = client.push(case.model, name=case.name, deploy=False).version
        with traffic(platform, case.name, case.timeout_ms) as load:
            load.wait_for(USUAL_ANSWERS, within_s=120)
            policy = Policy.model_validate({**TENTH, "pool": case.pool})
            rollout = client.start_rollout(case.name, bad, policy=policy)
            with contextlib.ExitStack() as stack:
                if case.kill:
                    load.wait_for_version(bad, 20, within_s=60)
                    # It stays away: one that is back within two seconds does no harm that counts.
                    stack.enter_context(away(platform, case.kill))
                done = ended(client, rollout)
                load.wait_for(300, within_s=60)

    of_bad = [answer for answer in load.answers if answer.version == str(bad)]
    of_stable = [answer for answer in load.answers if answer.version != str(bad)]
    first_bad_s = first_bad(of_bad, case)
    last_s = max(answer.begun_s for answer in of_bad)
    seen = [answer for answer in of_bad if is_bad(answer, case)]
    rate = len(load.answers) / (load.answers[-1].begun_s - load.answers[0].begun_s)
    with capsys.disabled():
        print(
            f"\n{case.name}: back after {last_s - first_bad_s:.1f} s, {len(seen)} bad answers of {len(of_bad)} by the"
            f" canary, {len(of_stable)} by the stable without a failure, {rate:.0f} requests/s;"
            f" p50 {median_ms(of_bad):.1f} ms against {median_ms(of_stable):.1f} ms;"
            f" {done.reason}"
        )
    assert done.state is RolloutState.ROLLED_BACK
    assert seen
    assert last_s - first_bad_s <= WITHIN_S
    assert not [answer for answer in of_stable if answer.failed], load.report()


def is_bad(answer: Answer, case: Case) -> bool:
    return answer.failed or case.slow


def median_ms(answers: list[Answer]) -> float:
    return statistics.median(answer.latency_s for answer in answers) * 1e3


def first_bad(answers: list[Answer], case: Case) -> float:
    """When the first bad answer was given."""
    return min(answer.begun_s + answer.latency_s for answer in answers if is_bad(answer, case))


def ended(client: Client, rollout: Rollout) -> Rollout:
    with pytest.raises(RolloutFailed):
        client.wait(rollout, timeout=120)
    return client.rollout(rollout.id)


def test_a_version_that_cannot_load_never_gets_traffic(canary_platform: Platform) -> None:
    name = "cannot-load"
    with canary_platform.client() as client:
        client.push(onnx_models.mlp(1), name=name)
        bad = client.push(onnx_models.refused_at_load(), name=name, deploy=False).version
        with traffic(canary_platform, name, 5000) as load:
            load.wait_for(100)
            done = ended(client, client.start_rollout(name, bad, policy=Policy.model_validate(TENTH)))
            load.wait_for(100)

    assert done.state is RolloutState.FAILED
    assert "Pow" in done.reason
    assert set(load.versions) == {"1"}
    assert not load.failures, load.report()


@pytest.mark.timeout(300)
def test_a_good_version_is_walked_to_all_traffic_without_a_failure(canary_platform: Platform) -> None:
    name = "good"
    policy = Policy.model_validate(
        {
            "steps": [10.0, 50.0],
            "dwell_s": 3,
            "bake_s": 2,
            "judge": {
                "errors": {"margin": 3, "acceptable": 0.03},
                "slow": {"margin": 3, "acceptable": 0.3},
                "slack": 1,
            },
        }
    )
    with canary_platform.client() as client:
        client.push(onnx_models.mlp(1), name=name)
        better = client.push(onnx_models.mlp(2), name=name, deploy=False).version
        with traffic(canary_platform, name, 5000) as load:
            load.wait_for(500, within_s=60)
            done = client.wait(client.start_rollout(name, better, policy=policy), timeout=200)
            load.wait_for_version(better, 100)
        told = [entry.type for entry in until(lambda: finished_timeline(client, name), 30)]

    assert done.state is RolloutState.PROMOTED
    assert not load.failures, load.report()
    assert told.count("TrafficShifted") >= 3


def finished_timeline(client: Client, name: str) -> list[object]:
    entries = client.timeline(name)
    ends = [entry for entry in entries if entry.type == "RolloutFinished" and entry.version == 2]
    return list(entries) if ends else []
