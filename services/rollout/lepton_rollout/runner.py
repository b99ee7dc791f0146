"""Takes every open rollout step by step to its end: what is to be done stands in the table, so a restart resumes it."""

import asyncio
from collections.abc import Callable
from datetime import datetime
from uuid import UUID

import structlog
from lepton_common.db import Database
from lepton_common.errors import LeptonError
from lepton_common.events import RolloutEvent, RolloutFinished, TrafficShifted
from prometheus_client import CollectorRegistry, Counter

from lepton_rollout import store
from lepton_rollout.domain import (
    Loading,
    Rollout,
    State,
    abandoned,
    failing,
    finished,
    judge_loading,
    promoted,
    shifting,
    told,
    warmed,
)
from lepton_rollout.serving import ServingTable
from lepton_rollout.workers import Workers

# How long a rollout waits when its runner dies in the middle of a step. A step reads the record right after its claim
# and writes only over what it read, so a runner that wakes after its claim ran out cannot undo its successor's work.
LEASE_S = 10.0
_LOOK_AGAIN_S = 0.5

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Runner:
    """Any number of these may run: a rollout is one runner's at a time. `workers.changed` makes it look at once."""

    def __init__(
        self,
        db: Database,
        table: ServingTable,
        workers: Workers,
        holder: UUID,
        now: Callable[[], datetime],
        metrics: CollectorRegistry,
    ) -> None:
        self._db = db
        self._table = table
        self._workers = workers
        self._holder = holder
        self._now = now
        self._finished = Counter(
            "lepton_rollout_finished", "Rollouts that ended here, by how.", ["outcome"], registry=metrics
        )
        self._steps = {State.LOADING: self._load, State.SHIFTING: self._shift, State.FAILING: self._give_up}

    async def run(self) -> None:
        """For ever. Needs PostgreSQL and etcd to get on, and waits for them when they are away; never Kafka."""
        await self._workers.mirror.synced()
        while True:
            seen = self._workers.changed.count
            await self.look()
            await self._workers.changed.wait(seen, _LOOK_AGAIN_S)

    async def look(self) -> None:
        """Every open rollout that is not another runner's is as far as it can get now.

        One that fails for a reason unforeseen stops no other; it is raised once all have had their turn.
        """
        async with self._db.transaction() as tx:
            found = await store.list_open_rollouts(tx)
        outcomes = await asyncio.gather(*map(self._advance, found), return_exceptions=True)
        if failures := [outcome for outcome in outcomes if isinstance(outcome, Exception)]:
            raise ExceptionGroup("rollouts failed", failures)

    async def _advance(self, rollout_id: UUID) -> None:
        try:
            while True:
                async with self._db.transaction() as tx:
                    rollout = await store.claim_rollout(tx, rollout_id, self._holder, LEASE_S)
                if rollout is None:
                    return None
                after = await self._step(rollout)
                if after == rollout:
                    return await self._release(rollout)
                await self._save(rollout, after)
        except LeptonError as error:
            # Taken up again at the next look: PostgreSQL, etcd or the mesh are away, or someone else was faster.
            _log.warning("rollout held up", rollout=str(rollout_id), reason=error.message)

    async def _step(self, rollout: Rollout) -> Rollout:
        """The rollout after its state's work; itself while that must wait."""
        try:
            return await self._steps[rollout.state](rollout)
        except LeptonError as error:
            if error.retryable or rollout.state is State.FAILING:
                raise
            return failing(rollout, error.message)

    async def _load(self, rollout: Rollout) -> Rollout:
        before, now = await self._table.get(rollout.model), self._now()
        if await self._table.record(rollout.model, lambda serving: warmed(serving, rollout.assigned)) != before:
            rollout = told(rollout, now)
        late = now > rollout.load_by
        verdict, reason = judge_loading(rollout.model, rollout.assigned, self._workers.states(), late=late)
        if verdict is Loading.WAIT:
            return rollout
        return shifting(rollout, reason) if verdict is Loading.READY else failing(rollout, reason)

    async def _shift(self, rollout: Rollout) -> Rollout:
        serving = await self._table.shift(rollout.model, lambda serving: promoted(serving, rollout.version))
        return finished(rollout, serving, self._now())

    async def _give_up(self, rollout: Rollout) -> Rollout:
        serving = await self._table.settle(rollout.model, lambda serving: abandoned(serving, rollout.version))
        return finished(rollout, serving, self._now())

    async def _release(self, rollout: Rollout) -> None:
        """It has to wait for workers; whoever looks next may take it, so that a restart costs no time."""
        async with self._db.transaction() as tx:
            await store.release_rollout(tx, rollout.id, self._holder)

    async def _save(self, before: Rollout, after: Rollout) -> None:
        async with self._db.transaction() as tx:
            await store.save_rollout(tx, before, after, self._holder)
            for event in _events(after):
                await tx.emit(event)
        if after.finished_at is not None:
            self._finished.labels(after.state).inc()
        self._workers.changed.send()
        _log.info(
            "rollout moved", rollout=str(after.id), model=str(after.model), state=after.state, reason=after.reason
        )


def _events(rollout: Rollout) -> list[RolloutEvent]:
    """What there is to tell of a rollout that has just come into its state."""
    if rollout.finished_at is None:
        return []
    about = {
        "tenant": rollout.model.tenant,
        "model": rollout.model.model,
        "rollout": rollout.id,
        "version": rollout.version,
        "reason": rollout.reason,
        "at": rollout.finished_at,
    }
    told = RolloutFinished.model_validate({**about, "outcome": rollout.state, "previous": rollout.previous})
    if rollout.state is State.PROMOTED:
        return [TrafficShifted.model_validate({**about, "percent": rollout.percent}), told]
    return [told]
