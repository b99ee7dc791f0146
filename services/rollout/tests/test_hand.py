"""The mesh as an interface: somebody moves the traffic with a VirtualService of their own, and gives the wheel back."""

from collections.abc import AsyncIterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import httpx
import pytest
from lepton_common.events import MeshReturned, MeshTaken
from lepton_common.types import ModelRef
from lepton_rollout.kubernetes import Cluster, Kubernetes
from lepton_rollout.mesh_istio import IstioMesh

from .canaries import QUICK, told, until
from .kubernetes import NAMESPACE, ApiServer
from .lab import Lab
from .stand_ins import infer

HOST = "digits.default.models.lepton"
NAME = "digits.default"
HALVES: dict[str, Any] = {
    "apiVersion": "networking.istio.io/v1",
    "kind": "VirtualService",
    "metadata": {"name": "digits"},
    "spec": {
        "hosts": [HOST],
        "http": [
            {
                "name": "beta",
                "match": [{"headers": {"x-group": {"exact": "beta"}}}],
                "route": [{"destination": {"host": HOST, "subset": "v2"}}],
            },
            {
                "name": "everybody",
                "timeout": "3s",
                "route": [{"destination": {"host": HOST, "subset": "v1"}, "weight": 100}],
            },
        ],
    },
}


@pytest.fixture
async def rollout(lab: Lab, model: ModelRef) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service where version 1 serves and version 2 is warm."""
    await lab.worker("a")
    async with lab.service() as client:
        await lab.register(model, 1, 2, 3)
        await lab.deploy(client, model, 1)
        (await client.post(f"/v1/serving/{model.model}/load", json={"version": 2})).raise_for_status()
        yield client


async def take(rollout: httpx.AsyncClient, document: dict[str, Any]) -> httpx.Response:
    return await rollout.put("/v1/mesh/digits", json={"virtual_service": document, "reason": "a customer waits"})


async def beta(client: httpx.AsyncClient, model: ModelRef) -> str:
    """The version that answers who carries the header."""
    headers = {"Host": model.host, "x-group": "beta"}
    answer = await client.post(f"/v2/models/{model.model}/infer", headers=headers, content=b"{}")
    return str(answer.headers["x-lepton-version"])


async def test_a_virtual_service_moves_the_traffic_until_the_wheel_is_given_back(
    lab: Lab, rollout: httpx.AsyncClient, client: httpx.AsyncClient, model: ModelRef
) -> None:
    taken = await take(rollout, HALVES)
    by_header, anyone = await beta(client, model), (await infer(client, model)).headers["x-lepton-version"]
    served = await lab.serving(model)
    released = await rollout.delete("/v1/mesh/digits")
    after = await beta(client, model)

    assert (taken.status_code, taken.json()["held_by"]) == (200, "ann")
    assert taken.json()["virtual_service"]["spec"]["http"][-1]["timeout"] == "3s"
    assert (by_header, anyone) == ("2", "1")
    assert (served.hand is not None, served.forwarded) == (True, ("x-group",))
    assert (released.json()["held_by"], after) == ("rollout", "1")
    (told_taken,), (told_back,) = told(lab, MeshTaken), told(lab, MeshReturned)
    assert (told_taken.actor, told_taken.reason, told_back.actor) == ("ann", "a customer waits", "ann")


async def test_what_is_shown_can_be_applied_again(rollout: httpx.AsyncClient) -> None:
    shown = (await rollout.get("/v1/mesh/digits")).json()
    again = await take(rollout, shown["virtual_service"])
    assert again.status_code == 200
    assert again.json()["virtual_service"]["spec"] == shown["virtual_service"]["spec"]


def changed(path: list[Any], value: Any) -> dict[str, Any]:
    document = deepcopy(HALVES)
    at: Any = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return document


@pytest.mark.parametrize(
    ("document", "named"),
    [
        (changed(["spec", "http", 1, "route", 0, "weight"], 90), "weight"),
        (changed(["spec", "http", 1, "route", 0, "destination", "subset"], "v9"), "v9"),
        (changed(["spec", "http", 1, "route", 0, "destination", "subset"], "v3"), "v3"),
        (changed(["spec", "http", 1, "weihgt"], 1), "weihgt"),
        (changed(["spec", "hosts"], ["other.default.models.lepton"]), "hosts"),
        (changed(["spec", "http", 1, "fault"], {"abort": {"httpStatus": 500}}), "fault"),
        (changed(["kind"], "Gateway"), "kind"),
    ],
    ids=["weights", "unknown version", "version not loaded", "unknown field", "foreign host", "fault", "kind"],
)
async def test_a_wrong_virtual_service_is_refused_with_the_reason_and_changes_nothing(
    lab: Lab, rollout: httpx.AsyncClient, model: ModelRef, document: dict[str, Any], named: str
) -> None:
    before = await lab.serving(model)
    answer = await take(rollout, document)
    assert answer.status_code == 400
    assert named in answer.json()["detail"]
    assert await lab.serving(model) == before
    assert told(lab, MeshTaken) == []


async def test_by_hand_the_judge_only_advises_and_the_walk_goes_on_where_it_was(
    lab: Lab, rollout: httpx.AsyncClient, client: httpx.AsyncClient, model: ModelRef
) -> None:
    async with lab.measured(model) as seconds:
        body = {"model": model.model, "version": 2, "policy": {**QUICK, "dwell_s": 30}}
        started = (await rollout.post("/v1/rollouts", json=body)).json()
        await until(rollout, started, lambda now: now["percent"] == 10)
        await take(rollout, HALVES)
        seconds.error_ratio = {2: 0.9}
        await seconds.more(60)
        by_hand = (await rollout.get(f"/v1/rollouts/{started['id']}")).json()
        refused = await rollout.post("/v1/rollouts", json={"model": model.model, "version": 3})
        promoted = await rollout.post(f"/v1/rollouts/{started['id']}/promote", json={"reason": "it is fine"})
        seconds.error_ratio = {}
        await rollout.delete("/v1/mesh/digits")
        done = await lab.ended(rollout, started)
    decisions = (await rollout.get(f"/v1/rollouts/{started['id']}/decisions")).json()

    assert (by_hand["state"], by_hand["by_hand"]) == ("shifting", True)
    assert "by hand" in by_hand["waiting_for"]
    for each in (refused, promoted):
        assert (each.status_code, "moved by hand (ann)" in each.json()["detail"]) == (409, True)
    assert done["state"] == "promoted"
    assert {"taken", "returned"} <= {each["action"] for each in decisions}


async def test_an_abort_takes_the_wheel_back_as_well(
    lab: Lab, rollout: httpx.AsyncClient, client: httpx.AsyncClient, model: ModelRef
) -> None:
    async with lab.measured(model):
        body = {"model": model.model, "version": 2, "policy": {**QUICK, "dwell_s": 1000}}
        started = (await rollout.post("/v1/rollouts", json=body)).json()
        await until(rollout, started, lambda now: now["percent"] == 10)
        await take(rollout, HALVES)
        await rollout.post(f"/v1/rollouts/{started['id']}/abort", json={"reason": "enough"})
        await lab.ended(rollout, started)
    served = await lab.serving(model)
    assert (served.hand, [(share.version, share.percent) for share in served.split]) == (None, [(1, 100)])


async def test_an_edit_in_kubernetes_counts_as_taking_over_and_a_wrong_one_is_undone(
    lab: Lab, model: ModelRef, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    await lab.worker("a")
    async with ApiServer() as kubernetes:
        token.write_text(kubernetes.token)
        mesh = IstioMesh(Kubernetes(Cluster(kubernetes.url, NAMESPACE, token)))
        async with lab.service(mesh) as rollout:
            await lab.register(model, 1, 2)
            await lab.deploy(rollout, model, 1)
            (await rollout.post(f"/v1/serving/{model.model}/load", json={"version": 2})).raise_for_status()
            ours = kubernetes.document("VirtualService", NAME)["spec"]["http"]
            kubernetes.edit("VirtualService", NAME, "kubectl-edit", http=HALVES["spec"]["http"])
            while (taken := await lab.serving(model)).hand is None:
                pass
            held_by = (await rollout.get("/v1/mesh/digits")).json()["held_by"]
            await rollout.delete("/v1/mesh/digits")
            kubernetes.edit("VirtualService", NAME, "kubectl-edit", http=[{"fault": {"abort": {"httpStatus": 500}}}])
            while kubernetes.document("VirtualService", NAME)["spec"]["http"] != ours:
                await rollout.get("/health/live")
            after = await lab.serving(model)

    assert taken.hand is not None
    assert (taken.hand.by, held_by, after.hand) == ("kubectl-edit", "kubectl-edit", None)
    assert [event.actor for event in told(lab, MeshTaken)] == ["kubectl-edit"]


async def test_the_wheel_cannot_be_given_back_by_who_does_not_have_it(rollout: httpx.AsyncClient) -> None:
    assert (await rollout.delete("/v1/mesh/digits")).status_code == 409
    assert (await rollout.get("/v1/mesh/nosuch")).status_code == 404


async def test_a_version_that_is_routed_to_by_hand_is_not_unloaded(rollout: httpx.AsyncClient) -> None:
    await take(rollout, HALVES)
    assert (await rollout.post("/v1/serving/digits/unload", json={"version": 2})).status_code == 409
