"""What a caller may ask of what is served. Each command is done when it returns, or says what stands in its way."""

from collections.abc import Callable
from datetime import datetime, timedelta

import stamina
from lepton.policies import OnNewer
from lepton_common.db import Database
from lepton_common.errors import Conflict, DeadlineExceeded, NotFound
from lepton_common.records import Assigned, Cache, Limits, Serving
from lepton_common.types import ModelRef

from lepton_rollout import store, store_facts
from lepton_rollout.domain import Rollout, State
from lepton_rollout.loading import Loading, judge_loading
from lepton_rollout.orders import aborted
from lepton_rollout.record import abandoned, caching, cooled, limited, returned, unrouted, warmed, withdrawn
from lepton_rollout.serving import Change, Raced, ServingTable
from lepton_rollout.starting import IMMEDIATE, Starter
from lepton_rollout.workers import Workers

# Long enough for a rollout that shifts or gives up to finish, short enough for a caller in a hurry.
_FINISH_S = 5.0
_LOOK_AGAIN_S = 1.0
_RETURN = IMMEDIATE.model_copy(update={"on_newer": OnNewer.SUPERSEDE})
_AGAIN = stamina.retry(on=Raced, attempts=5, wait_initial=0.01, wait_max=0.1)


class Commands:
    """The commands. The runner does what they ask for."""

    def __init__(
        self,
        db: Database,
        table: ServingTable,
        workers: Workers,
        starter: Starter,
        load_timeout_s: float,
        now: Callable[[], datetime],
    ) -> None:
        self._db = db
        self._table = table
        self._workers = workers
        self._starter = starter
        self._load_timeout_s = load_timeout_s
        self._now = now

    async def roll_back(self, model: ModelRef, actor: str) -> Rollout:
        """All traffic goes back: to the stable version when a rollout has moved some of it, which gives up; else a new
        rollout brings it to the previous version, which is warm, and every other one gives way.

        Raises NotFound, and Conflict when there is no previous version.
        """
        async with self._db.transaction() as tx:
            open_one = await store.find_open_rollout(tx, model)
            if open_one and open_one.walk.begun and open_one.outcome is None and not open_one.is_through:
                after = aborted(open_one, f"rolled back by {actor}")
                await store.save_rollout(tx, open_one, after)
                await store.add_decision(tx, after, self._now(), "abort", after.reason, actor, open_one.walk.verdict)
        if open_one and open_one.walk.begun and not open_one.is_through:
            self._workers.changed.send()
            return after if open_one.outcome is None else open_one
        previous = returned(await self._table.get(model))
        return await self._starter.start(model, previous, actor, _RETURN, force=True, back=True)

    async def load(self, model: ModelRef, version: int | None, actor: str) -> Serving:
        """The version is warm, or without one the model serves: its stable version, else its newest.

        Raises NotFound, Conflict with the workers' reason when they cannot load it, DeadlineExceeded.
        """
        if version is not None:
            async with self._db.transaction() as tx:
                assigned = await store_facts.get_version(tx, model, version)
            return await self._warm(model, assigned)
        stable = (await self._table.get(model)).stable
        if stable is None:
            async with self._db.transaction() as tx:
                stable = (await store_facts.get_newest_version(tx, model)).version
        rollout = await self._ended(
            await self._starter.start(model, stable, actor, IMMEDIATE, force=True), self._load_timeout_s + _FINISH_S
        )
        if rollout.state is not State.PROMOTED:
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

    async def cache(self, model: ModelRef, cache: Cache | None) -> Serving:
        """The gateways keep the model's answers so, or with None no more. Raises NotFound."""
        return await self._record(model, lambda serving: caching(serving, cache))

    async def limit(self, model: ModelRef, limits: Limits) -> Serving:
        """The model has these limits, in the mesh too, where its timeout is. Raises NotFound and Invalid, and as
        Mesh.apply: then the record is written already, the gateways obey it, and `reapply` catches up."""
        return await self._settle(model, lambda serving: limited(serving, limits))

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
