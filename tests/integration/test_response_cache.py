"""The response cache on the real parts: turned on by command, seen by callers and in Triton's statistics."""

import httpx
import numpy as np
import tritonclient.grpc as triton_grpc
from lepton import Client
from tritonclient.http import InferenceServerClient

from . import onnx_models
from .command import Lepton
from .local_platform import Platform, until
from .oip_requests import GOOD, ROW


def test_a_cache_is_turned_on_answers_and_is_empty_after_a_promotion(
    platform: Platform, client: Client, lepton: Lepton, http: httpx.Client, triton: InferenceServerClient, name: str
) -> None:
    platform.serve(name, onnx_models.mlp())

    def ask() -> tuple[str, str, bytes]:
        answer = http.post(f"/v2/models/{name}/infer", json=GOOD)
        return answer.headers["x-lepton-version"], answer.headers.get("x-lepton-cache", "off"), answer.content

    _, how, content = ask()
    assert how == "off"
    turned_on = lepton("cache", name, "--ttl", 600, "--json")
    assert turned_on.json["cache"] == {"ttl_s": 600, "max_bytes": 64 << 20}
    assert until(lambda: (told := ask())[1] != "off" and told) == ("1", "miss", content)
    assert ask() == ("1", "hit", content)

    stats = triton.get_inference_statistics(name)["model_stats"][0]["inference_stats"]
    assert (stats["cache_hit"]["count"], stats["cache_miss"]["count"]) == (1, 1)

    # gRPC's tensors are another request, of other bytes, and kept like any.
    with triton_grpc.InferenceServerClient(platform.address) as grpc:
        tensor = triton_grpc.InferInput("x", [1, 4], "FP32").set_data_from_numpy(np.array([ROW], np.float32))
        np.testing.assert_array_equal(*(grpc.infer(name, [tensor]).as_numpy("scores") for _ in range(2)))

    client.push(onnx_models.mlp(seed=2), name=name, deploy=False)
    lepton("deploy", name, 2)
    until(lambda: ask()[0] == "2")
    version, how, changed = ask()
    assert (version, how) == ("2", "hit")
    assert changed != content
    lepton("cache", name, "--off")
    until(lambda: ask()[1] == "off")
