"""A rollout from start to end: its states, what persons and the judge make of it. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from uuid import UUID

from lepton.policies import OnFailure, Policy
from lepton.rollouts import Action, GateState, Verdict
from lepton_common.events import WindowClosed
from lepton_common.records import Assigned, Serving
from lepton_common.types import ModelRef

from lepton_rollout.judge import Baseline, Evidence, entered, fresh, judge, observation, observe
from lepton_rollout.policy import Stage, stages

HOME_POOL = "cpu"
# How long a window that is late behind its successors is waited for.
GAP_S = 3
# Without a window for so long, nothing is known of how a version fares now.
SILENT_S = 10


class State(StrEnum):
    """queued → loading → shifting → promoted, or from any of the first three failing → one of the last three.

    Until a rollout shifts, no traffic has moved. `failing` takes the traffic back and the version off the workers;
    `outcome` says what follows.
    """

    QUEUED = "queued"
    LOADING = "loading"
    SHIFTING = "shifting"
    FAILING = "failing"
    PROMOTED = "promoted"
    ROLLED_BACK = "rolled_back"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Walk:
    """How far a rollout has come. `stage` is the one it is in, or is about to enter until `applied`: the intent is
    written down before the mesh is touched, and `applied` once the mesh has acknowledged it. Before it has `begun`, no
    traffic of its can be anywhere.

    `second` is the Unix second of that acknowledgement, `percent` the share that was acknowledged last. `ready` is the
    stage it would enter if the other members of its group were as far; `approved` the last stage a person approved.
    `held` says why only a person can move it on. `judged` is the second of the last window judged, `sequence` its
    number.
    """

    begun: bool = False
    stage: int = 0
    applied: bool = False
    percent: float = 0.0
    second: int = 0
    entered_at: datetime | None = None
    ready: int = 0
    approved: int = -1
    paused: bool = False
    held: str = ""
    waiting_for: str = ""
    judged: int = 0
    sequence: int = 0
    evidence: Evidence = field(default_factory=fresh)
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True)
class Rollout:
    """A version's way to all of its model's traffic. `assigned` is what the workers of its pool load.

    `stable` served when it began to load and is what it is compared with; `previous` served before it, known once it
    is promoted. `revision` grows with every change, so that none is written over unseen.
    """

    id: UUID
    model: ModelRef
    assigned: Assigned
    policy: Policy
    actor: str
    started_at: datetime
    load_by: datetime
    state: State = State.LOADING
    reason: str = ""
    outcome: State | None = None
    stable: int | None = None
    previous: int | None = None
    group: UUID | None = None
    finished_at: datetime | None = None
    walk: Walk = field(default_factory=Walk)
    revision: int = 0

    @property
    def version(self) -> int:
        return self.assigned.version

    @property
    def plan(self) -> tuple[Stage, ...]:
        """What it goes through. A model's first version has nothing to be compared with, the stable one no need."""
        return stages(self.policy, first=self.stable in (None, self.version))

    @property
    def stage(self) -> Stage:
        """The stage it is in or about to enter; past the end of its plan, the last."""
        plan = self.plan
        return plan[min(self.walk.stage, len(plan) - 1)]

    @property
    def following(self) -> Stage | None:
        """The stage it would enter next; None when that is the end."""
        number = self.walk.stage + 1 if self.state is State.SHIFTING else 0
        return self.plan[number] if number < len(self.plan) else None

    @property
    def lacks_approval(self) -> bool:
        return self.following is not None and self.following.approval and self.walk.approved < self.following.number

    @property
    def is_through(self) -> bool:
        """Whether nothing of its plan is left but to be promoted."""
        return self.walk.stage >= len(self.plan)

    @property
    def home(self) -> Assigned:
        """What the workers hold of it once it is promoted."""
        return self.assigned.model_copy(update={"pool": HOME_POOL}) if self.policy.pool else self.assigned


# --- on its way -------------------------------------------------------------------------------------------------------


def loading(rollout: Rollout, now: datetime) -> Rollout:
    """Its turn has come: the workers have their time to load the version from now on."""
    return replace(rollout, state=State.LOADING, load_by=now + (rollout.load_by - rollout.started_at), reason="")


def told(rollout: Rollout, at: datetime) -> Rollout:
    """The workers hear of it only now, as when etcd was away: their time to load the version begins here."""
    return replace(rollout, load_by=at + (rollout.load_by - rollout.started_at))


def shifting(rollout: Rollout, reason: str) -> Rollout:
    """The workers have the version: its traffic may move."""
    return replace(rollout, state=State.SHIFTING, reason=reason, walk=replace(rollout.walk, begun=True, waiting_for=""))


def applied(rollout: Rollout, at: datetime, baseline: Baseline) -> Rollout:
    """The mesh has acknowledged the stage: from the next whole second on its windows count, and no earlier verdict."""
    stage, walk = rollout.stage, rollout.walk
    # Never before what was judged already, should the gateways' clocks be ahead of ours.
    second = max(int(at.timestamp()), walk.judged)
    evidence = entered(walk.evidence, stage, second, baseline)
    walk = replace(
        walk,
        applied=True,
        percent=stage.percent,
        second=second,
        entered_at=at,
        evidence=evidence,
        waiting_for=walk.waiting_for if walk.paused else "",
        judged=second,
        sequence=0,
        verdict=None,
    )
    return replace(rollout, walk=walk)


def stepped(rollout: Rollout, reason: str) -> Rollout:
    """It means to enter the next stage; the mesh does not know yet."""
    walk = replace(rollout.walk, stage=rollout.walk.stage + 1, applied=False, waiting_for="", held="", paused=False)
    return replace(rollout, walk=walk, reason=reason)


def again(rollout: Rollout) -> Rollout:
    """The mesh is to be brought to the stage it is in once more, and it is judged anew: what was measured before, or
    while somebody else moved the traffic, does not count."""
    return replace(rollout, walk=replace(rollout.walk, applied=False, evidence=fresh(), verdict=None))


def held(rollout: Rollout, reason: str) -> Rollout:
    """Only a person moves it on."""
    return replace(rollout, walk=replace(rollout.walk, held=reason, waiting_for=reason))


def failing(rollout: Rollout, reason: str, outcome: State = State.FAILED) -> Rollout:
    """It gives up, and why; the traffic is still where it is, and its version on the workers."""
    if rollout.outcome is not None:
        return rollout
    return replace(rollout, state=State.FAILING, reason=reason, outcome=outcome)


def finished(rollout: Rollout, serving: Serving, at: datetime) -> Rollout:
    """The rollout at its end: `promoted` when it shifted, else what its giving up comes to."""
    if rollout.state is State.SHIFTING:
        walk = replace(rollout.walk, percent=100.0, waiting_for="")
        return replace(rollout, state=State.PROMOTED, previous=serving.previous, finished_at=at, walk=walk)
    walk = replace(rollout.walk, percent=0.0, waiting_for="", held="")
    return replace(rollout, state=rollout.outcome or State.FAILED, finished_at=at, walk=walk)


# --- what the judge makes of it ---------------------------------------------------------------------------------------


def judged(rollout: Rollout, verdict: Verdict) -> Rollout:
    """The rollout after a verdict of ROLL_BACK or HOLD. The policy says what harm leads to."""
    rollout = replace(rollout, walk=replace(rollout.walk, verdict=verdict, ready=rollout.walk.stage))
    if verdict.action is Action.ROLL_BACK:
        return harmed(rollout, verdict.reason)
    return rollout if rollout.walk.held or rollout.walk.paused else waiting(rollout, verdict.reason)


def advised(rollout: Rollout) -> Rollout:
    """The verdict is advice to who moves the traffic by hand, and wakes nobody: their split is not the stage's."""
    verdict = rollout.walk.verdict
    if verdict is None or not verdict.page:
        return rollout
    return replace(rollout, walk=replace(rollout.walk, verdict=verdict.model_copy(update={"page": False})))


def harmed(rollout: Rollout, reason: str) -> Rollout:
    """The version is worse, and the policy says what follows."""
    if rollout.policy.on_failure is OnFailure.ROLLBACK:
        return failing(rollout, reason, State.ROLLED_BACK)
    return rollout if rollout.walk.held else held(rollout, f"worse than the stable: {reason}")


def waiting(rollout: Rollout, reason: str) -> Rollout:
    return replace(rollout, walk=replace(rollout.walk, waiting_for=reason))


def ready(rollout: Rollout) -> Rollout:
    """It would enter the next stage; the others of its group may hold it up."""
    return replace(rollout, walk=replace(rollout.walk, ready=rollout.walk.stage + 1))


def laggard(rollout: Rollout, others: list[Rollout]) -> Rollout | None:
    """A member of the group that is not as far as the next stage; a shorter plan's end is far enough."""
    wanted = rollout.walk.stage + 1
    for each in others:
        there = each.state is State.SHIFTING and max(each.walk.ready, each.walk.stage) >= min(wanted, len(each.plan))
        if not there and each.state is not State.PROMOTED:
            return each
    return None


def is_stalled(rollout: Rollout, now: datetime) -> bool:
    since = rollout.walk.entered_at
    return since is not None and now - since > timedelta(seconds=rollout.policy.max_step_s + rollout.stage.dwell_s)


def observed(rollout: Rollout, windows: Sequence[WindowClosed], now: float) -> Rollout:
    """The rollout after these windows, which are in order and later than what was judged: up to the first that decides
    something. `now` is in Unix seconds."""
    stage, policy = rollout.stage, rollout.policy
    for window in contiguous(rollout, windows, now):
        seen = observation(window, rollout.version, rollout.stable)
        evidence = observe(rollout.walk.evidence, seen, stage, policy)
        verdict = judge(evidence, stage, policy)
        walk = replace(rollout.walk, evidence=evidence, verdict=verdict, judged=window.second, sequence=window.sequence)
        rollout = replace(rollout, walk=walk)
        if _decides(rollout, verdict, now - window.second):
            break
    return rollout


def _decides(rollout: Rollout, verdict: Verdict, age_s: float) -> bool:
    """Whether something follows from a verdict on a window of that age. It does not grow while it is paused or held,
    nor on what was well long ago: after an outage the windows of that time are gone through at once, to the newest."""
    if verdict.action is Action.STEP:
        return age_s <= SILENT_S and not (rollout.walk.paused or rollout.walk.held)
    return verdict.action is not Action.HOLD


def contiguous(rollout: Rollout, windows: Sequence[WindowClosed], now: float) -> Sequence[WindowClosed]:
    """The windows to judge now, in order. A gap in their numbers is waited for, but not for long: what does not come
    is no evidence for anything. `now` is in Unix seconds."""
    sequence = rollout.walk.sequence
    for index, window in enumerate(windows):
        gap = sequence and window.sequence > sequence + 1
        if gap and windows[-1].second - window.second < GAP_S and now - window.second < 2 * GAP_S:
            return windows[:index]
        sequence = window.sequence
    return windows


def is_news(before: Verdict | None, after: Verdict) -> bool:
    """Whether a verdict says something that the one before did not: another action, or a gate in another state."""
    return before is None or (before.action, _states(before)) != (after.action, _states(after))


def _states(verdict: Verdict) -> list[tuple[str, GateState]]:
    return [(gate.name, gate.state) for gate in verdict.gates]
