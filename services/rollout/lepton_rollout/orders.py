"""What persons make of a rollout under way. Pure; each raises Conflict for a rollout that is over, or gives up."""

from dataclasses import replace

from lepton_common.errors import Conflict

from lepton_rollout.domain import Rollout, State, again, failing, stepped


def paused(rollout: Rollout, reason: str) -> Rollout:
    """It grows no further until it is resumed; harm still takes it back. Raises Conflict.

    It stays in the stage that the mesh acknowledged last, and is judged there: one that it only means to enter, also by
    a person's word, it enters when the judge lets it, or that person again, after the resume.
    """
    _check_open(rollout)
    if rollout.walk.paused:
        raise Conflict(f"rollout {rollout.id} is paused already: {rollout.walk.waiting_for}")
    rollout = _stayed(rollout)
    return replace(
        rollout, walk=replace(rollout.walk, paused=True, ready=rollout.walk.stage, waiting_for=f"paused: {reason}")
    )


def _stayed(rollout: Rollout) -> Rollout:
    """In the stage that was acknowledged last, if it meant to grow from there."""
    walk = rollout.walk
    if walk.applied or walk.entered_at is None or rollout.stage.percent <= walk.percent:
        return rollout
    before = max(stage.number for stage in rollout.plan[: walk.stage] if stage.percent == walk.percent)
    return replace(rollout, walk=replace(walk, stage=before, applied=True))


def resumed(rollout: Rollout) -> Rollout:
    """It goes on. One held for harm starts its judgement anew: somebody has looked. Raises Conflict."""
    _check_open(rollout)
    walk = rollout.walk
    if not (walk.paused or walk.held):
        raise Conflict(f"rollout {rollout.id} is neither paused nor held: {walk.waiting_for or rollout.state}")
    if walk.held:
        return again(replace(rollout, walk=replace(walk, paused=False, held="", waiting_for="")))
    return replace(rollout, walk=replace(walk, paused=False, waiting_for=""))


def advanced(rollout: Rollout, reason: str, *, full: bool) -> Rollout:
    """A person lets it enter the next stage, or with `full` the last one, whatever the judge says. Raises Conflict."""
    _check_open(rollout)
    if rollout.state is not State.SHIFTING:
        raise Conflict(f"rollout {rollout.id} is {rollout.state}: no worker has its version ready yet")
    last = len(rollout.plan) - 1
    stage = rollout.walk.stage
    target = last if full and stage < last else stage + 1
    return stepped(replace(rollout, walk=replace(rollout.walk, stage=target - 1)), reason)


def approved(rollout: Rollout) -> Rollout:
    """The next stage may begin as soon as the judge agrees. Raises Conflict when it needs no approval."""
    _check_open(rollout)
    following = rollout.following
    if following is None or not following.approval:
        raise Conflict(f"rollout {rollout.id} waits for no approval: {rollout.walk.waiting_for or rollout.state}")
    return replace(rollout, walk=replace(rollout.walk, approved=following.number))


def aborted(rollout: Rollout, reason: str) -> Rollout:
    """The traffic goes back. Raises Conflict."""
    _check_open(rollout)
    return failing(rollout, reason, State.ABORTED)


def _check_open(rollout: Rollout) -> None:
    if rollout.finished_at is not None or rollout.state is State.FAILING:
        ends = "is over" if rollout.finished_at is not None else "gives up already"
        why = f" ({rollout.reason})" if rollout.reason else ""
        raise Conflict(f"rollout {rollout.id} {ends}, and is {rollout.state}{why}")
    if rollout.is_through:
        raise Conflict(f"rollout {rollout.id} is being promoted: `lepton rollback` returns to the version before")
