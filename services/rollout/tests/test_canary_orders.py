"""What persons, policies and other versions do to a canary on its way."""

import signal
from datetime import UTC, datetime, timedelta

import httpx
from lepton.processes import Process
from lepton_common.events import (
    RolloutHeld,
    RolloutSteered,
    TrafficShifted,
)
from lepton_common.types import ModelRef

from .canaries import QUICK, Start, seen, steer, told, until
from .lab import Lab


async def test_a_policy_that_holds_asks_a_person_who_may_abort(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, model: ModelRef
) -> None:
    async with lab.measured(model, error_ratio={2: 0.5}):
        started = await start(on_failure="hold")
        waiting = await until(rollout, started, lambda now: "worse than the stable" in now["waiting_for"])
        await steer(rollout, started, "abort")
        done = await lab.ended(rollout, started)

    assert (waiting["state"], waiting["percent"]) == ("shifting", 10)
    assert (done["state"], done["reason"]) == ("aborted", "aborted by ann: the test says so")
    assert [event.page for event in told(lab, RolloutHeld)] == [True]
    assert [event.command for event in told(lab, RolloutSteered)] == ["abort"]


async def test_a_frozen_rollout_lets_no_newer_version_by(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, model: ModelRef
) -> None:
    async with lab.measured(model, error_ratio={2: 0.5}):
        started = await start(on_failure="freeze")
        await until(rollout, started, lambda now: "worse than the stable" in now["waiting_for"])
        refused = await rollout.post("/v1/rollouts", json={"model": model.model, "version": 3, "policy": QUICK})

    assert refused.status_code == 409
    assert "is frozen: worse than the stable" in refused.json()["detail"]


async def test_a_paused_rollout_grows_again_when_it_is_resumed(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, model: ModelRef
) -> None:
    async with lab.measured(model) as seconds:
        started = await start(dwell_s=40)  # The pause must come before the next stage does.
        await until(rollout, started, lambda now: now["percent"] == 10)
        assert (await steer(rollout, started, "pause")).json()["paused"]
        await seconds.more(60)
        still = await seen(rollout, started)
        await steer(rollout, started, "resume")
        done = await lab.ended(rollout, started)

    assert (still["percent"], still["waiting_for"]) == (10, "paused: the test says so")
    assert done["state"] == "promoted"


async def test_a_paused_rollout_is_taken_back_all_the_same(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, model: ModelRef
) -> None:
    async with lab.measured(model) as seconds:
        started = await start(dwell_s=40)
        await until(rollout, started, lambda now: now["percent"] == 10)
        await steer(rollout, started, "pause")
        seconds.error_ratio = {2: 0.8}
        done = await lab.ended(rollout, started)

    assert done["state"] == "rolled_back"


async def test_a_rollout_that_is_paused_before_the_mesh_has_its_next_stage_is_taken_back_all_the_same(
    lab: Lab, envoy: Process, rollout: httpx.AsyncClient, start: Start, model: ModelRef
) -> None:
    async with lab.measured(model) as seconds:
        started = await start(dwell_s=100_000)
        await until(rollout, started, lambda now: now["percent"] == 10)
        envoy.freeze()
        await steer(rollout, started, "promote")
        paused = (await steer(rollout, started, "pause")).json()
        envoy.send(signal.SIGCONT)
        seconds.error_ratio = {2: 0.8}
        done = await lab.ended(rollout, started)

    assert paused["percent"] == 10
    assert done["state"] == "rolled_back"


async def test_a_promotion_waits_for_its_approval(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, model: ModelRef
) -> None:
    async with lab.measured(model):
        started = await start(approve_promotion=True)
        early = await steer(rollout, started, "approve")
        waiting = await until(rollout, started, lambda now: now["waiting_for"].startswith("approval"))
        await steer(rollout, started, "approve")
        done = await lab.ended(rollout, started)
    decisions = (await rollout.get(f"/v1/rollouts/{done['id']}/decisions")).json()

    assert early.status_code == 409
    assert waiting["percent"] == 50
    assert done["state"] == "promoted"
    (approval,) = [each for each in decisions if each["action"] == "approve"]
    assert (approval["actor"], approval["reason"]) == ("ann", "the test says so")
    assert [event.page for event in told(lab, RolloutHeld)] == [False]


async def test_a_person_may_promote_past_what_is_left(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, model: ModelRef
) -> None:
    async with lab.measured(model):
        started = await start(dwell_s=100_000)
        await until(rollout, started, lambda now: now["percent"] == 10)
        await steer(rollout, started, "promote", full=True)
        await until(rollout, started, lambda now: now["percent"] == 100)
        done = await lab.ended(rollout, started)
    decisions = (await rollout.get(f"/v1/rollouts/{done['id']}/decisions")).json()

    assert [event.percent for event in told(lab, TrafficShifted) if event.version == 2] == [10, 100]
    assert done["state"] == "promoted"
    (promotion,) = [each for each in decisions if each["action"] == "promote"]
    assert (promotion["actor"], promotion["reason"]) == ("ann", "the test says so")


async def test_a_rollback_takes_back_what_a_rollout_has_moved(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, model: ModelRef
) -> None:
    async with lab.measured(model):
        started = await start(dwell_s=100_000)
        await until(rollout, started, lambda now: now["percent"] == 10)
        answer = await rollout.post(f"/v1/serving/{model.model}/rollback")
        done = await lab.ended(rollout, started)
    served = await lab.serving(model)

    assert (answer.status_code, answer.json()["id"]) == (202, started["id"])
    assert (done["state"], done["reason"]) == ("aborted", "rolled back by ann")
    assert (served.stable, [(share.version, share.percent) for share in served.split]) == (1, [(1, 100)])


async def test_nothing_starts_in_a_freeze(lab: Lab, rollout: httpx.AsyncClient, start: Start, model: ModelRef) -> None:
    now = datetime.now(UTC)
    freeze = {
        "first": str((now - timedelta(days=1)).date()),
        "last": str((now + timedelta(days=1)).date()),
        "reason": "holidays",
    }
    async with lab.measured(model):
        started = await start(freeze=[freeze])
        waiting = await until(rollout, started, lambda now: "frozen" in now["waiting_for"])
        await steer(rollout, started, "abort")
        done = await lab.ended(rollout, started)

    assert (waiting["percent"], "holidays" in waiting["waiting_for"]) == (0, True)
    assert done["state"] == "aborted"


async def test_a_newer_version_takes_the_place_of_the_one_under_way(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, model: ModelRef
) -> None:
    async with lab.measured(model):
        older = await start(dwell_s=100_000)
        await until(rollout, older, lambda now: now["percent"] == 10)
        newer = await start(3)
        ended = await lab.ended(rollout, older)
        done = await lab.ended(rollout, newer)

    assert (ended["state"], ended["reason"]) == ("aborted", "superseded by version 3 (ann)")
    assert (done["state"], done["previous"]) == ("promoted", 1)


async def test_a_version_that_queues_waits_for_the_end_of_the_one_before(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, model: ModelRef
) -> None:
    async with lab.measured(model):
        first = await start()
        second = await start(3, on_newer="queue")
        again = await start(3, on_newer="queue")
        queued = await seen(rollout, second)
        ended = await lab.ended(rollout, first)
        done = await lab.ended(rollout, second)

    assert again["id"] == second["id"]
    assert queued["state"] == "queued"
    assert (ended["state"], done["state"], done["previous"]) == ("promoted", "promoted", 2)


async def test_all_traffic_at_once_is_refused_to_a_version_that_is_earning_it_and_says_what_gives_it(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, model: ModelRef
) -> None:
    async with lab.measured(model):
        started = await start(dwell_s=100_000)
        await until(rollout, started, lambda now: now["percent"] == 10)
        refused = await rollout.post("/v1/rollouts", json={"model": model.model, "version": 2, "policy": "immediate"})
        again = await start(dwell_s=100_000)

    assert refused.status_code == 409
    assert refused.json()["detail"] == (
        "version 2 of model 'digits' is in a rollout by policy 'canary' and is shifting at 10 %:"
        " `lepton rollout promote digits --full --reason WHY` gives it all traffic now,"
        " `lepton rollout abort digits --reason WHY` ends it"
    )
    assert again["id"] == started["id"]


async def test_a_rollback_takes_the_place_of_a_canary_of_the_same_version_that_is_still_loading(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, model: ModelRef
) -> None:
    await lab.deploy(rollout, model, 2)
    loading = await start(1, pool="empty")
    back = (await rollout.post(f"/v1/serving/{model.model}/rollback")).json()
    done = await lab.ended(rollout, back)

    assert (done["version"], done["state"]) == (1, "promoted")
    assert (await seen(rollout, loading))["reason"] == "superseded by version 1 (ann)"


async def test_bytes_that_were_taken_back_need_force_and_their_cool_down(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, model: ModelRef
) -> None:
    body = {"model": model.model, "version": 2, "policy": QUICK}
    async with lab.measured(model, error_ratio={2: 0.5}) as seconds:
        await lab.ended(rollout, await start(cool_down_s=3600))
        refused = await rollout.post("/v1/rollouts", json=body)
        too_early = await rollout.post("/v1/rollouts", json={**body, "force": True})
        other = await lab.ended(rollout, await start(3))
        seconds.error_ratio = {}
        assert other["state"] == "promoted"

    assert (refused.status_code, "was taken back" in refused.json()["detail"]) == (409, True)
    assert (too_early.status_code, "cool-down" in too_early.json()["detail"]) == (409, True)


async def test_force_tries_again_what_has_cooled_down(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, model: ModelRef
) -> None:
    async with lab.measured(model, error_ratio={2: 0.5}) as seconds:
        back = await lab.ended(rollout, await start())
        seconds.error_ratio = {}
        again = await steer(rollout, back, "retry")
        done = await lab.ended(rollout, again.json())

    assert (back["state"], done["state"]) == ("rolled_back", "promoted")


async def test_a_models_own_policy_is_used_when_a_rollout_names_none(
    lab: Lab, rollout: httpx.AsyncClient, model: ModelRef
) -> None:
    default = (await rollout.get(f"/v1/policies/{model.model}")).json()
    stored = await rollout.put(f"/v1/policies/{model.model}", json=QUICK)
    started = (await rollout.post("/v1/rollouts", json={"model": model.model, "version": 2})).json()
    await rollout.post(f"/v1/rollouts/{started['id']}/abort", json={"reason": "enough"})
    removed = await rollout.delete(f"/v1/policies/{model.model}")
    again = await rollout.delete(f"/v1/policies/{model.model}")
    known = (await rollout.get("/v1/policies")).json()

    assert default["source"] == "default"
    assert (stored.status_code, stored.json()["source"]) == (200, "ann")
    assert (started["strategy"], started["policy"]["steps"]) == ("canary", [10, 50])
    assert (removed.status_code, again.status_code) == (204, 404)
    assert {"fast", "careful", "shadow-first"} <= set(known["presets"])
    assert known["schema"]["title"] == "Policy"
