"""A model's limits, from the API to etcd and into the mesh."""

from typing import Any

import httpx
import pytest
from lepton_common.records import Limits
from lepton_common.types import ModelRef

from .lab import Lab
from .stand_ins import infer

DEFAULTS = {"rate_per_s": None, "burst": None, "max_concurrency": 1024, "timeout_ms": 30_000}


async def test_limits_are_on_record_as_a_whole_and_go_back_to_the_defaults(
    lab: Lab, rollout: httpx.AsyncClient, model: ModelRef
) -> None:
    path = f"/v1/serving/{model.model}/limits"
    asked = {"rate_per_s": 2.5, "burst": 5, "max_concurrency": None}
    limited = (await rollout.put(path, json=asked)).json()
    assert limited["limits"] == {**DEFAULTS, "rate_per_s": 2.5, "burst": 5}
    assert (await lab.serving(model)).limits == Limits(rate_per_s=2.5, burst=5)
    other = (await rollout.put(path, json={"max_concurrency": 8})).json()
    assert other["limits"] == {**DEFAULTS, "max_concurrency": 8}
    assert (await rollout.delete(path)).json()["limits"] == DEFAULTS
    assert (await rollout.get(f"/v1/serving/{model.model}")).json()["limits"] == DEFAULTS
    assert (await lab.serving(model)).limits == Limits()


async def test_the_mesh_waits_as_long_as_the_limit_says_once_it_is_set(
    lab: Lab, client: httpx.AsyncClient, model: ModelRef
) -> None:
    worker = await lab.worker("a")
    async with lab.service() as rollout:
        await lab.register(model, 1)
        await lab.deploy(rollout, model, 1)
        worker.stand_in.is_stuck = True
        limited = await rollout.put(f"/v1/serving/{model.model}/limits", json={"timeout_ms": 50})
        late = await infer(client, model)

    assert (limited.status_code, late.status_code) == (200, 504)


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({"burst": 5}, "rate_per_s"),
        ({"rate_per_s": 0}, "body.rate_per_s"),
        ({"rate_per_s": 1, "burst": 0}, "body.burst"),
        ({"max_concurrency": 0}, "body.max_concurrency"),
        ({"timeout_ms": 3_600_001}, "body.timeout_ms"),
        ({"per_day": 5}, "body.per_day"),
    ],
)
async def test_wrong_limits_are_refused_by_name_and_change_nothing(
    lab: Lab, rollout: httpx.AsyncClient, model: ModelRef, wanted: dict[str, Any], named: str
) -> None:
    answer = await rollout.put(f"/v1/serving/{model.model}/limits", json=wanted)
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/problem+json")
    assert named in answer.text
    assert (await lab.serving(model)).limits == Limits()


@pytest.mark.parametrize("verb", ["PUT", "DELETE"])
async def test_a_model_that_is_not_served_has_no_limits(lab: Lab, verb: str) -> None:
    async with lab.service() as rollout:
        answer = await rollout.request(verb, "/v1/serving/nothing/limits", json={})
    assert answer.status_code == 404
