"""What a caller may ask of rollout. Each command is done when it returns, or says what stands in its way."""

from collections.abc import Callable
from datetime import datetime, timedelta
from uuid import UUID, uuid4

import stamina
from lepton_common.db import Database, Tx
from lepton_common.errors import Conflict, DeadlineExceeded, NotFound
from lepton_common.events import RolloutStarted
from lepton_common.records import Assigned, Serving
from lepton_common.types import ModelRef

from lepton_rollout import store
from lepton_rollout.domain import (
    Loading,
    Rollout,
    State,
    abandoned,
    cooled,
    judge_loading,
    returned,
    unrouted,
    warmed,
    withdrawn,
)
from lepton_rollout.serving import Change, Raced, ServingTable
from lepton_rollout.workers import Workers

IMMEDIATE = "immediate"
# Long enough for a rollout that shifts or gives up to finish, short enough for a caller in a hurry.
_FINISH_S = 5.0
_LOOK_AGAIN_S = 1.0
_AGAIN = stamina.retry(on=Raced, attempts=5, wait_initial=0.01, wait_max=0.1)


async def start_rollout(tx: Tx, rollout: Rollout) -> Rollout:
    """The rollout is open; or the one that already brings the same version is returned.

    Raises Conflict, naming it, while another version of the model is on its way.
    """
    while not await store.add_rollout(tx, rollout):
        open_one = await store.find_open_rollout(tx, rollout.model)
        if open_one is None:
            continue  # It ended between the two statements.
        if open_one.version == rollout.version and open_one.state is not State.FAILING:
            return open_one
        raise Conflict(
            f"model {rollout.model.model!r} is on its way to version {open_one.version}:"
            f" rollout {open_one.id} is {open_one.state}"
        )
    await tx.emit(
        RolloutStarted(
            tenant=rollout.model.tenant,
            model=rollout.model.model,
            rollout=rollout.id,
            version=rollout.version,
            strategy=rollout.strategy,
            actor=rollout.actor,
        )
    )
    return rollout


def new_rollout(
    rollout_id: UUID, model: ModelRef, assigned: Assigned, actor: str, now: datetime, load_timeout_s: float
) -> Rollout:
    """An immediate rollout that has that long to get its version onto the workers."""
    load_by = now + timedelta(seconds=load_timeout_s)
    return Rollout(rollout_id, model, assigned, IMMEDIATE, actor, started_at=now, load_by=load_by)


class Commands:
    """The commands. The runner does what they ask for."""

    def __init__(
        self, db: Database, table: ServingTable, workers: Workers, load_timeout_s: float, now: Callable[[], datetime]
    ) -> None:
        self._db = db
        self._table = table
        self._workers = workers
        self._load_timeout_s = load_timeout_s
        self._now = now

    async def deploy(self, model: ModelRef, version: int, actor: str) -> Rollout:
        """A rollout brings the version to all of the model's traffic. Raises NotFound, Conflict as `start_rollout`."""
        async with self._db.transaction() as tx:
            assigned = await store.get_version(tx, model, version)
            rollout = await start_rollout(tx, self._rollout(model, assigned, actor))
        self._workers.changed.send()
        return rollout

    async def roll_back(self, model: ModelRef, actor: str) -> Rollout:
        """A rollout brings all traffic back to the previous version, which is warm.

        A rollout that is still loading gives way. Raises NotFound, and Conflict when there is no previous version.
        """
        returned(await self._table.get(model))  # Nothing gives way to a rollback that cannot be.
        await self._supersede(model, f"superseded by a rollback ({actor})")
        return await self.deploy(model, returned(await self._table.get(model)), actor)

    async def load(self, model: ModelRef, version: int | None, actor: str) -> Serving:
        """The version is warm, or without one the model serves: its stable version, else its newest.

        Raises NotFound, Conflict with the workers' reason when they cannot load it, DeadlineExceeded.
        """
        if version is not None:
            async with self._db.transaction() as tx:
                assigned = await store.get_version(tx, model, version)
            return await self._warm(model, assigned)
        stable = (await self._table.get(model)).stable
        if stable is None:
            async with self._db.transaction() as tx:
                stable = (await store.get_newest_version(tx, model)).version
        rollout = await self._ended(await self.deploy(model, stable, actor), self._load_timeout_s + _FINISH_S)
        if rollout.state is State.FAILED:
            raise Conflict(f"version {rollout.version} of model {model.model!r} was not loaded: {rollout.reason}")
        return await self._table.get(model)

    async def unload(self, model: ModelRef, version: int | None) -> Serving:
        """The warm version is let go, or without one the whole model.

        Raises NotFound, and Conflict when the version takes traffic or a rollout of the model is open.
        """
        if version is not None:
            return await self._settle(model, lambda serving: cooled(serving, version))
        async with self._db.transaction() as tx:
            open_one = await store.find_open_rollout(tx, model)
        if open_one is not None:
            raise Conflict(f"rollout {open_one.id} of model {model.model!r} is still {open_one.state}")
        if (await self._table.get(model)).generation == 0:
            raise NotFound(f"model {model.model!r} is not served")
        await self._settle(model, unrouted)
        return await self._settle(model, withdrawn)

    async def _warm(self, model: ModelRef, assigned: Assigned) -> Serving:
        await self._record(model, lambda serving: warmed(serving, assigned))
        load_by = self._now() + timedelta(seconds=self._load_timeout_s)
        while True:
            seen = self._workers.changed.count
            late = self._now() > load_by
            verdict, reason = judge_loading(model, assigned, self._workers.states(), late=late)
            if verdict is Loading.READY:
                return await self._settle(model, lambda serving: warmed(serving, assigned))
            if verdict is Loading.FAILED:
                await self._settle(model, lambda serving: abandoned(serving, assigned.version))
                raise Conflict(f"version {assigned.version} of model {model.model!r} was not loaded: {reason}")
            await self._workers.changed.wait(seen, _LOOK_AGAIN_S)

    async def _supersede(self, model: ModelRef, reason: str) -> None:
        """No rollout of the model is open. One that shifts already runs to its end first."""
        async with self._db.transaction() as tx:
            open_one = await store.find_open_rollout(tx, model)
            if open_one is not None:
                await store.supersede_rollout(tx, open_one.id, reason)
        if open_one is not None:
            self._workers.changed.send()
            await self._ended(open_one, _FINISH_S)

    async def _ended(self, rollout: Rollout, timeout_s: float) -> Rollout:
        """The rollout at its end. Raises DeadlineExceeded when it is not there in time."""
        give_up_at = self._now() + timedelta(seconds=timeout_s)
        while True:
            seen = self._workers.changed.count
            async with self._db.transaction() as tx:
                rollout = await store.get_rollout(tx, rollout.model.tenant, rollout.id)
            if rollout.finished_at is not None:
                return rollout
            if self._now() > give_up_at:
                raise DeadlineExceeded(f"rollout {rollout.id} is still {rollout.state} after {timeout_s:g} s")
            await self._workers.changed.wait(seen, _LOOK_AGAIN_S)

    @_AGAIN
    async def _record(self, model: ModelRef, change: Change) -> Serving:
        return await self._table.record(model, change)

    @_AGAIN
    async def _settle(self, model: ModelRef, change: Change) -> Serving:
        return await self._table.settle(model, change)

    def _rollout(self, model: ModelRef, assigned: Assigned, actor: str) -> Rollout:
        return new_rollout(uuid4(), model, assigned, actor, self._now(), self._load_timeout_s)
