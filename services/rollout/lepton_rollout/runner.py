"""Takes every open rollout step by step to its end: what is to be done stands in the table, so a restart resumes it."""

import asyncio
from collections.abc import Callable
from datetime import datetime
from uuid import UUID

import structlog
from lepton_common.db import Database
from lepton_common.errors import LeptonError
from prometheus_client import CollectorRegistry, Counter

from lepton_rollout import store
from lepton_rollout.domain import Rollout
from lepton_rollout.story import events, notes
from lepton_rollout.walker import LEASE_S, Walker
from lepton_rollout.workers import Workers

_LOOK_AGAIN_S = 0.5

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Runner:
    """Any number of these may run: a rollout is one runner's at a time. `workers.changed` makes it look at once."""

    def __init__(
        self,
        db: Database,
        walker: Walker,
        workers: Workers,
        holder: UUID,
        now: Callable[[], datetime],
        metrics: CollectorRegistry,
    ) -> None:
        self._db = db
        self._walker = walker
        self._workers = workers
        self._holder = holder
        self._now = now
        self._walks: dict[UUID, asyncio.Task[None]] = {}
        self._finished = Counter(
            "lepton_rollout_finished", "Rollouts that ended here, by how.", ["outcome"], registry=metrics
        )

    async def run(self) -> None:
        """For ever. Needs PostgreSQL and etcd to get on, and waits for them when they are away; never Kafka."""
        await self._workers.mirror.synced()
        while True:
            seen = self._workers.changed.count
            await self.look(_LOOK_AGAIN_S)
            await self._workers.changed.wait(seen, _LOOK_AGAIN_S)

    async def close(self) -> None:
        """Nothing is walked any more. What was on its way goes on from the table."""
        for walk in self._walks.values():
            walk.cancel()
        await asyncio.gather(*self._walks.values(), return_exceptions=True)
        self._walks.clear()

    async def look(self, patience_s: float | None = None) -> None:
        """Every open rollout that is not another runner's is as far as it can get now, or has been on its way for
        `patience_s` seconds and goes on: one that waits for the mesh keeps no other waiting.

        One that fails for a reason unforeseen stops no other; it is raised once all have had their turn.
        """
        async with self._db.transaction() as tx:
            found = await store.list_open_rollouts(tx)
        begun = {each: asyncio.create_task(self._advance(each)) for each in found if each not in self._walks}
        self._walks.update(begun)
        if begun:
            await asyncio.wait(begun.values(), timeout=patience_s)
        ended = {rollout: walk for rollout, walk in self._walks.items() if walk.done()}
        for rollout in ended:
            del self._walks[rollout]
        failures = [error for walk in ended.values() if (error := _failure(walk))]
        if failures:
            raise ExceptionGroup("rollouts failed", failures)

    async def _advance(self, rollout_id: UUID) -> None:
        try:
            while True:
                async with self._db.transaction() as tx:
                    rollout = await store.claim_rollout(tx, rollout_id, self._holder, LEASE_S)
                if rollout is None:
                    return None
                after = await self._walker.step(rollout)
                if after == rollout:
                    return await self._release(rollout)
                await self._save(rollout, after)
        except LeptonError as error:
            # Taken up again at the next look: PostgreSQL, etcd or the mesh are away, or someone else was faster.
            _log.warning("rollout held up", rollout=str(rollout_id), reason=error.message)

    async def _release(self, rollout: Rollout) -> None:
        """It has to wait for workers; whoever looks next may take it, so that a restart costs no time."""
        async with self._db.transaction() as tx:
            await store.release_rollout(tx, rollout.id, self._holder)

    async def _save(self, before: Rollout, after: Rollout) -> None:
        now = self._now()
        async with self._db.transaction() as tx:
            await store.save_rollout(tx, before, after, self._holder)
            for note in notes(before, after):
                await store.add_decision(tx, after, now, note.action, note.reason, verdict=note.verdict)
            for event in events(before, after, now):
                await tx.emit(event)
        if (before.state, before.walk.stage) == (after.state, after.walk.stage):
            return
        if after.finished_at is not None:
            self._finished.labels(after.state).inc()
        self._workers.changed.send()
        _log.info(
            "rollout moved", rollout=str(after.id), model=str(after.model), state=after.state, reason=after.reason
        )


def _failure(walk: asyncio.Task[None]) -> Exception | None:
    """What a walk failed with. Nobody cancels one of them alone, so then a library did, and it counts as a failure."""
    if walk.cancelled():
        return RuntimeError("cancelled from inside")
    error = walk.exception()
    return error if isinstance(error, Exception) else None
