"""One step of one rollout: what its state asks for is done in the world, and what it becomes by that is returned."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from lepton.policies import FreezeWindow, Strategy
from lepton.rollouts import Action
from lepton_common.db import Database
from lepton_common.errors import LeptonError
from lepton_common.records import LoadState, Serving

from lepton_rollout import store, store_facts
from lepton_rollout.domain import (
    Rollout,
    State,
    applied,
    failing,
    finished,
    held,
    is_stalled,
    judged,
    laggard,
    loading,
    observed,
    ready,
    shifting,
    stepped,
    told,
    waiting,
)
from lepton_rollout.judge import BASELINE_S, Observation, baseline, learned, observation
from lepton_rollout.loading import Loading, judge_loading
from lepton_rollout.policy import Kind, frozen
from lepton_rollout.record import abandoned, moved, promoted, settled, staged, warmed
from lepton_rollout.serving import ServingTable
from lepton_rollout.workers import Workers

# Without a window for so long, the rollout says that it sees no traffic.
_SILENT_S = 10.0
_GIVEN_UP = frozenset({State.FAILING, State.ROLLED_BACK, State.ABORTED, State.FAILED})


class Walker:
    """Every step may be repeated: after a crash between a write to the mesh and the note of it, it is."""

    def __init__(self, db: Database, table: ServingTable, workers: Workers, now: Callable[[], datetime]) -> None:
        self._db = db
        self._table = table
        self._workers = workers
        self._now = now
        self._steps = {
            State.QUEUED: self._take_turn,
            State.LOADING: self._load,
            State.SHIFTING: self._walk,
            State.FAILING: self._give_up,
        }

    async def step(self, rollout: Rollout) -> Rollout:
        """The rollout after its state's work; itself while that must wait. What cannot succeed makes it give up."""
        try:
            return await self._failed_group(rollout) or await self._steps[rollout.state](rollout)
        except LeptonError as error:
            if error.retryable or rollout.state is State.FAILING:
                raise
            return failing(rollout, error.message, State.ROLLED_BACK if rollout.walk.percent else State.FAILED)

    async def _take_turn(self, rollout: Rollout) -> Rollout:
        async with self._db.transaction() as tx:
            if await store.find_open_rollout(tx, rollout.model) is not None:
                return rollout
            first = (await store.list_queued_rollouts(tx, rollout.model))[0]
        return loading(rollout, self._now()) if first.id == rollout.id else rollout

    async def _load(self, rollout: Rollout) -> Rollout:
        before, now = await self._table.get(rollout.model), self._now()
        rollout = replace(rollout, stable=before.stable)
        if await self._table.record(rollout.model, lambda serving: warmed(serving, rollout.assigned)) != before:
            rollout = told(rollout, before, now)
        late = now > rollout.load_by
        verdict, reason = judge_loading(rollout.model, rollout.assigned, self._workers.states(), late=late)
        if verdict is Loading.FAILED:
            return failing(rollout, reason)
        if verdict is Loading.WAIT:
            return rollout
        if rollout.walk.paused:
            return rollout
        if freeze := frozen(rollout.policy, now):
            return waiting(rollout, _frozen(freeze))
        if rollout.lacks_approval:
            return waiting(rollout, _approval(rollout))
        return shifting(rollout, reason)

    # --- shifting -------------------------------------------------------------------------------------------------

    async def _walk(self, rollout: Rollout) -> Rollout:
        if rollout.is_through:
            return await self._promote(rollout)
        by_hand = (await self._table.get(rollout.model)).hand is not None
        if not rollout.walk.applied:
            return waiting(rollout, "the traffic is moved by hand") if by_hand else await self._enter(rollout)
        if not by_hand and self._is_gone(rollout):
            reason = f"no worker of pool {rollout.assigned.pool!r} has the version any more"
            return failing(rollout, reason, State.ROLLED_BACK)
        rollout = await self._observed(rollout)
        if by_hand:
            return waiting(rollout, "the traffic is moved by hand; what the judge says is advice")
        return await self._acted(rollout)

    async def _enter(self, rollout: Rollout) -> Rollout:
        """The mesh has acknowledged the stage that the rollout means to be in."""
        stage, whole = rollout.stage, rollout.stage.kind is Kind.ALL
        if whole and not await self._is_home(rollout):
            return waiting(rollout, f"pool {rollout.home.pool!r} is loading the version")
        if whole and not stage.dwell_s:
            return await self._promote(rollout)
        before = baseline(await self._recent(rollout))

        def change(serving: Serving) -> Serving:
            at_home = moved(serving, rollout.home) if whole else serving
            return staged(at_home, rollout.version, stage, rollout.policy, str(rollout.id))

        await self._table.shift(rollout.model, change)
        return applied(rollout, self._now(), before)

    async def _is_home(self, rollout: Rollout) -> bool:
        """Whether the pool that is to serve it for good has the version, which is asked to load it."""
        if rollout.home.pool == rollout.assigned.pool:
            return True
        await self._table.record(rollout.model, lambda serving: warmed(serving, rollout.home))
        verdict, reason = judge_loading(rollout.model, rollout.home, self._workers.states(), late=False)
        if verdict is Loading.FAILED:
            raise _NotHome(reason)
        return verdict is Loading.READY

    async def _promote(self, rollout: Rollout) -> Rollout:
        serving = await self._table.shift(
            rollout.model, lambda serving: promoted(moved(serving, rollout.home), rollout.version)
        )
        return finished(rollout, serving, self._now())

    async def _observed(self, rollout: Rollout) -> Rollout:
        """The windows that came in are judged, up to the first that decides something."""
        async with self._db.transaction() as tx:
            found = await store_facts.list_windows(tx, rollout.model, rollout.walk.judged + 1)
        after = observed(rollout, found, self._now().timestamp())
        if after.walk.evidence.baseline.p95 is None and after.walk.judged > rollout.walk.judged:
            known = learned(after.walk.evidence, await self._recent(rollout))
            after = replace(after, walk=replace(after.walk, evidence=known))
        return after

    async def _acted(self, rollout: Rollout) -> Rollout:
        """What follows from the verdict on this stage, or from there being none."""
        walk, now = rollout.walk, self._now()
        verdict = walk.verdict
        if rollout.stage.kind is Kind.SPLIT and not rollout.stage.percent:
            is_over = walk.entered_at is not None and (now - walk.entered_at).total_seconds() >= rollout.stage.dwell_s
            return await self._grown(rollout, "it was ready for its time") if is_over else rollout
        if verdict and verdict.action is Action.STEP:
            return await self._grown(rollout, verdict.reason)
        if verdict:
            rollout = judged(rollout, verdict)
        silent_s = now.timestamp() - max(walk.judged, walk.second)
        if rollout.state is State.SHIFTING and not rollout.walk.held:
            if is_stalled(rollout, now):
                return held(rollout, f"{rollout.policy.max_step_s:g} s brought no decision: {rollout.walk.waiting_for}")
            if silent_s > _SILENT_S and not walk.paused:
                return waiting(rollout, "no traffic is measured")
        return rollout

    async def _grown(self, rollout: Rollout, reason: str) -> Rollout:
        """The next stage is to be entered, unless something stands in its way."""
        if rollout.walk.held or rollout.walk.paused:
            return rollout
        if freeze := frozen(rollout.policy, self._now()):
            return waiting(rollout, _frozen(freeze))
        if rollout.lacks_approval:
            return waiting(rollout, _approval(rollout))
        if rollout.policy.strategy is Strategy.AB and rollout.following is None:
            return failing(rollout, "the A/B test has run its time", State.ABORTED)
        if rollout.group is not None:
            rollout = ready(rollout)
            if behind := laggard(rollout, await self._others(rollout)):
                return waiting(rollout, f"model {behind.model.model!r} of its group is not as far")
        return stepped(rollout, reason)

    # --- giving up ------------------------------------------------------------------------------------------------

    async def _give_up(self, rollout: Rollout) -> Rollout:
        """First the traffic is back, and then no worker is told to let the version go."""
        if rollout.walk.begun:
            await self._table.shift(rollout.model, settled)
        serving = await self._table.settle(rollout.model, lambda serving: abandoned(serving, rollout.version))
        return finished(rollout, serving, self._now())

    async def _failed_group(self, rollout: Rollout) -> Rollout | None:
        """The rollout giving up because another member of its group did."""
        if rollout.group is None or rollout.state is State.FAILING:
            return None
        gone = next((each for each in await self._others(rollout) if each.state in _GIVEN_UP), None)
        if gone is None:
            return None
        return failing(rollout, f"model {gone.model.model!r} of its group gave up: {gone.reason}", State.ABORTED)

    async def _others(self, rollout: Rollout) -> list[Rollout]:
        assert rollout.group is not None
        async with self._db.transaction() as tx:
            return [each for each in await store.list_group(tx, rollout.group) if each.id != rollout.id]

    # --- what is known --------------------------------------------------------------------------------------------

    async def _recent(self, rollout: Rollout) -> list[Observation]:
        """What the versions have been like of late."""
        async with self._db.transaction() as tx:
            windows = await store_facts.list_windows(
                tx, rollout.model, int(self._now().timestamp()) - BASELINE_S, rollout.walk.judged or None
            )
        return [observation(window, rollout.version, rollout.stable) for window in windows]

    def _is_gone(self, rollout: Rollout) -> bool:
        """Whether no worker has the version although some have the stable: else etcd knows of no worker at all."""
        known = [
            (each.version, worker.pool)
            for worker in self._workers.states()
            for each in worker.versions
            if (each.tenant, each.model) == (rollout.model.tenant, rollout.model.model)
            and each.state is LoadState.READY
            and not worker.draining
        ]
        versions = {version for version, _ in known}
        return rollout.version not in versions and rollout.stable in versions


class _NotHome(LeptonError):
    """The pool that is to serve the version for good cannot."""


def _frozen(freeze: FreezeWindow) -> str:
    why = f": {freeze.reason}" if freeze.reason else ""
    return f"frozen until {freeze.end:%H:%M} {freeze.timezone}{why}"


def _approval(rollout: Rollout) -> str:
    assert rollout.following is not None
    return f"approval of {rollout.following.percent:g} %: lepton rollout approve {rollout.id} --reason …"
