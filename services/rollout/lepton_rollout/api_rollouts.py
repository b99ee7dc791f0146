"""The HTTP API of rollouts: start them, look at them, steer them, ask why."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Query
from lepton.models import Name
from lepton.policies import Policy
from lepton.rollouts import Decision, NewRollout, Reason, Replay, Rollout, WindowPoint
from lepton_common.auth import Caller
from lepton_common.db import Database, Tx
from lepton_common.errors import NotFound
from lepton_common.events import WindowClosed

from lepton_rollout import domain, store, store_facts
from lepton_rollout.api import Deployer, Reader
from lepton_rollout.judge import BASELINE_S, replayed
from lepton_rollout.serving import ServingTable
from lepton_rollout.starting import Starter
from lepton_rollout.steering import Steering
from lepton_rollout.views import RECENT_S, replay_view, rollout_view, window_points


def router(db: Database, table: ServingTable, starter: Starter, steering: Steering) -> APIRouter:
    """The routes under /v1/rollouts."""
    routes = APIRouter(prefix="/v1/rollouts")
    _add_routes(routes, db, table, starter)
    _add_steering_routes(routes, db, steering)
    _add_story_routes(routes, db)
    return routes


def _add_routes(routes: APIRouter, db: Database, table: ServingTable, starter: Starter) -> None:
    @routes.post("", status_code=202)
    async def start(new: NewRollout, by: Deployer) -> Rollout:
        """Bring a version to live traffic. Repeating it returns the rollout that is on its way."""
        together = [(by.ref(each.model), each.version) for each in new.together]
        model = by.ref(new.model)
        started = await starter.start(model, new.version, by.name, new.policy, force=new.force, together=together)
        return rollout_view(started)

    @routes.get("")
    async def list_all(
        by: Reader, model: Name | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100
    ) -> list[Rollout]:
        """The newest rollouts first."""
        async with db.transaction() as tx:
            found = await store.list_rollouts(tx, by.tenant, model and by.ref(model).model, limit, by.models)
        return [rollout_view(each) for each in found]

    @routes.get("/{rollout}")
    async def get(rollout: UUID, by: Reader) -> Rollout:
        """One rollout, how its versions fare, and what the judge says."""
        async with db.transaction() as tx:
            found = await _known(tx, by, rollout)
            recent = await _windows(tx, found, last_s=RECENT_S)
        return rollout_view(found, await table.get(found.model), recent)


def _add_steering_routes(routes: APIRouter, db: Database, steering: Steering) -> None:
    async def known(by: Deployer, rollout: UUID) -> UUID:
        async with db.transaction() as tx:
            return (await _known(tx, by, rollout)).id

    Known = Annotated[UUID, Depends(known)]  # noqa: N806 - a type

    @routes.post("/{rollout}/pause")
    async def pause(rollout: Known, why: Reason, by: Deployer) -> Rollout:
        """Let it grow no further. Harm still takes it back."""
        return rollout_view(await steering.pause(by.tenant, rollout, by.name, why.reason))

    @routes.post("/{rollout}/resume")
    async def resume(rollout: Known, why: Reason, by: Deployer) -> Rollout:
        """Let it go on after a pause, or after it was held."""
        return rollout_view(await steering.resume(by.tenant, rollout, by.name, why.reason))

    @routes.post("/{rollout}/promote")
    async def promote(rollout: Known, why: Reason, by: Deployer) -> Rollout:
        """Let it enter its next stage, or with `full` the last one, whatever the judge says."""
        return rollout_view(await steering.promote(by.tenant, rollout, by.name, why.reason, full=why.full))

    @routes.post("/{rollout}/approve")
    async def approve(rollout: Known, why: Reason, by: Deployer) -> Rollout:
        """Approve the stage it waits to enter."""
        return rollout_view(await steering.approve(by.tenant, rollout, by.name, why.reason))

    @routes.post("/{rollout}/abort")
    async def abort(rollout: Known, why: Reason, by: Deployer) -> Rollout:
        """Take its traffic back."""
        return rollout_view(await steering.abort(by.tenant, rollout, by.name, why.reason))

    @routes.post("/{rollout}/retry", status_code=202)
    async def retry(rollout: Known, why: Reason, by: Deployer) -> Rollout:
        """Start a new rollout of the same version by the same policy, once its cool-down is over."""
        return rollout_view(await steering.retry(by.tenant, rollout, by.name))


def _add_story_routes(routes: APIRouter, db: Database) -> None:
    @routes.get("/{rollout}/decisions")
    async def decisions(rollout: UUID, by: Reader) -> list[Decision]:
        """What was decided, by the judge and by persons, with the numbers."""
        async with db.transaction() as tx:
            found = await _known(tx, by, rollout)
            return await store.list_decisions(tx, found.id)

    @routes.get("/{rollout}/windows")
    async def windows(rollout: UUID, by: Reader) -> list[WindowPoint]:
        """The seconds that it was judged by, and those before, from which it took its baseline."""
        async with db.transaction() as tx:
            found = await _known(tx, by, rollout)
            return window_points(await _windows(tx, found))

    @routes.post("/{rollout}/replay")
    async def replay(rollout: UUID, policy: Policy, by: Reader) -> Replay:
        """What its windows would have come to under another policy. The shares were what they were."""
        async with db.transaction() as tx:
            found = await _known(tx, by, rollout)
            seen = await _windows(tx, found)
        started = int(found.started_at.timestamp())
        steps = replayed(seen, found.version, found.stable, policy, started)
        return replay_view(steps, sum(each.second >= started for each in seen))


async def _known(tx: Tx, by: Caller, rollout: UUID) -> domain.Rollout:
    """The rollout. Raises NotFound for one of a model that the caller does not see, as if it did not exist."""
    found = await store.get_rollout(tx, by.tenant, rollout)
    if not by.sees(found.model.model):
        raise NotFound(f"no rollout {rollout}")
    return found


async def _windows(tx: Tx, rollout: domain.Rollout, *, last_s: int | None = None) -> list[WindowClosed]:
    """The windows of the rollout's time and of its baseline; or of its last seconds, as far as there are any."""
    last = int(rollout.finished_at.timestamp()) if rollout.finished_at else None
    if last_s is None:
        return await store_facts.list_windows(tx, rollout.model, int(rollout.started_at.timestamp()) - BASELINE_S, last)
    newest = last or await store_facts.newest_window(tx, rollout.model)
    return await store_facts.list_windows(tx, rollout.model, newest - last_s + 1, last)
