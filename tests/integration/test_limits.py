"""A model's limits on the real parts: set by command or client, felt by callers, taken back."""

from concurrent.futures import ThreadPoolExecutor

import httpx
from lepton import Client

from . import onnx_models
from .command import Lepton
from .local_platform import Platform, until
from .oip_requests import error_of, infer

CALLERS = 4


def ask(http: httpx.Client, model: str, rounds: int = 1) -> httpx.Response:
    """The answer of `onnx_models.slow`, which takes some 10 µs a round."""
    inputs = [{"name": "rounds", "shape": [1], "datatype": "INT64", "data": [rounds]}]
    return infer(http, model, {"inputs": inputs})


def test_a_rate_set_by_command_refuses_callers_until_it_is_taken_back(
    platform: Platform, lepton: Lepton, http: httpx.Client, name: str
) -> None:
    platform.serve(name, onnx_models.slow())
    assert "any rate" in lepton("limits", name).out
    limits = lepton("limits", name, "--rate", 0.1, "--json").json["limits"]
    assert limits == {"rate_per_s": 0.1, "burst": None, "max_concurrency": 1024, "timeout_ms": 30_000}

    refused = until(lambda: (answer := ask(http, name)).status_code == 429 and answer)
    assert f"model '{name}' is over its rate of 0.1 requests/s" in error_of(refused, 429)
    assert 1 <= int(refused.headers["retry-after"]) <= 10

    assert "0.1 requests/s at each gateway" in lepton("limits", name, "--timeout", 20_000).out
    lepton("limits", name, "--off")
    until(lambda: ask(http, name).status_code == 200)
    assert {ask(http, name).status_code for _ in range(20)} == {200}


def test_concurrency_and_timeout_hold_until_they_are_unset(
    platform: Platform, client: Client, http: httpx.Client, name: str
) -> None:
    platform.serve(name, onnx_models.slow())
    with ThreadPoolExecutor(CALLERS) as callers:

        def together() -> dict[int, httpx.Response]:
            """An answer of each status that callers get who ask at once."""
            answers = callers.map(lambda _: ask(http, name, rounds=10_000), range(CALLERS))
            return {answer.status_code: answer for answer in answers}

        assert set(together()) == {200}
        client.set_limits(name, max_concurrency=1)
        answers = until(lambda: 429 in (found := together()) and found)
        assert set(answers) == {200, 429}
        assert f"model '{name}' has 1 requests under way, its limit" in error_of(answers[429], 429)
        assert int(answers[429].headers["retry-after"]) >= 1

        client.set_limits(name, timeout_ms=20)
        assert client.serving(name).limits.max_concurrency == 1024
        until(lambda: ask(http, name, rounds=10_000).status_code == 504)

        client.unset_limits(name)
        until(lambda: set(together()) == {200})
        assert set(together()) == {200}
