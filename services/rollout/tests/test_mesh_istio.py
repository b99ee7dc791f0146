import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from lepton_common.errors import Conflict, Invalid, NotFound, Unavailable
from lepton_common.testing import until
from lepton_common.types import ModelRef
from lepton_rollout.istio import checked, documents
from lepton_rollout.kubernetes import Cluster, Kubernetes
from lepton_rollout.mesh import Edit, Stale, VirtualService, virtual_service
from lepton_rollout.mesh_istio import IstioMesh

from .kubernetes import NAMESPACE, ApiServer
from .stand_ins import serving

MODEL = ModelRef("acme", "digits")
OTHER = ModelRef("acme", "letters")
NAME = "digits.acme"


@pytest.fixture
async def api() -> AsyncIterator[ApiServer]:
    async with ApiServer() as api:
        yield api


@pytest.fixture
def cluster(api: ApiServer, tmp_path: Path) -> Cluster:
    token = tmp_path / "token"
    token.write_text(f"{api.token}\n")
    return Cluster(api.url, NAMESPACE, token)


@pytest.fixture
async def mesh(cluster: Cluster) -> AsyncIterator[IstioMesh]:
    mesh = IstioMesh(Kubernetes(cluster))
    yield mesh
    await mesh.close()


async def test_both_objects_are_in_kubernetes_as_they_are_printed(api: ApiServer, mesh: IstioMesh) -> None:
    service = virtual_service(serving(MODEL, 3, {1: 90, 2: 10}))

    await mesh.apply(service)

    routes, rule = documents(service)
    for kind, document in (("VirtualService", routes), ("DestinationRule", rule)):
        stored = api.document(kind, NAME)
        assert stored["spec"] == document["spec"]
        assert stored["metadata"]["labels"] == document["metadata"]["labels"]
        assert stored["metadata"]["annotations"]["lepton.ai/generation"] == "3"
        assert [each["manager"] for each in stored["metadata"]["managedFields"]] == ["lepton-rollout"]


async def test_the_same_routes_again_write_nothing(api: ApiServer, mesh: IstioMesh) -> None:
    service = virtual_service(serving(MODEL, 3, {1: 87.65, 2: 12.35}))
    await mesh.apply(service)
    written = len(api.writes)

    await mesh.apply(service)

    assert len(api.writes) == written


async def test_fields_that_others_set_are_kept(api: ApiServer, mesh: IstioMesh) -> None:
    await mesh.apply(virtual_service(serving(MODEL, 1, {1: 100})))
    foreign: dict[str, Any] = {
        "apiVersion": "networking.istio.io/v1",
        "kind": "VirtualService",
        "metadata": {"name": NAME, "labels": {"team": "vision"}, "annotations": {"note": "ours"}},
        "spec": {"gateways": ["mesh", "istio-system/public"], "exportTo": ["."]},
    }
    api.apply(foreign, "argocd")

    await mesh.apply(virtual_service(serving(MODEL, 2, {1: 50, 2: 50})))

    stored = api.document("VirtualService", NAME)
    assert stored["spec"]["gateways"] == ["mesh", "istio-system/public"]
    assert stored["spec"]["exportTo"] == ["."]
    assert stored["metadata"]["labels"]["team"] == "vision"
    assert stored["metadata"]["annotations"]["note"] == "ours"
    assert len(stored["spec"]["http"][-1]["route"]) == 2


async def test_a_field_that_somebody_else_set_is_a_conflict_that_names_them(api: ApiServer, mesh: IstioMesh) -> None:
    await mesh.apply(virtual_service(serving(MODEL, 1, {1: 100}, 2)), virtual_service(serving(OTHER, 1, {1: 100})))
    edited = api.edit("VirtualService", NAME, "kubectl-edit", http=_http({1: 60, 2: 40}))

    with pytest.raises(Conflict, match=r'spec\.http \(conflict with "kubectl-edit"'):
        await mesh.apply(
            virtual_service(serving(MODEL, 2, {1: 50, 2: 50})), virtual_service(serving(OTHER, 2, {1: 50, 2: 50}))
        )

    assert api.document("VirtualService", NAME)["spec"] == edited["spec"]
    assert len(api.document("VirtualService", "letters.acme")["spec"]["http"][-1]["route"]) == 2


async def test_an_older_generation_does_not_replace_a_newer_one(api: ApiServer, mesh: IstioMesh) -> None:
    await mesh.apply(virtual_service(serving(MODEL, 5, {1: 100}, 2)))

    with pytest.raises(Stale) as stale:
        await mesh.apply(virtual_service(serving(MODEL, 4, {2: 100}, 1)), virtual_service(serving(OTHER, 1, {1: 100})))

    assert stale.value.newer == {"acme/digits": 5}
    assert api.document("VirtualService", NAME)["metadata"]["annotations"]["lepton.ai/generation"] == "5"
    assert api.document("VirtualService", "letters.acme")["spec"]["hosts"] == ["letters.acme.models.lepton"]


async def test_writers_at_the_same_time_end_with_the_newest_generation(api: ApiServer, cluster: Cluster) -> None:
    meshes = [IstioMesh(Kubernetes(cluster)) for _ in range(4)]
    await meshes[0].apply(virtual_service(serving(MODEL, 1, {1: 100}, 2)))

    outcomes = await asyncio.gather(
        *(
            mesh.apply(virtual_service(serving(MODEL, 2 + number, {1: 90 - number, 2: 10 + number})))
            for number, mesh in enumerate(meshes)
        ),
        return_exceptions=True,
    )

    assert all(outcome is None or isinstance(outcome, Stale | Unavailable) for outcome in outcomes)
    applied = [2 + number for number, outcome in enumerate(outcomes) if outcome is None]
    stored = api.document("VirtualService", NAME)
    assert stored["metadata"]["annotations"]["lepton.ai/generation"] == str(max(applied))
    assert stored["spec"]["http"][-1]["route"][1]["weight"] == (8 + max(applied)) * 100
    for mesh in meshes:
        await mesh.close()


async def test_a_version_that_is_left_keeps_its_subset_until_the_routes_have_left_it(
    api: ApiServer, mesh: IstioMesh
) -> None:
    await mesh.apply(virtual_service(serving(MODEL, 1, {1: 100})))
    after = virtual_service(serving(MODEL, 2, {2: 100}))

    await mesh.apply(after)
    assert _subsets(api) == ["v2", "v1"]
    await mesh.apply(after)
    assert _subsets(api) == ["v2"]


async def test_an_object_that_was_deleted_is_made_again(api: ApiServer, mesh: IstioMesh) -> None:
    service = virtual_service(serving(MODEL, 1, {1: 100}))
    await mesh.apply(service)
    api.delete("VirtualService", NAME)

    await mesh.apply(service)

    assert api.document("VirtualService", NAME)["spec"] == documents(service)[0]["spec"]


async def test_the_live_objects_are_those_in_kubernetes(api: ApiServer, mesh: IstioMesh) -> None:
    record = serving(MODEL, 1, {1: 100}, 2)
    with pytest.raises(NotFound, match="no routes of model 'digits'"):
        await mesh.live(record)
    await mesh.apply(virtual_service(record))
    edited = api.edit("VirtualService", NAME, "kubectl-edit", http=_http({1: 60, 2: 40}))

    routes, rule = await mesh.live(record)

    assert routes["spec"] == edited["spec"]
    assert rule["spec"]["host"] == MODEL.host
    assert "managedFields" not in routes["metadata"]


async def test_somebody_elses_edit_is_told_with_who_it_was_and_our_own_are_not(api: ApiServer, mesh: IstioMesh) -> None:
    await mesh.apply(virtual_service(serving(MODEL, 1, {1: 100}, 2)))
    edits = mesh.edits()
    waiting = asyncio.create_task(_one(edits))
    await _watched(api)
    await mesh.apply(virtual_service(serving(MODEL, 2, {1: 50, 2: 50})))
    api.apply(_foreign(gateways=["mesh"]), "argocd")  # Not what Lepton routes by.
    api.edit("VirtualService", NAME, "kubectl-edit", http=_http({1: 60, 2: 40}))

    edit = await waiting

    assert (edit.model, edit.by) == (MODEL, "kubectl-edit")
    assert edit.document["spec"] == {"hosts": [MODEL.host], "http": _http({1: 60, 2: 40})}
    assert "managedFields" not in edit.document["metadata"]
    await edits.aclose()  # type: ignore[attr-defined]  # a generator


async def test_an_edit_is_taken_over_and_the_wheel_given_back_without_a_conflict(
    api: ApiServer, mesh: IstioMesh
) -> None:
    record = serving(MODEL, 1, {1: 100}, 2)
    await mesh.apply(virtual_service(record))
    ours = api.document("VirtualService", NAME)["spec"]["http"]
    # As with kubectl edit: what Lepton wrote is there as well, and only the split differs.
    api.edit("VirtualService", NAME, "kubectl-edit", http=[*ours[:-1], *_http({1: 60, 2: 40})])
    edit = await _next(mesh)

    spec = checked(edit.document, record, (1, 2))
    await mesh.note(edit)
    await mesh.apply(_by_hand(2, spec))
    taken = api.document("VirtualService", NAME)["spec"]["http"]
    await mesh.apply(virtual_service(serving(MODEL, 3, {1: 100}, 2)))

    assert [route.get("name") for route in taken] == ["version-1", "version-2", "unknown-version", "split"]
    assert [each["weight"] for each in taken[-1]["route"]] == [6_000, 4_000]
    assert api.document("VirtualService", NAME)["spec"]["http"] == ours


async def test_an_edit_that_says_what_lepton_says_can_be_overwritten_once_it_is_noted(
    api: ApiServer, mesh: IstioMesh
) -> None:
    service = virtual_service(serving(MODEL, 1, {1: 100}, 2))
    await mesh.apply(service)
    ours = api.document("VirtualService", NAME)["spec"]["http"]
    split = {**ours[-1], "route": [{**ours[-1]["route"][0], "weight": 100}]}
    api.edit("VirtualService", NAME, "kubectl-edit", http=[*ours[:-1], split])
    await mesh.note(await _next(mesh))

    await mesh.apply(virtual_service(serving(MODEL, 2, {1: 100}, 2)))
    await mesh.apply(virtual_service(serving(MODEL, 3, {2: 100}, 1)))

    assert api.document("VirtualService", NAME)["spec"]["http"][-1]["route"][0]["destination"]["subset"] == "v2"


async def test_an_edit_that_is_not_noted_is_told_again_after_a_restart_and_then_no_more(
    api: ApiServer, mesh: IstioMesh, cluster: Cluster
) -> None:
    await mesh.apply(virtual_service(serving(MODEL, 1, {1: 100}, 2)))
    api.edit("VirtualService", NAME, "kubectl-edit", http=_http({1: 60, 2: 40}))
    first = await _next(mesh)
    restarted = IstioMesh(Kubernetes(cluster))

    again = await _next(restarted)
    await restarted.note(again)
    api.edit("VirtualService", NAME, "kubectl-edit", http=_http({1: 61, 2: 39}))
    third = await _next(restarted)

    assert first == again
    assert third.document["spec"]["http"] == _http({1: 61, 2: 39})
    await restarted.close()


async def test_an_edit_that_was_edited_again_cannot_be_noted(api: ApiServer, mesh: IstioMesh) -> None:
    await mesh.apply(virtual_service(serving(MODEL, 1, {1: 100}, 2)))
    api.edit("VirtualService", NAME, "kubectl-edit", http=_http({1: 60, 2: 40}))
    edit = await _next(mesh)
    api.edit("VirtualService", NAME, "kubectl-patch", http=_http({1: 61, 2: 39}))

    with pytest.raises(Conflict, match="changed in Kubernetes once more"):
        await mesh.note(edit)
    with pytest.raises(Conflict, match="kubectl-patch"):
        await mesh.apply(virtual_service(serving(MODEL, 2, {2: 100}, 1)))


async def test_an_edit_around_the_routes_does_not_keep_one_of_them_from_being_noted(
    api: ApiServer, mesh: IstioMesh
) -> None:
    await mesh.apply(virtual_service(serving(MODEL, 1, {1: 100}, 2)))
    api.edit("VirtualService", NAME, "kubectl-edit", http=_http({1: 60, 2: 40}))
    edit = await _next(mesh)
    api.apply(_foreign(gateways=["mesh"]), "argocd")

    await mesh.note(edit)
    await mesh.apply(virtual_service(serving(MODEL, 2, {2: 100}, 1)))

    assert api.document("VirtualService", NAME)["spec"]["gateways"] == ["mesh"]


@pytest.mark.parametrize("trouble", ["the watch is cut", "the past is forgotten", "both"])
async def test_no_edit_is_missed_whatever_becomes_of_the_watch(api: ApiServer, mesh: IstioMesh, trouble: str) -> None:
    await mesh.apply(virtual_service(serving(MODEL, 1, {1: 100}, 2)))
    edits = mesh.edits()
    waiting = asyncio.create_task(_one(edits))
    for weight in range(60, 66):
        await _watched(api)
        if trouble != "the past is forgotten":
            api.cut()
        api.edit("VirtualService", NAME, "kubectl-edit", http=_http({1: weight, 2: 100 - weight}))
        if trouble != "the watch is cut":
            api.forget()

        edit = await waiting

        assert edit.document["spec"]["http"] == _http({1: weight, 2: 100 - weight})
        waiting = asyncio.create_task(_one(edits))
    waiting.cancel()


async def test_the_token_is_read_anew_each_time(api: ApiServer, mesh: IstioMesh, cluster: Cluster) -> None:
    assert cluster.token is not None
    await mesh.apply(virtual_service(serving(MODEL, 1, {1: 100})))
    api.token = "second-token"

    with pytest.raises(Unavailable, match="401"):
        await mesh.apply(virtual_service(serving(MODEL, 2, {1: 100}, 2)))
    cluster.token.write_text("second-token")
    await mesh.apply(virtual_service(serving(MODEL, 2, {1: 100}, 2)))


async def test_a_server_that_is_away_is_unavailable(cluster: Cluster) -> None:
    mesh = IstioMesh(Kubernetes(Cluster("http://127.0.0.1:9", NAMESPACE, cluster.token)))
    record = serving(MODEL, 1, {1: 100})

    with pytest.raises(Unavailable):
        await mesh.apply(virtual_service(record))
    with pytest.raises(Unavailable):
        await mesh.live(record)
    with pytest.raises(Unavailable):
        await _next(mesh)
    await mesh.close()


async def test_an_object_that_the_server_refuses_is_invalid(api: ApiServer, mesh: IstioMesh) -> None:
    api.refuses = 'admission webhook "validation.istio.io" denied the request'

    with pytest.raises(Invalid, match=r"validation\.istio\.io"):
        await mesh.apply(virtual_service(serving(MODEL, 1, {1: 100})))


async def _watched(api: ApiServer) -> None:
    await until(lambda: api.watches > 0)


async def _one(edits: AsyncIterator[Edit]) -> Edit:
    return await anext(edits)


async def _next(mesh: IstioMesh) -> Edit:
    edits = mesh.edits()
    try:
        return await anext(edits)
    finally:
        await edits.aclose()  # type: ignore[attr-defined]  # a generator


def _http(weights: dict[int, int]) -> list[dict[str, Any]]:
    """The routes of somebody who knows nothing of Lepton's."""
    return [
        {
            "route": [
                {"destination": {"host": MODEL.host, "subset": f"v{version}"}, "weight": weight}
                for version, weight in weights.items()
            ]
        }
    ]


def _foreign(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "VirtualService",
        "metadata": {"name": NAME},
        "spec": spec,
    }


def _by_hand(generation: int, spec: dict[str, Any]) -> VirtualService:
    record = serving(MODEL, generation, {1: 100}, 2)
    hand = {"by": "kubectl-edit", "at": "2026-11-27T12:00:00Z", "spec": spec}
    return virtual_service(type(record).model_validate({**record.model_dump(), "hand": hand}))


def _subsets(api: ApiServer) -> list[str]:
    return [each["name"] for each in api.document("DestinationRule", NAME)["spec"]["subsets"]]
