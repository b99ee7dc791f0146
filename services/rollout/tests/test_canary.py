"""Canaries from start to end, on real PostgreSQL, etcd and Envoy; what they are judged by is told as monitor would."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from lepton_common.events import (
    Event,
    RolloutFinished,
    RolloutHeld,
    RolloutSteered,
    TrafficShifted,
    decode,
)
from lepton_common.types import ModelRef

from .lab import Lab
from .stand_ins import infer

# Quick, but judged like any other.
QUICK = {
    "steps": [10, 50],
    "dwell_s": 3,
    "min_requests": 50,
    "bake_s": 2,
    "judge": {"errors": {"margin": 3, "acceptable": 0.05}, "slow": {"margin": 3, "acceptable": 0.3}},
    "cool_down_s": 0,
}

Start = Callable[..., Awaitable[dict[str, Any]]]


@pytest.fixture
async def rollout(lab: Lab, model: ModelRef) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service with one worker, where version 1 of the model serves."""
    await lab.worker("a")
    async with lab.service() as client:
        await lab.register(model, 1, 2, 3)
        await lab.deploy(client, model, 1)
        yield client


@pytest.fixture
def start(rollout: httpx.AsyncClient, model: ModelRef) -> Start:
    async def start(version: int = 2, *, more: dict[str, Any] | None = None, **policy: Any) -> dict[str, Any]:
        body = {"model": model.model, "version": version, "policy": {**QUICK, **policy}, **(more or {})}
        answer = await rollout.post("/v1/rollouts", json=body)
        assert answer.status_code == 202, answer.text
        started: dict[str, Any] = answer.json()
        return started

    return start


async def seen(client: httpx.AsyncClient, started: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get(f"/v1/rollouts/{started['id']}")).raise_for_status().json()
    return found


async def until(
    client: httpx.AsyncClient, started: dict[str, Any], holds: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """The rollout once that holds."""
    try:
        async with asyncio.timeout(30):
            while not holds(found := await seen(client, started)):
                pass
    except TimeoutError:
        raise AssertionError(f"not so after 30 s: {found}") from None
    return found


async def steer(client: httpx.AsyncClient, started: dict[str, Any], command: str, **more: Any) -> httpx.Response:
    return await client.post(f"/v1/rollouts/{started['id']}/{command}", json={"reason": "the test says so", **more})


def told(lab: Lab, kind: type[Event]) -> list[Any]:
    events = [decode(message.headers["ce_type"], message.value) for message in lab.bus.sent]
    return [event for event in events if isinstance(event, kind)]


async def test_a_version_as_good_as_the_stable_is_walked_to_all_traffic(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, client: httpx.AsyncClient, model: ModelRef
) -> None:
    async with lab.measured(model, error_ratio={1: 0.01, 2: 0.01}):
        done = await lab.ended(rollout, await start())
    decisions = (await rollout.get(f"/v1/rollouts/{done['id']}/decisions")).json()

    assert (done["state"], done["previous"], done["percent"]) == ("promoted", 1, 100)
    assert (await infer(client, model)).headers["x-lepton-version"] == "2"
    served = await lab.serving(model)
    assert (served.stable, served.previous, served.shadow, served.sticky) == (2, 1, None, None)
    shares = [event.percent for event in told(lab, TrafficShifted) if event.version == 2]
    assert shares == [10, 50, 100]
    steps = [each for each in decisions if each["action"] == "step"]
    assert len(steps) == 3
    assert all(each["gates"] for each in steps)


async def test_a_version_with_more_errors_is_taken_back_and_the_stable_serves_on(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, client: httpx.AsyncClient, model: ModelRef
) -> None:
    async with lab.measured(model, error_ratio={1: 0.01, 2: 0.5}):
        done = await lab.ended(rollout, await start())

    assert (done["state"], done["percent"]) == ("rolled_back", 0)
    assert "errors" in done["reason"]
    assert (await infer(client, model)).headers["x-lepton-version"] == "1"
    assert [each.version for each in (await lab.serving(model)).versions] == [1]
    (end,) = [event for event in told(lab, RolloutFinished) if event.version == 2]
    errors = end.evidence["gates"]["errors"]
    assert (end.outcome, errors["evidence"] >= errors["needed"]) == ("rolled_back", True)


async def test_a_slow_version_is_taken_back(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, model: ModelRef
) -> None:
    async with lab.measured(model, latency_s={1: 0.01, 2: 0.05}) as seconds:
        await seconds.more(10)  # what the stable is used to
        done = await lab.ended(rollout, await start())

    assert (done["state"], "slow" in done["reason"]) == ("rolled_back", True)


async def test_without_traffic_nothing_is_promoted_and_nothing_taken_back(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, model: ModelRef
) -> None:
    started = await start()
    async with lab.measured(model, requests=0) as seconds:
        await seconds.more(100)
        now = await seen(rollout, started)

    assert (now["state"], now["percent"], now["stage"]) == ("shifting", 10, 1)


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
        started = await start()
        await until(rollout, started, lambda now: now["percent"] == 10)
        assert (await steer(rollout, started, "pause")).json()["paused"]
        await seconds.more(50)
        still = await seen(rollout, started)
        await steer(rollout, started, "resume")
        done = await lab.ended(rollout, started)

    assert (still["percent"], still["waiting_for"]) == (10, "paused: the test says so")
    assert done["state"] == "promoted"


async def test_a_paused_rollout_is_taken_back_all_the_same(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, model: ModelRef
) -> None:
    async with lab.measured(model) as seconds:
        started = await start()
        await until(rollout, started, lambda now: now["percent"] == 10)
        await steer(rollout, started, "pause")
        seconds.error_ratio = {2: 0.8}
        done = await lab.ended(rollout, started)

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

    assert [event.percent for event in told(lab, TrafficShifted) if event.version == 2] == [10, 100]
    assert done["reason"].startswith("promoted by ann") or done["state"] == "promoted"


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


async def test_a_group_steps_together_and_gives_up_together(lab: Lab, rollout: httpx.AsyncClient, start: Start) -> None:
    digits, other = ModelRef("default", "digits"), ModelRef("default", "tokenizer")
    await lab.register(other, 1, 2)
    await lab.deploy(rollout, other, 1)
    together = {"together": [{"model": other.model, "version": 2}]}
    async with lab.measured(digits, error_ratio={2: 0.0}), lab.measured(other, requests=0) as held_up:
        first = await start(more=together)
        waiting = await until(rollout, first, lambda now: "of its group is not as far" in now["waiting_for"])
        held_up.requests, held_up.error_ratio = 200, {2: 0.6}
        done = await lab.ended(rollout, first)
        (member,) = (await rollout.get("/v1/rollouts", params={"model": other.model, "limit": 1})).json()

    assert (waiting["percent"], waiting["group"]) == (10, member["group"])
    assert (done["state"], member["state"]) == ("aborted", "rolled_back")
    assert done["reason"].startswith("model 'tokenizer' of its group gave up")


async def test_a_shadow_comes_before_any_traffic(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, model: ModelRef
) -> None:
    async with lab.measured(model):
        started = await start(strategy="shadow", shadow={"dwell_s": 3, "min_pairs": 100, "percent": 100})
        serving = await lab.serving(model)
        while serving.shadow is None:
            serving = await lab.serving(model)
        done = await lab.ended(rollout, started)

    assert [(share.version, share.percent) for share in serving.split] == [(1, 100)]
    assert serving.shadow.version == 2
    assert done["state"] == "promoted"


async def test_a_shadow_that_answers_otherwise_gets_no_traffic(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, model: ModelRef
) -> None:
    async with lab.measured(model, agreement=0.2) as seconds:
        started = await start(strategy="shadow", shadow={"dwell_s": 3, "min_pairs": 100, "percent": 100})
        await seconds.more(100)
        now = await seen(rollout, started)

    assert now["percent"] == 0
    assert now["state"] != "promoted"


async def test_blue_green_is_ready_then_takes_everything_and_is_watched(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, client: httpx.AsyncClient, model: ModelRef
) -> None:
    async with lab.measured(model):
        started = await start(strategy="blue-green", dwell_s=0.5)
        done = await lab.ended(rollout, started)

    assert done["state"] == "promoted"
    assert [event.percent for event in told(lab, TrafficShifted) if event.version == 2] == [100]


async def test_an_ab_test_by_header_reaches_who_carries_it_and_no_one_else(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, client: httpx.AsyncClient, model: ModelRef
) -> None:
    async with lab.measured(model):
        started = await start(strategy="ab", match=[{"header": "x-group", "value": "beta"}], duration_s=100_000)
        await until(rollout, started, lambda now: now["state"] == "shifting")
        while not (await lab.serving(model)).matches:
            pass
        headers = {"Host": model.host, "x-group": "beta"}
        beta = await client.post(f"/v2/models/{model.model}/infer", headers=headers, content=b"{}")
        anyone = await infer(client, model)
        await steer(rollout, started, "abort")
        await lab.ended(rollout, started)
        after = await client.post(f"/v2/models/{model.model}/infer", headers=headers, content=b"{}")

    assert (beta.headers["x-lepton-version"], anyone.headers["x-lepton-version"]) == ("2", "1")
    assert after.headers["x-lepton-version"] == "1"


async def test_a_canary_in_a_pool_of_its_own_comes_home_when_it_is_promoted(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, model: ModelRef
) -> None:
    await lab.worker("b", pool="canary")
    async with lab.measured(model):
        done = await lab.ended(rollout, await start(pool="canary"))

    assert done["state"] == "promoted"
    assert [(each.version, each.pool) for each in (await lab.serving(model)).versions] == [(1, "cpu"), (2, "cpu")]


async def test_a_version_that_cannot_load_fails_without_having_had_traffic(
    lab: Lab, model: ModelRef, client: httpx.AsyncClient
) -> None:
    worker = await lab.worker("a")
    worker.failing[2] = "the graph has a cycle"
    async with lab.service() as service:
        await lab.register(model, 1, 2)
        await lab.deploy(service, model, 1)
        answer = await service.post("/v1/rollouts", json={"model": model.model, "version": 2, "policy": QUICK})
        done = await lab.ended(service, answer.json())

    assert (done["state"], done["reason"]) == ("failed", "the graph has a cycle")
    assert (await infer(client, model)).headers["x-lepton-version"] == "1"


async def test_a_canary_goes_on_where_it_was_after_a_restart(lab: Lab, model: ModelRef) -> None:
    await lab.worker("a")
    async with lab.service() as service:
        await lab.register(model, 1, 2)
        await lab.deploy(service, model, 1)
        async with lab.measured(model):
            body = {
                "model": model.model,
                "version": 2,
                "policy": {**QUICK, "steps": [10, {"percent": 50, "dwell_s": 40}]},
            }
            started = (await service.post("/v1/rollouts", json=body)).json()
            before = await until(service, started, lambda now: now["percent"] == 50)
    async with lab.service() as service:
        after = await seen(service, started)
        async with lab.measured(model):
            done = await lab.ended(service, started)

    assert (before["stage"], after["stage"], after["percent"]) == (2, 2, 50)
    assert done["state"] == "promoted"
    assert [event.percent for event in told(lab, TrafficShifted) if event.version == 2] == [10, 50, 100]


async def test_a_replay_says_what_another_policy_would_have_done(
    lab: Lab, rollout: httpx.AsyncClient, start: Start, model: ModelRef
) -> None:
    async with lab.measured(model, error_ratio={1: 0.02, 2: 0.02}):
        done = await lab.ended(rollout, await start())
    points = (await rollout.get(f"/v1/rollouts/{done['id']}/windows")).json()
    path = f"/v1/rollouts/{done['id']}/replay"
    same = (await rollout.post(path, json=QUICK)).json()
    strict = (await rollout.post(path, json={**QUICK, "limits": {"max_error_ratio": 0.001}})).json()

    assert {point["version"] for point in points} == {1, 2}
    assert same["outcome"] == "step"
    assert strict["seconds_judged"] == same["seconds_judged"]
    assert strict["outcome"] != "step"


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


@pytest.mark.parametrize(
    ("policy", "named"),
    [
        ("nosuch", "no preset is called 'nosuch'"),
        ({"steps": [50, 10]}, "steps must grow"),
        ({"steps": [100]}, "less than 100 %"),
        ({"steps": [0.001]}, "multiple of 0.01"),
        ({"dwel_s": 3}, "dwel_s"),
        ({"freeze": [{"timezone": "Europe/Zuerich"}]}, "is not a time zone"),
    ],
)
async def test_a_wrong_policy_is_refused_and_named(
    rollout: httpx.AsyncClient, model: ModelRef, policy: Any, named: str
) -> None:
    answer = await rollout.post("/v1/rollouts", json={"model": model.model, "version": 2, "policy": policy})
    assert answer.status_code in (400, 422)
    assert named in answer.text
