"""What the fault tests share: a model whose every answer can be checked, load on it, and parts that stay away."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import psutil
from lepton.processes import freeze, http_get

from . import onnx_models
from .load import Load
from .local_platform import Platform, until

# Version n of a checked model is `mlp(seed=n)`.
ROW = np.array([[1.0, -2.0, 3.0, -4.0]], np.float32)
REQUEST = json.dumps(
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": ROW.shape, "data": ROW.ravel().tolist()}]}
).encode()
SETTINGS = {"LEPTON_LOAD_TIMEOUT_S": "15"}
CALLERS = 4


def push_versions(platform: Platform, model: str, *versions: int) -> None:
    """These versions of the model are known, 1 first; version 1 takes all traffic."""
    with platform.client() as client:
        for version in versions:
            pushed = client.push(onnx_models.mlp(version), name=model, deploy=version == 1, timeout=60)
            assert pushed.version == version


def wrong(body: bytes, version: str) -> str:
    """What is wrong with an answer of that version of a checked model; nothing when it is empty."""
    scores = json.loads(body)["outputs"][0]["data"]
    expected = onnx_models.mlp_scores(ROW, int(version)).ravel()
    return "" if np.allclose(scores, expected, rtol=1e-4, atol=1e-4) else f"version {version} answered {scores}"


def wrong_raw(body: bytes, version: str) -> str:
    """As `wrong`, of an answer's raw tensor."""
    scores = np.frombuffer(body, np.float32)
    expected = onnx_models.mlp_scores(ROW, int(version)).ravel()
    return "" if np.allclose(scores, expected, rtol=1e-4, atol=1e-4) else f"version {version} answered {scores}"


def load_on(platform: Platform, model: str, *, port: int | None = None, timeout_ms: int | None = None) -> Load:
    """Load on a checked model, through the front door unless `port` is another one. Every answer is checked. Callers
    breathe between two requests: as fast as they can, they would take the cores from what is tested."""
    headers = {"authorization": f"Bearer {platform.key}"}
    if timeout_ms is not None:
        headers["x-request-timeout-ms"] = str(timeout_ms)
    path = f"/v2/models/{model}/infer"
    port = port or platform.port
    return Load(port, path, REQUEST, headers=headers, callers=CALLERS, check=wrong, at_most_s=220, pause_s=0.01)


def answering_version(http: httpx.Client, model: str) -> str:
    """The version that answers a checked model's callers now, rightly."""
    answer = http.post(f"/v2/models/{model}/infer", content=REQUEST)
    assert answer.status_code == 200, answer.text
    version = answer.headers["x-lepton-version"]
    assert not wrong(answer.content, version)
    return version


# --- rollouts ---------------------------------------------------------------------------------------------------------


def start_rollout(http: httpx.Client, model: str, version: int) -> dict[str, Any]:
    """The rollout, acknowledged."""
    answer = http.post("/v1/rollouts", json={"model": model, "version": version, "policy": "immediate"})
    assert answer.status_code == 202, answer.text
    rollout: dict[str, Any] = answer.json()
    return rollout


def ended(http: httpx.Client, rollout: dict[str, Any], within_s: float = 40.0) -> dict[str, Any]:
    """The rollout at its end. Until then the service that knows of it may be away."""

    def finished() -> dict[str, Any] | None:
        answer = http.get(f"/v1/rollouts/{rollout['id']}")
        assert answer.status_code in (200, 503), answer.text
        found: dict[str, Any] | None = answer.json() if answer.status_code == 200 else None
        return found if found and found["finished_at"] else None

    found: dict[str, Any] = until(finished, within_s)
    return found


def swap(http: httpx.Client, model: str) -> int:
    """The other one of versions 1 and 2 takes all traffic; returns which."""
    version = 3 - int(answering_version(http, model))
    rollout = ended(http, start_rollout(http, model, version))
    assert rollout["state"] == "promoted", rollout
    return version


# --- parts ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def away(platform: Platform, part: str) -> Iterator[None]:
    """The part is dead during the block: killed while the supervisor is held up. Then the platform is ready again."""
    process = platform.process(part)
    supervisor = psutil.Process(platform.home.supervisor_pid())
    assert freeze(supervisor)
    try:
        for each in [process, *process.children(recursive=True)]:
            each.kill()
        yield
    finally:
        supervisor.resume()
    platform.wait_ready()


def healthy_workers(platform: Platform) -> int:
    """How many workers of the pool `cpu` the mesh sends requests to."""
    stat = "cluster.pool-cpu.membership_healthy"
    _, text = http_get(platform.layout.ports["envoy-admin"], f"/stats?filter=^{stat}$")
    return int(text.decode().partition(": ")[2] or 0)


def wait_for_workers(platform: Platform, count: int) -> None:
    """The mesh sends requests to just so many workers."""
    until(lambda: healthy_workers(platform) == count, 30)


def is_taken_out(platform: Platform, worker: str) -> bool:
    """Whether the mesh's own checks hold this worker for ill, for callers and for copies, which are checked each at its
    time. Who is out for failed requests only is let in again after two seconds."""
    _, text = http_get(platform.layout.ports["envoy-admin"], "/clusters")
    flags = f"::127.0.0.1:{platform.layout.ports[worker]}::health_flags::"
    found = [line for line in text.decode().splitlines() if flags in line]
    return bool(found) and all("/failed_active_hc" in line for line in found)


def problem(answer: httpx.Response) -> str:
    """What a problem says that asks to try again later."""
    assert answer.status_code == 503, f"{answer.status_code} {answer.text}"
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["retry-after"]) >= 1
    detail: str = answer.json()["detail"]
    return detail
