"""One step of one rollout: what its state asks for is done in the world, and what it becomes by that is returned."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from uuid import UUID

from lepton.policies import FreezeWindow, Strategy
from lepton.rollouts import Action
from lepton_common.db import Database
from lepton_common.errors import LeptonError
from lepton_common.records import LoadState, Serving

from lepton_rollout import store, store_facts
from lepton_rollout.domain import (
    SILENT_S,
    Rollout,
    State,
    advised,
    again,
    applied,
    failing,
    finished,
    harmed,
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
from lepton_rollout.record import abandoned, moved, promoted, settled, staged, unserved, warmed
from lepton_rollout.serving import Fence, Raced, ServingTable
from lepton_rollout.workers import Workers

# How long a rollout waits when its runner dies in the middle of a step. Before a step touches the world its claim is
# made sure of and renewed, and what it writes is written only over what it read: a runner that was frozen, and wakes
# after its claim ran out, undoes nothing of its successor's.
LEASE_S = 10.0
_GIVEN_UP = frozenset({State.FAILING, State.ROLLED_BACK, State.ABORTED, State.FAILED})


class Walker:
    """Every step may be repeated: after a crash between a write to the mesh and the note of it, it is."""

    def __init__(
        self, db: Database, table: ServingTable, workers: Workers, holder: UUID, now: Callable[[], datetime]
    ) -> None:
        """`holder` is who claims the rollouts that are walked."""
        self._db = db
        self._table = table
        self._workers = workers
        self._holder = holder
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
        # A stable version that no worker holds, after an unload, protects nobody and is no measure.
        held_stable = before.stable is not None and before.assigned(before.stable) is not None
        rollout = replace(rollout, stable=before.stable if held_stable else None)
        fence = self._fence(rollout)
        if await self._table.record(rollout.model, lambda serving: warmed(serving, rollout.assigned), fence) != before:
            rollout = told(rollout, now)
        late = now > rollout.load_by
        verdict, reason = judge_loading(rollout.model, rollout.assigned, self._workers.states(), late=late)
        if verdict is Loading.FAILED:
            return failing(rollout, reason)
        if rollout.walk.paused:
            return rollout
        if verdict is Loading.WAIT:
            return waiting(rollout, reason)
        if obstacle := self._obstacle(rollout):
            # It was ready in time: should its workers restart while it waits, they get that time again.
            return waiting(told(rollout, now) if now > rollout.load_by else rollout, obstacle)
        return shifting(rollout, reason)

    # --- shifting -------------------------------------------------------------------------------------------------

    async def _walk(self, rollout: Rollout) -> Rollout:
        serving = await self._table.get(rollout.model)
        if serving.hand is not None:
            rollout = advised(await self._observed(rollout, self._now())) if rollout.walk.applied else rollout
            return waiting(rollout, "the traffic is moved by hand; what the judge says is advice")
        if rollout.is_through:
            return await self._promote(rollout)
        if not rollout.walk.applied:
            grows = rollout.stage.percent > rollout.walk.percent
            return rollout if grows and rollout.walk.paused else await self._enter(rollout)
        if self._staged(rollout, serving) != serving:
            return again(rollout)  # Somebody, or a restored etcd, has it otherwise.
        if self._is_gone(rollout):
            return harmed(rollout, f"no worker of pool {rollout.assigned.pool!r} has the version any more")
        now = self._now()  # One for both, else what is new enough to be judged could be too old to act on.
        return await self._acted(await self._observed(rollout, now), now)

    async def _enter(self, rollout: Rollout) -> Rollout:
        """The mesh has acknowledged the stage that the rollout means to be in."""
        if rollout.stage.kind is Kind.ALL and not rollout.stage.dwell_s:
            return stepped(rollout, rollout.reason)
        before = baseline(await self._recent(rollout))
        await self._table.shift(
            rollout.model, lambda serving: self._staged(rollout, _untaken(serving)), self._fence(rollout)
        )
        return applied(rollout, self._now(), before)

    def _staged(self, rollout: Rollout, serving: Serving) -> Serving:
        """The record of the stage that the rollout is in, or means to be."""
        at_home = moved(serving, rollout.home) if rollout.stage.kind is Kind.ALL else serving
        return staged(at_home, rollout.version, rollout.stage, rollout.policy, str(rollout.id))

    async def _home(self, rollout: Rollout) -> Loading:
        """Whether the pool that is to serve it for good has the version, which is asked to load it."""
        if rollout.home.pool == rollout.assigned.pool:
            return Loading.READY
        fence = self._fence(rollout)
        await self._table.record(rollout.model, lambda serving: warmed(serving, rollout.home), fence)
        verdict, reason = judge_loading(rollout.model, rollout.home, self._workers.states(), late=False)
        if verdict is Loading.FAILED:
            raise _NotHome(reason)
        return verdict

    async def _promote(self, rollout: Rollout) -> Rollout:
        serving = await self._table.shift(
            rollout.model,
            lambda serving: promoted(moved(_untaken(serving), rollout.home), rollout.version),
            self._fence(rollout),
        )
        return finished(rollout, serving, self._now())

    async def _observed(self, rollout: Rollout, now: datetime) -> Rollout:
        """The windows that came in are judged, up to the first that decides something."""
        async with self._db.transaction() as tx:
            found = await store_facts.list_windows(tx, rollout.model, rollout.walk.judged + 1)
        after = observed(rollout, found, now.timestamp())
        if after.walk.evidence.baseline.p95 is None and after.walk.judged > rollout.walk.judged:
            known = learned(after.walk.evidence, await self._recent(rollout))
            after = replace(after, walk=replace(after.walk, evidence=known))
        return after

    async def _acted(self, rollout: Rollout, now: datetime) -> Rollout:
        """What follows from the verdict on this stage, or from there being none."""
        walk = rollout.walk
        verdict = walk.verdict
        if rollout.stage.kind is Kind.SPLIT and not rollout.stage.percent:
            is_over = walk.entered_at is not None and (now - walk.entered_at).total_seconds() >= rollout.stage.dwell_s
            return await self._grown(rollout, "it was ready for its time") if is_over else rollout
        silent_s = now.timestamp() - max(walk.judged, walk.second)
        # What was well hours ago, before a freeze or an outage, is no reason to grow now.
        if verdict and verdict.action is Action.STEP and silent_s <= SILENT_S:
            return await self._grown(rollout, verdict.reason)
        if verdict and verdict.action is not Action.STEP:
            rollout = judged(rollout, verdict)
        if rollout.state is State.SHIFTING and not rollout.walk.held:
            if is_stalled(rollout, now):
                return held(rollout, f"{rollout.policy.max_step_s:g} s brought no decision: {rollout.walk.waiting_for}")
            if silent_s > SILENT_S and not walk.paused:
                return waiting(rollout, "no traffic is measured")
        return rollout

    async def _grown(self, rollout: Rollout, reason: str) -> Rollout:
        """The next stage is to be entered, unless something stands in its way."""
        if rollout.walk.held or rollout.walk.paused:
            return rollout
        if obstacle := self._obstacle(rollout):
            return waiting(rollout, obstacle)
        following = rollout.following
        if following and following.kind is Kind.ALL and await self._home(rollout) is not Loading.READY:
            return waiting(rollout, f"pool {rollout.home.pool!r} is loading the version")
        if rollout.policy.strategy is Strategy.AB and rollout.following is None:
            return failing(rollout, "the A/B test has run its time", State.ABORTED)
        if rollout.group is not None:
            rollout = ready(rollout)
            if behind := laggard(rollout, await self._others(rollout)):
                return waiting(rollout, f"model {behind.model.model!r} of its group is not as far")
        return stepped(rollout, reason)

    def _obstacle(self, rollout: Rollout) -> str:
        """What the policy puts in the way of the next stage; empty when nothing."""
        if freeze := frozen(rollout.policy, self._now()):
            return _frozen(freeze)
        return _approval(rollout) if rollout.lacks_approval else ""

    # --- giving up ------------------------------------------------------------------------------------------------

    async def _give_up(self, rollout: Rollout) -> Rollout:
        """First the traffic is back, and then no worker is told to let the version go."""
        fence = self._fence(rollout)
        if rollout.walk.begun:
            await self._table.shift(rollout.model, settled, fence)
        serving = await self._table.settle(rollout.model, lambda serving: abandoned(serving, rollout.version), fence)
        return finished(rollout, serving, self._now())

    async def _failed_group(self, rollout: Rollout) -> Rollout | None:
        """The rollout giving up because another member of its group did."""
        if rollout.group is None or rollout.state is State.FAILING or rollout.is_through:
            return None
        gone = next((each for each in await self._others(rollout) if each.state in _GIVEN_UP), None)
        if gone is None:
            return None
        after = failing(rollout, f"model {gone.model.model!r} of its group gave up: {gone.reason}", State.ABORTED)
        # One that never began has nothing to take back.
        return finished(after, unserved(rollout.model), self._now()) if rollout.state is State.QUEUED else after

    async def _others(self, rollout: Rollout) -> list[Rollout]:
        assert rollout.group is not None
        async with self._db.transaction() as tx:
            return [each for each in await store.list_group(tx, rollout.group) if each.id != rollout.id]

    def _fence(self, rollout: Rollout) -> Fence:
        """Raises Raced unless the rollout is still this runner's, and as the step found it."""

        async def check() -> None:
            async with self._db.transaction() as tx:
                if not await store.renew_claim(tx, rollout, self._holder, LEASE_S):
                    raise Raced(f"rollout {rollout.id} was changed or taken over meanwhile")

        return check

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
        known = {
            (each.version, each.state)
            for worker in self._workers.states()
            for each in worker.versions
            if (each.tenant, each.model) == (rollout.model.tenant, rollout.model.model) and not worker.draining
        }
        coming = (LoadState.READY, LoadState.LOADING)
        has_stable = (rollout.stable, LoadState.READY) in known
        return has_stable and not any((rollout.version, state) in known for state in coming)


def _untaken(serving: Serving) -> Serving:
    """The record itself. Raises Raced when a person has taken the traffic over meanwhile."""
    if serving.hand is not None:
        raise Raced(f"the traffic of model {serving.model!r} was taken over by hand meanwhile")
    return serving


class _NotHome(LeptonError):
    """The pool that is to serve the version for good cannot."""


def _frozen(freeze: FreezeWindow) -> str:
    why = f": {freeze.reason}" if freeze.reason else ""
    return f"frozen until {freeze.end:%H:%M} {freeze.timezone}{why}"


def _approval(rollout: Rollout) -> str:
    assert rollout.following is not None
    return f"approval of {rollout.following.percent:g} %: lepton rollout approve {rollout.id} --reason …"
