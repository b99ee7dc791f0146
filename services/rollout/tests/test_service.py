import asyncio

import httpx
import pytest
from lepton_common.events import RolloutFinished, RolloutStarted, TrafficShifted, decode
from lepton_common.records import Scope
from lepton_common.types import ModelRef

from .lab import Lab
from .stand_ins import Traffic, infer


async def test_a_deployed_version_gets_all_traffic_and_the_story_is_told(
    lab: Lab, client: httpx.AsyncClient, model: ModelRef
) -> None:
    await lab.worker("a")
    async with lab.service() as rollout:
        await lab.register(model, 1)
        done = await lab.deploy(rollout, model, 1)
        answer = await infer(client, model)
        served = (await rollout.get(f"/v1/serving/{model.model}")).json()

    assert (done["state"], done["previous"], done["percent"], done["actor"]) == ("promoted", None, 100, "ann")
    assert done["reason"] == "1 of 1 workers of pool 'cpu' are ready"
    assert answer.headers["x-lepton-version"] == "1"
    assert served["split"] == [{"version": 1, "percent": 100}]
    assert [(each["worker"], each["state"]) for each in served["workers"]] == [("a", "ready")]
    told = [decode(message.headers["ce_type"], message.value) for message in lab.bus.sent]
    assert [type(event) for event in told] == [RolloutStarted, TrafficShifted, RolloutFinished]
    assert isinstance(told[2], RolloutFinished)
    assert (told[2].outcome, told[2].version, told[2].previous) == ("promoted", 1, None)


async def test_the_first_version_of_a_model_deploys_itself(
    lab: Lab, client: httpx.AsyncClient, model: ModelRef
) -> None:
    await lab.worker("a")
    async with lab.service() as rollout:
        await lab.register(model, 1, 2, deploy=True)
        (started,) = (await rollout.get("/v1/rollouts", params={"model": model.model})).json()
        done = await lab.ended(rollout, started)

    assert (done["version"], done["state"]) == (1, "promoted")
    assert (await infer(client, model)).headers["x-lepton-version"] == "1"


async def test_a_first_version_stays_undeployed_when_its_owner_says_so(lab: Lab, model: ModelRef) -> None:
    async with lab.service() as rollout:
        await lab.register(model, 1, deploy=False)
        assert (await rollout.get("/v1/rollouts")).json() == []
        assert (await rollout.get(f"/v1/serving/{model.model}")).status_code == 404


async def test_swaps_and_returns_under_load_fail_no_request(
    lab: Lab, client: httpx.AsyncClient, model: ModelRef
) -> None:
    await lab.worker("a")
    await lab.worker("b")
    async with lab.service() as rollout:
        await lab.register(model, 1, 2, 3)
        await lab.deploy(rollout, model, 1)
        async with Traffic(client, model) as traffic:
            for version in (2, 3, 1, 2, 3):
                done = await lab.deploy(rollout, model, version)
                assert done["state"] == "promoted"
            back = (await rollout.post(f"/v1/serving/{model.model}/rollback")).json()
            assert (await lab.ended(rollout, back))["version"] == 2
            await traffic.more(50)

    assert set(traffic.answers) == {"200 version 1", "200 version 2", "200 version 3"}
    served = await lab.serving(model)
    assert (served.stable, served.previous) == (2, 3)
    assert {each.version for each in served.versions} == {2, 3}


async def test_a_version_that_no_worker_can_load_fails_with_their_reason_and_harms_nothing(
    lab: Lab, client: httpx.AsyncClient, model: ModelRef
) -> None:
    worker = await lab.worker("a")
    worker.failing[2] = "the graph has a cycle"
    async with lab.service() as rollout:
        await lab.register(model, 1, 2)
        await lab.deploy(rollout, model, 1)
        done = await lab.deploy(rollout, model, 2)

    assert (done["state"], done["reason"]) == ("failed", "the graph has a cycle")
    assert (await infer(client, model)).headers["x-lepton-version"] == "1"
    served = await lab.serving(model)
    assert (served.stable, [each.version for each in served.versions]) == (1, [1])
    told = decode(lab.bus.sent[-1].headers["ce_type"], lab.bus.sent[-1].value)
    assert isinstance(told, RolloutFinished)
    assert (told.outcome, told.reason) == ("failed", "the graph has a cycle")


async def test_a_rollout_without_any_worker_fails_when_its_time_is_over(lab: Lab, model: ModelRef) -> None:
    async with lab.service(load_timeout_s=0.2) as rollout:
        await lab.register(model, 1)
        done = await lab.deploy(rollout, model, 1)

    assert done["state"] == "failed"
    assert done["reason"] == "no worker of pool 'cpu' had the version ready in time (no live workers)"


async def test_a_model_has_one_open_rollout_at_a_time(lab: Lab, model: ModelRef) -> None:
    async with lab.service() as rollout:
        await lab.register(model, 1, 2)
        first = await rollout.post("/v1/rollouts", json={"model": model.model, "version": 1, "policy": "immediate"})
        again = await rollout.post("/v1/rollouts", json={"model": model.model, "version": 1, "policy": "immediate"})
        other = await rollout.post("/v1/rollouts", json={"model": model.model, "version": 2, "policy": "immediate"})

    assert (first.status_code, again.status_code, other.status_code) == (202, 202, 409)
    assert first.json()["id"] == again.json()["id"]
    assert other.json()["detail"] == (
        f"model 'digits' is on its way to version 1: rollout {first.json()['id']} is loading"
    )


async def test_a_rollback_takes_precedence_over_a_rollout_that_is_still_loading(
    lab: Lab, client: httpx.AsyncClient, model: ModelRef
) -> None:
    worker = await lab.worker("a")
    worker.slow.add(3)
    async with lab.service() as rollout:
        await lab.register(model, 1, 2, 3)
        await lab.deploy(rollout, model, 1)
        await lab.deploy(rollout, model, 2)
        loading = (
            await rollout.post("/v1/rollouts", json={"model": model.model, "version": 3, "policy": "immediate"})
        ).json()
        back = (await rollout.post(f"/v1/serving/{model.model}/rollback")).json()
        done = await lab.ended(rollout, back)
        superseded = await lab.ended(rollout, loading)

    assert (done["version"], done["state"]) == (1, "promoted")
    assert (superseded["state"], superseded["reason"]) == ("aborted", "superseded by version 1 (ann)")
    assert (await infer(client, model)).headers["x-lepton-version"] == "1"
    assert {each.version for each in (await lab.serving(model)).versions} == {1, 2}


async def test_a_rollback_needs_a_previous_version(lab: Lab, model: ModelRef) -> None:
    worker = await lab.worker("a")
    worker.slow.add(2)
    async with lab.service() as rollout:
        await lab.register(model, 1, 2)
        await lab.deploy(rollout, model, 1)
        loading = await rollout.post("/v1/rollouts", json={"model": model.model, "version": 2, "policy": "immediate"})
        answer = await rollout.post(f"/v1/serving/{model.model}/rollback")
        untouched = await rollout.get(f"/v1/rollouts/{loading.json()['id']}")

    assert answer.status_code == 409
    assert answer.json()["detail"] == "model 'digits' has no previous version to go back to"
    assert untouched.json()["state"] == "loading"


async def test_a_loaded_version_is_warm_and_an_unloaded_one_is_gone(
    lab: Lab, client: httpx.AsyncClient, model: ModelRef
) -> None:
    await lab.worker("a")
    async with lab.service() as rollout:
        await lab.register(model, 1, 2)
        await lab.deploy(rollout, model, 1)
        loaded = await rollout.post(f"/v1/serving/{model.model}/load", json={"version": 2})
        warm = await infer(client, model, version="2")
        live = await infer(client, model)
        refused = await rollout.post(f"/v1/serving/{model.model}/unload", json={"version": 1})
        unloaded = await rollout.post(f"/v1/serving/{model.model}/unload", json={"version": 2})
        cold = await infer(client, model, version="2")

    assert loaded.json()["versions"] == [1, 2]
    assert (warm.headers["x-lepton-version"], live.headers["x-lepton-version"]) == ("2", "1")
    assert refused.status_code == 409
    assert unloaded.json()["versions"] == [1]
    assert cold.status_code == 503


async def test_an_unloaded_model_is_restored_by_a_load(lab: Lab, client: httpx.AsyncClient, model: ModelRef) -> None:
    await lab.worker("a")
    async with lab.service() as rollout:
        await lab.register(model, 1, 2)
        await lab.deploy(rollout, model, 1)
        await lab.deploy(rollout, model, 2)
        gone = await rollout.post(f"/v1/serving/{model.model}/unload")
        unserved = await infer(client, model)
        back = await rollout.post(f"/v1/serving/{model.model}/load")
        served = await infer(client, model)

    assert (gone.json()["split"], gone.json()["versions"], gone.json()["stable"]) == ([], [], 2)
    assert unserved.status_code == 503
    assert back.json()["split"] == [{"version": 2, "percent": 100}]
    assert served.headers["x-lepton-version"] == "2"


async def test_a_load_that_workers_refuse_says_why_and_leaves_nothing_behind(lab: Lab, model: ModelRef) -> None:
    worker = await lab.worker("a")
    worker.failing[2] = "needs 40 GiB"
    async with lab.service() as rollout:
        await lab.register(model, 1, 2)
        await lab.deploy(rollout, model, 1)
        answer = await rollout.post(f"/v1/serving/{model.model}/load", json={"version": 2})

    assert answer.status_code == 409
    assert answer.json()["detail"] == "version 2 of model 'digits' was not loaded: needs 40 GiB"
    assert [each.version for each in (await lab.serving(model)).versions] == [1]


@pytest.mark.parametrize("command", ["load", "unload", "rollback"])
async def test_commands_on_an_unknown_model_are_refused(lab: Lab, command: str) -> None:
    async with lab.service() as rollout:
        answer = await rollout.post(f"/v1/serving/nothing/{command}", json={})

    assert answer.status_code in {404, 409}
    assert answer.headers["content-type"] == "application/problem+json"


async def test_reading_needs_one_scope_and_deploying_another(lab: Lab, model: ModelRef) -> None:
    async with lab.service() as rollout:
        await lab.register(model, 1)
        rollout.headers["Authorization"] = f"Bearer {await lab.key(Scope.READ)}"
        await _until_known(rollout)
        read = await rollout.get("/v1/serving")
        deploy = await rollout.post("/v1/rollouts", json={"model": model.model, "version": 1, "policy": "immediate"})

    assert (read.status_code, deploy.status_code) == (200, 403)


async def test_a_foreign_tenant_sees_and_moves_nothing(lab: Lab, model: ModelRef) -> None:
    await lab.worker("a")
    async with lab.service() as rollout:
        await lab.register(model, 1)
        done = await lab.deploy(rollout, model, 1)
        rollout.headers["Authorization"] = f"Bearer {await lab.key(tenant='foreign')}"
        await _until_known(rollout)
        answers = [
            await rollout.get(f"/v1/rollouts/{done['id']}"),
            await rollout.get(f"/v1/serving/{model.model}"),
            await rollout.post("/v1/rollouts", json={"model": model.model, "version": 1, "policy": "immediate"}),
            await rollout.post(f"/v1/serving/{model.model}/unload"),
        ]
        lists = (await rollout.get("/v1/rollouts")).json(), (await rollout.get("/v1/serving")).json()

    assert [answer.status_code for answer in answers] == [404, 404, 404, 404]
    assert lists == ([], [])


async def test_a_rollout_goes_on_after_a_restart(lab: Lab, client: httpx.AsyncClient, model: ModelRef) -> None:
    worker = await lab.worker("a")
    worker.slow.add(1)
    async with lab.service(instance="a") as rollout:
        await lab.register(model, 1)
        started = (
            await rollout.post("/v1/rollouts", json={"model": model.model, "version": 1, "policy": "immediate"})
        ).json()
    worker.slow.clear()
    worker.look_again()
    async with lab.service(instance="a") as rollout:
        done = await lab.ended(rollout, started)

    assert done["state"] == "promoted"
    assert (await infer(client, model)).headers["x-lepton-version"] == "1"


async def test_replicas_share_the_work_and_finish_every_rollout_once(lab: Lab) -> None:
    await lab.worker("a")
    models = [ModelRef("default", f"model-{number}") for number in range(8)]
    async with lab.service() as first, lab.service() as second:
        for each in models:
            await lab.register(each, 1)
        done = await asyncio.gather(
            *(lab.deploy((first, second)[number % 2], each, 1) for number, each in enumerate(models))
        )

    assert {each["state"] for each in done} == {"promoted"}
    finished = [message.key for message in lab.bus.sent if message.headers["ce_type"] == "RolloutFinished"]
    assert sorted(finished) == sorted(map(str, models))


async def test_routes_that_were_lost_come_back_from_etcd(lab: Lab, client: httpx.AsyncClient, model: ModelRef) -> None:
    await lab.worker("a")
    async with lab.service() as rollout:
        await lab.register(model, 1)
        await lab.deploy(rollout, model, 1)
    (lab.settings.mesh_dir / "rds.json").unlink()
    async with lab.service():
        while (answer := await infer(client, model)).status_code != 200:
            pass

    assert answer.headers["x-lepton-version"] == "1"


async def _until_known(rollout: httpx.AsyncClient) -> None:
    """The service has heard from etcd of the client's key."""
    while (await rollout.get("/v1/serving")).status_code == 401:
        pass
