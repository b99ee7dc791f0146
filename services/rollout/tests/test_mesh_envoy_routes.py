import json
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from lepton.envoy import Envoy
from lepton.processes import Process
from lepton_common.errors import NotFound, Unavailable
from lepton_common.records import Hand, Serving, Sticky
from lepton_common.testing import until
from lepton_common.types import ModelRef
from lepton_rollout import xds
from lepton_rollout.istio import checked
from lepton_rollout.mesh import Stale, VirtualService, virtual_service
from lepton_rollout.mesh_envoy import EnvoyMesh
from lepton_rollout.record import TOTAL_WEIGHT

from .envoy_state import healthy_workers, pools, stat
from .stand_ins import StartWorker, assigned, infer, serving

pytestmark = pytest.mark.usefixtures("envoy")


async def test_an_older_generation_does_not_replace_a_newer_one_and_the_other_models_go_on(
    mesh: EnvoyMesh, envoy_recipe: Envoy, client: httpx.AsyncClient, model: ModelRef, start_worker: StartWorker
) -> None:
    worker, other = await start_worker("a"), ModelRef("default", "other")
    await mesh.place([worker.state()])
    await mesh.apply(virtual_service(serving(model, 5, {1: 100}, 2)))
    # A runner that slept meanwhile, in a process of its own.
    late = EnvoyMesh(envoy_recipe.mesh_dir, envoy_recipe.admin)

    with pytest.raises(Stale) as stale:
        await late.apply(virtual_service(serving(model, 4, {2: 100}, 1)), virtual_service(serving(other, 1, {3: 100})))

    assert stale.value.newer == {"default/digits": 5}
    assert (await infer(client, model)).json()["version"] == "1"
    assert (await infer(client, other)).json()["version"] == "3"
    await late.apply(virtual_service(serving(model, 5, {2: 100}, 1)))
    assert (await infer(client, model)).json()["version"] == "2"
    await late.close()


async def test_the_live_objects_are_told_once_envoy_runs_them(
    mesh: EnvoyMesh, envoy: Process, model: ModelRef, start_worker: StartWorker
) -> None:
    worker = await start_worker("a")
    await mesh.place([worker.state()])
    record = serving(model, 1, {1: 90, 2: 10})
    with pytest.raises(NotFound):
        await mesh.live(record)
    await mesh.apply(virtual_service(record))

    routes, rule = await mesh.live(record)

    assert routes["spec"]["http"][-1]["route"][1]["weight"] == 1_000
    assert [each["name"] for each in rule["spec"]["subsets"]] == ["v1", "v2"]
    with pytest.raises(Unavailable, match="does not yet run"):
        await mesh.live(serving(model, 2, {1: 50, 2: 50}))
    envoy.kill()
    with pytest.raises(Unavailable, match="does not answer"):
        await mesh.live(record)


async def test_a_bucket_goes_to_the_version_whose_share_holds_it_and_anything_else_to_either(
    mesh: EnvoyMesh, client: httpx.AsyncClient, model: ModelRef, start_worker: StartWorker
) -> None:
    worker = await start_worker("a")
    await mesh.place([worker.state()])
    record = serving(model, 1, {2: 30, 1: 45.67, 3: 24.33})
    await mesh.apply(virtual_service(record.model_copy(update={"stable": 1, "sticky": Sticky(by="key")})))

    async def version(bucket: str | None) -> str:
        headers = {"Host": model.host} | ({} if bucket is None else {"x-lepton-bucket": bucket})
        return str((await client.post("/v2/models/digits/infer", headers=headers)).json()["version"])

    # The stable version first, whatever the order of the split.
    expected = {0: "1", 4566: "1", 4567: "2", 7566: "2", 7567: "3", 9999: "3"}
    for _ in range(5):
        assert {bucket: await version(str(bucket)) for bucket in expected} == expected
    for nonsense in (None, "", "seven", "-1"):
        assert {await version(nonsense) for _ in range(60)} == {"1", "2", "3"}


def _by_hand(record: Serving, *http: dict[str, Any]) -> VirtualService:
    """The routes of a person who wrote these rules."""
    document = {"apiVersion": "networking.istio.io/v1", "kind": "VirtualService"}
    spec = checked({**document, "spec": {"hosts": [record.ref.host], "http": [*http]}}, record, (1, 2, 3))
    hand = Hand(by="ann", at=datetime(2026, 11, 27, tzinfo=UTC), spec=spec)
    return virtual_service(record.model_copy(update={"hand": hand}))


def _to(model: ModelRef, version: int, **more: Any) -> dict[str, Any]:
    return {"destination": {"host": model.host, "subset": f"v{version}"}, **more}


async def test_a_persons_header_matches_are_envoys(
    mesh: EnvoyMesh, client: httpx.AsyncClient, model: ModelRef, start_worker: StartWorker
) -> None:
    worker = await start_worker("a")
    await mesh.place([worker.state()])
    record = serving(model, 1, {1: 100}, 2, 3)
    both = {"headers": {"x-a": {"exact": "1"}, "x-b": {"prefix": "be"}}}
    without = {"headers": {"x-e": {}}, "withoutHeaders": {"x-f": {"regex": "no.*"}}}
    await mesh.apply(
        _by_hand(
            record,
            {"match": [both, {"headers": {"x-c": {"regex": "[0-9]{3}"}}}], "route": [_to(model, 2)]},
            {"match": [without], "route": [_to(model, 3)]},
            {"route": [_to(model, 1)]},
        )
    )
    cases: list[tuple[dict[str, str], str]] = [
        ({}, "1"),
        ({"x-a": "1"}, "1"),
        ({"x-a": "1", "x-b": "beta"}, "2"),
        ({"x-a": "1", "x-b": "alpha"}, "1"),
        ({"x-a": "2", "x-b": "beta"}, "1"),
        ({"x-c": "123"}, "2"),
        ({"x-c": "1234"}, "1"),
        ({"x-e": "anything"}, "3"),
        ({"x-e": "", "x-f": "yes"}, "3"),
        ({"x-e": "anything", "x-f": "nope"}, "1"),
        ({"x-e": "anything", "x-lepton-version": "2"}, "2"),
    ]

    for headers, version in cases:
        answer = await client.post("/v2/models/digits/infer", headers={"Host": model.host, **headers})
        assert (headers, answer.json()["version"]) == (headers, version)
    assert (await infer(client, model, version="9")).status_code == 503


async def test_a_persons_header_changes_reach_the_worker_and_the_caller(
    mesh: EnvoyMesh, client: httpx.AsyncClient, model: ModelRef, start_worker: StartWorker
) -> None:
    worker = await start_worker("a")
    await mesh.place([worker.state()])
    request = {"set": {"x-set": "new"}, "add": {"x-add": "more"}, "remove": ["x-remove"]}
    response = {"set": {"x-tier": "gold"}}
    route = _to(model, 1, headers={"request": request, "response": response})
    await mesh.apply(_by_hand(serving(model, 1, {1: 100}), {"route": [route]}))

    sent = {"Host": model.host, "x-set": "old", "x-add": "some", "x-remove": "gone"}
    answer = await client.post("/v2/models/digits/infer", headers=sent)

    heard = worker.heard[-1]
    assert (heard["x-set"], heard["x-add"], "x-remove" in heard) == ("new", "more", False)
    assert (answer.headers["x-tier"], answer.headers["x-lepton-version"]) == ("gold", "1")


async def test_a_mirror_gets_copies_under_its_own_version_and_callers_never_notice(
    mesh: EnvoyMesh, envoy_recipe: Envoy, client: httpx.AsyncClient, model: ModelRef, start_worker: StartWorker
) -> None:
    live, shadow = await start_worker("live"), await start_worker("shadow", "gpu")
    shadow.is_full = True
    await mesh.place([live.state(), shadow.state()])
    record = serving(model, 1, {1: 100}).model_copy(update={"versions": (assigned(1), assigned(2, "gpu"))})
    await mesh.apply(
        _by_hand(record, {"route": [_to(model, 1)], "mirrors": [_to(model, 2, percentage={"value": 50.0})]})
    )
    # What the mirror's cluster hears first of its worker is a matter of a health check.
    while await healthy_workers(envoy_recipe, "gpu", "mirror") == 0:
        await infer(client, model)
    shadow.heard.clear()

    answers = [await infer(client, model) for _ in range(400)]

    assert {answer.json()["version"] for answer in answers} == {"1"}
    await until(lambda: len(shadow.heard) > 100)
    assert len(shadow.heard) < 300
    assert {(each["x-lepton-version"], each["x-lepton-shadow"], each["host"]) for each in shadow.heard} == {
        ("2", "1", model.host)
    }
    assert not any("x-lepton-shadow" in each for each in live.heard)
    # The callers' cluster of that pool knows nothing of them.
    assert await stat(envoy_recipe, "cluster.pool-gpu.upstream_rq_total") == 0
    await mesh.apply(virtual_service(serving(model, 2, {1: 100})))
    await mesh.place([live.state()])
    assert pools(envoy_recipe.mesh_dir) == {"cpu"}


async def test_a_persons_timeout_and_retries_are_kept(
    mesh: EnvoyMesh, client: httpx.AsyncClient, model: ModelRef, start_worker: StartWorker
) -> None:
    worker = await start_worker("a")
    await mesh.place([worker.state()])
    record = serving(model, 1, {1: 100}, 2)
    hasty: dict[str, Any] = {"headers": {"x-hasty": {}}}
    await mesh.apply(
        _by_hand(
            record,
            {"match": [hasty], "route": [_to(model, 1)], "timeout": "200ms", "retries": {"attempts": 0}},
            {"route": [_to(model, 1)], "retries": {"attempts": 3, "retryOn": "503", "backoff": "1ms"}},
        )
    )
    worker.is_stuck = True
    late = await client.post("/v2/models/digits/infer", headers={"Host": model.host, "x-hasty": "yes"})
    worker.is_stuck = False
    worker.refused = {"1"}
    worker.heard.clear()
    once = await client.post("/v2/models/digits/infer", headers={"Host": model.host, "x-hasty": "yes"})
    assert len(worker.heard) == 1
    often = await infer(client, model)

    assert (late.status_code, late.headers["x-lepton-version"]) == (504, "1")
    assert (once.status_code, often.status_code) == (503, 503)
    assert len(worker.heard) == 1 + 4


async def test_whatever_the_records_no_route_names_a_cluster_that_is_not_there_or_a_pool_without_a_worker(
    envoy_recipe: Envoy, start_worker: StartWorker
) -> None:
    chance = random.Random(4)
    mesh = EnvoyMesh(envoy_recipe.mesh_dir, envoy_recipe.admin)
    workers = [await start_worker("cpu"), await start_worker("gpu", "gpu")]
    await mesh.place(worker.state() for worker in workers)
    models = [ModelRef("default", f"model-{number}") for number in range(3)]
    held = 0
    for generation in range(1, 13):
        services = []
        for each in models:
            places = {version: chance.choice(["cpu", "gpu", "cpu", "gpu", "empty"]) for version in (1, 2, 3)}
            versions = tuple(assigned(version, pool) for version, pool in places.items())
            split = {version: chance.choice([0, 0.01, 30, 100]) for version in (1, 2, 3)}
            record = serving(each, generation, split).model_copy(update={"versions": versions})
            mirrors = [_to(each, 3)] if chance.random() < 0.5 else []
            by_hand = _by_hand(record, {"route": [_to(each, 2)], "mirrors": mirrors})
            services.append(by_hand if chance.random() < 0.5 else virtual_service(record))
        try:
            await mesh.apply(*services)
        except Unavailable:
            held += 1
        _assert_all_routes_lead_somewhere(envoy_recipe.mesh_dir)
        await mesh.place(worker.state() for worker in workers)
        _assert_all_routes_lead_somewhere(envoy_recipe.mesh_dir)
    assert 0 < held < 12
    await mesh.close()


def _assert_all_routes_lead_somewhere(folder: Path) -> None:
    (routes,) = json.loads((folder / "rds.json").read_text())["resources"]
    clusters = {each["name"] for each in json.loads((folder / "cds.json").read_text())["resources"]}
    assert xds.clusters_of(routes["virtual_hosts"]) <= clusters
    for host in xds.model_hosts(routes).values():
        for pool in xds.live_pools_of(host):
            (endpoints,) = json.loads((folder / "eds" / f"{pool}.json").read_text())["resources"]
            assert endpoints["endpoints"][0]["lb_endpoints"]
        for route in host["routes"]:
            if "route" in route:
                assert sum(each["weight"] for each in route["route"]["weighted_clusters"]["clusters"]) == TOTAL_WEIGHT
