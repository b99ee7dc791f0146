"""How a rollout begins: by which policy, beside which others, and what stands in its way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from uuid import UUID, uuid4

from lepton.policies import PRESETS, OnFailure, OnNewer, Policy, Strategy
from lepton_common.db import Database, Tx
from lepton_common.errors import Conflict, Invalid, Unavailable
from lepton_common.events import RolloutStarted
from lepton_common.records import Assigned
from lepton_common.types import ModelRef

from lepton_rollout import store, store_facts
from lepton_rollout.domain import Rollout, State, finished
from lepton_rollout.orders import aborted
from lepton_rollout.policy import stages
from lepton_rollout.record import unserved
from lepton_rollout.serving import ServingTable
from lepton_rollout.story import events
from lepton_rollout.workers import Workers

IMMEDIATE = PRESETS["immediate"]


class Starter:
    """Starts rollouts. The runner takes them on from there."""

    def __init__(
        self, db: Database, table: ServingTable, workers: Workers, load_timeout_s: float, now: Callable[[], datetime]
    ) -> None:
        self._db = db
        self._table = table
        self._workers = workers
        self._load_timeout_s = load_timeout_s
        self._now = now

    async def start(
        self,
        model: ModelRef,
        version: int,
        actor: str,
        policy: Policy | str | None,
        *,
        force: bool = False,
        back: bool = False,
        together: Sequence[tuple[ModelRef, int]] = (),
    ) -> Rollout:
        """A rollout brings the version to live traffic, with those of `together` in step; or the one that does so
        already is returned.

        Raises NotFound, Invalid for a policy that nobody knows, and Conflict while the traffic is moved by hand (which
        nobody knows while etcd is away), while another version must not be disturbed, when all traffic is to go at once
        to a version that is earning it, and for bytes that were taken back before (see `force`), unless it goes `back`
        to what served before.
        """
        members = ((model, version), *together)
        if len({each for each, _ in members}) < len(members):
            raise Invalid("together: each model of a group takes part with one version")
        await self.check_hands([each for each, _ in members])
        async with self._db.transaction() as tx:
            chosen = await chosen_policy(tx, model, policy)
            wanted = _Wanted(chosen, actor, force=force, back=back, group=uuid4() if together else None)
            # In one order, so that two groups that meet do not wait for each other for ever.
            started = {each: await self._start_one(tx, each, number, wanted) for each, number in sorted(members)}
        self._workers.changed.send()
        return started[model]

    async def check_hands(self, models: Sequence[ModelRef]) -> None:
        """Raises Conflict while a model's traffic is moved by hand, unless etcd is away."""
        for model in models:
            try:
                hand = (await self._table.get(model)).hand
            except Unavailable:
                # Without etcd nobody knows. The rollout is noted down, and would wait for the hand to let go.
                return
            if hand is not None:
                moved = f"the traffic of model {model.model!r} is moved by hand ({hand.by})"
                raise Conflict(f"{moved}: `lepton rollout resume {model.model}` ends that")

    async def _start_one(self, tx: Tx, model: ModelRef, version: int, wanted: "_Wanted") -> Rollout:
        assigned = await store_facts.get_version(tx, model, version)
        if wanted.policy.pool:
            assigned = assigned.model_copy(update={"pool": wanted.policy.pool})
        if not wanted.back:
            await self._check_bytes(tx, model, assigned, force=wanted.force)
        rollout = new_rollout(uuid4(), model, assigned, wanted.actor, self._now(), self._load_timeout_s)
        rollout = replace(rollout, policy=wanted.policy, group=wanted.group)
        return await start_rollout(tx, rollout, force=wanted.force)

    async def _check_bytes(self, tx: Tx, model: ModelRef, assigned: Assigned, *, force: bool) -> None:
        """Raises Conflict for bytes that were worse than the stable, until somebody insists and time has passed."""
        before = await store.find_rolled_back(tx, model, assigned.sha256)
        if before is None or before.finished_at is None:
            return
        told = (
            f"version {before.version} of model {model.model!r} has the same bytes and was taken back"
            f" at {before.finished_at:%Y-%m-%d %H:%M:%S %Z} ({before.reason})"
        )
        ends_at = before.finished_at + timedelta(seconds=before.policy.cool_down_s)
        if self._now() < ends_at:
            cooled = f"{ends_at:%H:%M:%S %Z}, when its cool-down is over"
            raise Conflict(f"{told}: push a better one, or use force (`--force`) after {cooled}")
        if not force:
            raise Conflict(f"{told}: push a better one, or use force (`--force`)")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the rollouts of one call have in common."""

    policy: Policy
    actor: str
    force: bool
    back: bool
    group: UUID | None


async def chosen_policy(tx: Tx, model: ModelRef, wanted: Policy | str | None) -> Policy:
    """The policy given, or the preset of that name, or the model's own, or the default. Raises Invalid."""
    if isinstance(wanted, Policy):
        return wanted
    if wanted is not None:
        if wanted not in PRESETS:
            raise Invalid(f"policy: no preset is called {wanted[:80]!r}; there are {', '.join(PRESETS)}")
        return PRESETS[wanted]
    stored = await store_facts.find_policy(tx, model)
    return stored[0] if stored else Policy()


async def start_rollout(tx: Tx, rollout: Rollout, *, force: bool = False) -> Rollout:
    """The rollout is open, or queued behind another by its policy; or the one that brings the same version is returned,
    unless that one goes step by step and this one would not.

    Raises Conflict, naming the other, when the policy or its state does not let it be disturbed. With `force` a frozen
    one may be.
    """
    while True:
        open_one = await store.find_open_rollout(tx, rollout.model)
        queued = await store.list_queued_rollouts(tx, rollout.model)
        if open_one is None and not queued:
            if await store.add_rollout(tx, rollout):
                break
            continue  # Another began between the two statements.
        for each in (open_one, *queued):
            if each and each.version == rollout.version and each.state is not State.FAILING:
                if rollout.group is not None and each.group != rollout.group:
                    raise Conflict(f"version {each.version} of model {each.model.model!r} is on its way by itself")
                if not _is_slower(each, rollout.policy):
                    return each
        rollout = replace(rollout, state=State.QUEUED)
        await _make_way(tx, open_one, queued, rollout, force=force)
        await store.add_rollout(tx, rollout)
        break
    await tx.emit(
        RolloutStarted(
            tenant=rollout.model.tenant,
            model=rollout.model.model,
            rollout=rollout.id,
            version=rollout.version,
            strategy=rollout.policy.strategy,
            actor=rollout.actor,
        )
    )
    return rollout


def _is_slower(other: Rollout, wanted: Policy) -> bool:
    """Whether the traffic is wanted at once, and the other rollout goes to it step by step."""
    at_once = wanted.strategy is Strategy.IMMEDIATE
    return at_once and not other.is_through and stages(other.policy, first=False) != stages(wanted, first=False)


async def _make_way(
    tx: Tx, open_one: Rollout | None, queued: Sequence[Rollout], newer: Rollout, *, force: bool
) -> None:
    """The rollouts before the newer one give up, if its policy says so."""
    is_frozen = open_one is not None and open_one.walk.held and open_one.policy.on_failure is OnFailure.FREEZE
    if open_one is not None and is_frozen and not force:
        raise Conflict(f"rollout {open_one.id} of model {newer.model.model!r} is frozen: {open_one.walk.held}")
    if newer.policy.on_newer is OnNewer.REFUSE:
        raise Conflict(_in_the_way(open_one or queued[0], newer))
    if newer.policy.on_newer is OnNewer.QUEUE:
        return
    reason = f"superseded by version {newer.version} ({newer.actor})"
    # One that is being promoted comes to its end first: the newer one waits behind it.
    if open_one is not None and open_one.outcome is None and not open_one.is_through:
        await store.save_rollout(tx, open_one, aborted(open_one, reason))
    for each in queued:
        # It never began, so there is nothing to take back.
        given_up = finished(aborted(each, reason), unserved(each.model), newer.started_at)
        await store.save_rollout(tx, each, given_up)
        for event in events(each, given_up, newer.started_at):
            await tx.emit(event)


def _in_the_way(other: Rollout, newer: Rollout) -> str:
    model = newer.model.model
    if other.version != newer.version or other.state is State.FAILING:
        return f"model {model!r} is on its way to version {other.version}: rollout {other.id} is {other.state}"
    policy = next((name for name, preset in PRESETS.items() if preset == other.policy), other.policy.strategy)
    return (
        f"version {other.version} of model {model!r} is in a rollout by policy {str(policy)!r} and is {other.state} at"
        f" {other.walk.percent:g} %: `lepton rollout promote {model} --full --reason WHY` gives it all traffic now,"
        f" `lepton rollout abort {model} --reason WHY` ends it"
    )


def new_rollout(
    rollout_id: UUID, model: ModelRef, assigned: Assigned, actor: str, now: datetime, load_timeout_s: float
) -> Rollout:
    """An immediate rollout that has that long to get its version onto the workers."""
    load_by = now + timedelta(seconds=load_timeout_s)
    return Rollout(rollout_id, model, assigned, IMMEDIATE, actor, started_at=now, load_by=load_by)
