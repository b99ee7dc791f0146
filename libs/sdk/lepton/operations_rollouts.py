"""What a client can do about rollouts: start, steer, explain, replay. Flows, as those of `operations.py`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias
from uuid import UUID

from lepton.errors import DeadlineExceeded, Invalid, NotFound, RolloutFailed
from lepton.flow import Flow, OnProgress, Progress, checked, get, get_list, pause, post, segment
from lepton.models import Version
from lepton.operations_policies import has_policy, known_policy, preset_or_file
from lepton.operations_serving import serving
from lepton.policies import Policy
from lepton.rollouts import Decision, NewRollout, Reason, Replay, Rollout, RolloutState, WindowPoint

Command: TypeAlias = Literal["pause", "resume", "promote", "abort", "approve", "retry"]

_POLL_S = 0.15
# rollout hears of a new version over Kafka; until then it does not know the version that the registry just made.
_HEARD_WITHIN_S = 30.0
_ENDED = {
    RolloutState.PROMOTED: "has all of the traffic",
    RolloutState.ROLLED_BACK: "was taken back",
    RolloutState.ABORTED: "was given up",
    RolloutState.FAILED: "was not deployed",
}


# --- how versions come to live traffic --------------------------------------------------------------------------------


def start_rollout(
    model: str,
    version: int,
    *,
    policy: Policy | str | Path | None = None,
    force: bool = False,
    together: Mapping[str, int] | None = None,
    wait: bool = False,
    timeout: float = 3600.0,
    progress: OnProgress | None = None,
) -> Flow[Rollout]:
    """The version is on its way to live traffic by the policy; with `wait` it has all of it before this returns.

    `policy` is a preset's name, a YAML or JSON file, or a Policy; None takes the model's own, else the default.
    `force`: although the same bytes were taken back before. `together`: other models' versions that step with it.
    Calling it again joins the rollout of the version that is on its way.

    Raises NotFound, Invalid naming the field of the policy that is wrong, Conflict when the policy does not let it
    start now; with `wait` RolloutFailed with the reason, and DeadlineExceeded, upon which the rollout goes on.
    """
    chosen = yield from known_policy(policy)
    members = [{"model": name, "version": number} for name, number in (together or {}).items()]
    wanted = checked(NewRollout, model=model, version=version, policy=chosen, force=force, together=members)
    started = yield from start(wanted)
    return (yield from wait_for(started, timeout=timeout, progress=progress)) if wait else started


def deploy(
    model: str, version: int, *, wait: bool = True, timeout: float = 300.0, progress: OnProgress | None = None
) -> Flow[Rollout]:
    """All live traffic goes to the version at once, unjudged; with `wait` before this returns.

    Raises NotFound, Conflict when another version is on its way, or this one step by step, RolloutFailed,
    DeadlineExceeded.
    """
    started = yield from start(checked(NewRollout, model=model, version=version, policy="immediate"))
    return (yield from wait_for(started, timeout=timeout, progress=progress)) if wait else started


def rollback(
    model: str, *, wait: bool = True, timeout: float = 300.0, progress: OnProgress | None = None
) -> Flow[Rollout]:
    """All live traffic goes back: a rollout that has moved some of it gives up, else a new one brings it to the version
    before. Returns that rollout. Raises Conflict when there is nothing to go back to."""
    started = yield from post(Rollout, f"/v1/serving/{segment(model)}/rollback")
    if not wait:
        return started
    try:
        return (yield from wait_for(started, timeout=timeout, progress=progress))
    except RolloutFailed:
        ended = yield from rollout(started.id)
        if started.state is RolloutState.FAILING and ended.state is not RolloutState.FAILED:
            return ended  # It gave up, which is what was asked for.
        raise


def wait_for(rollout: Rollout, *, timeout: float = 300.0, progress: OnProgress | None = None) -> Flow[Rollout]:
    """The rollout, promoted. Raises RolloutFailed with the reason, DeadlineExceeded after `timeout` seconds."""
    start = now = yield from pause(0)
    while True:
        rollout = yield from get(Rollout, _path(rollout.id))
        if progress:
            progress(Progress(rollout.state.value, rollout.percent, 100, rollout.waiting_for))
        if rollout.state == RolloutState.PROMOTED:
            return rollout
        name = f"{rollout.model} version {rollout.version}"
        if rollout.state in _ENDED:
            hint = f"`lepton rollout explain {rollout.id}` tells each decision with its numbers."
            if rollout.state == RolloutState.FAILED:
                hint += " `lepton logs worker` shows more."
            raise RolloutFailed(f"{name} {_ENDED[rollout.state]}: {rollout.reason or 'no reason is known'}", hint=hint)
        if now - start >= timeout:
            waits = f": {rollout.waiting_for}" if rollout.waiting_for else ""
            raise DeadlineExceeded(
                f"{name} is still {rollout.state} after {timeout:g} s, at {rollout.percent:g} %{waits}.",
                hint=f"It goes on by itself: `lepton rollout watch {rollout.model}` shows how.",
            )
        now = yield from pause(_POLL_S)


def start(wanted: NewRollout) -> Flow[Rollout]:
    """A rollout of the version: the one that is on its way, else a new one."""
    start = now = yield from pause(0)
    while True:
        try:
            return (yield from post(Rollout, "/v1/rollouts", wanted, repeatable=True))
        except NotFound:
            # Raises NotFound itself, unless rollout will hear of it soon.
            yield from get(Version, f"/v1/models/{segment(wanted.model)}/versions/{wanted.version}")
            if now - start >= _HEARD_WITHIN_S:
                raise
        now = yield from pause(_POLL_S)


def start_usual(model: str, version: int) -> Flow[Rollout]:
    """A pushed version is on its way by the policy that was stored for the model, else all at once."""
    stored = yield from has_policy(model)
    policy = None if stored else "immediate"
    return (yield from start(checked(NewRollout, model=model, version=version, policy=policy)))


def automatic(pushed: Version, timeout: float) -> Flow[Rollout]:
    """The rollout that starts by itself when a model's first version is registered."""
    start = now = yield from pause(0)
    while now - start < timeout:
        for each in (yield from rollouts(pushed.model)):
            if each.version == pushed.version:
                return each
        now = yield from pause(_POLL_S)
    raise DeadlineExceeded(
        f"{pushed.model} version {pushed.version} is registered, but its rollout did not start in {timeout:g} s.",
        hint="`lepton status` shows whether rollout and Kafka run; the rollout starts when they do.",
    )


def serves(pushed: Version) -> Flow[bool]:
    """Whether the version takes all live traffic already."""
    try:
        now = yield from serving(pushed.model)
    except NotFound:
        return False
    return [(share.version, share.percent) for share in now.split] == [(pushed.version, 100)]


# --- steering ---------------------------------------------------------------------------------------------------------


def steer(rollout: UUID | str, command: Command, *, reason: str = "", full: bool = False) -> Flow[Rollout]:
    """The rollout (an id, or a model's: see `find_rollout`) has its command, and the timeline who gave it and why.

    `pause` keeps it from growing, `resume` undoes that, `promote` takes the next step without waiting for proof (with
    `full` all steps), `abort` gives the traffic back, `approve` passes a step that asks for a person, `retry` starts
    the version anew after its rollout ended. Only promote, abort and approve must have a reason.

    Raises NotFound, Invalid, Conflict when the rollout's state does not allow it.
    """
    found = yield from find_rollout(rollout)
    wanted = checked(Reason, reason=reason or _unsaid(command), full=full)
    return (yield from post(Rollout, f"{_path(found.id)}/{command}", wanted))


def pause_rollout(rollout: UUID | str, *, reason: str = "") -> Flow[Rollout]:
    """The rollout no longer grows; harm takes it back as before. See `steer`."""
    return steer(rollout, "pause", reason=reason)


def resume_rollout(rollout: UUID | str, *, reason: str = "") -> Flow[Rollout]:
    """A paused rollout grows again. See `steer`; `release_mesh` gives back traffic that was taken by hand."""
    return steer(rollout, "resume", reason=reason)


def promote_rollout(rollout: UUID | str, *, reason: str, full: bool = False) -> Flow[Rollout]:
    """The rollout takes its next step, or all (`full`), on a person's word instead of proof. See `steer`."""
    return steer(rollout, "promote", reason=reason, full=full)


def abort_rollout(rollout: UUID | str, *, reason: str) -> Flow[Rollout]:
    """All traffic goes back to the stable version. See `steer`."""
    return steer(rollout, "abort", reason=reason)


def approve_rollout(rollout: UUID | str, *, reason: str) -> Flow[Rollout]:
    """The rollout passes the step that asks for a person. See `steer`."""
    return steer(rollout, "approve", reason=reason)


def retry_rollout(rollout: UUID | str, *, reason: str = "") -> Flow[Rollout]:
    """The version of a rollout that ended is on its way once more. See `steer`."""
    return steer(rollout, "retry", reason=reason)


def _unsaid(command: Command) -> str:
    if command in ("promote", "abort", "approve"):
        raise Invalid(f"To {command} a rollout needs a reason: the timeline keeps who did it and why.")
    return "no reason given"


# --- looking ----------------------------------------------------------------------------------------------------------


def rollouts(model: str | None = None) -> Flow[list[Rollout]]:
    """The rollouts of one model, or of all, the newest first."""
    return get_list(Rollout, "/v1/rollouts", {"model": model} if model else {})


def rollout(rollout_id: UUID | str) -> Flow[Rollout]:
    """One rollout. Raises NotFound."""
    return get(Rollout, _path(rollout_id))


def find_rollout(rollout: UUID | str) -> Flow[Rollout]:
    """The rollout with this id (eight digits of it will do), or of this model: the one under way, else the newest.

    Raises NotFound.
    """
    name = str(rollout)
    if isinstance(rollout, UUID) or _is_id(name):
        return (yield from get(Rollout, _path(name)))
    of_model = yield from rollouts(name)
    if of_model:
        under_way = [each for each in of_model if each.state not in _ENDED]
        running = [each for each in under_way if each.state != RolloutState.QUEUED]
        # A list is short of what one rollout has: its verdict and arms.
        return (yield from get(Rollout, _path((running or under_way or of_model)[0].id)))
    if re.fullmatch("[0-9a-f]{8}[0-9a-f-]*", name):
        for each in (yield from rollouts()):
            if str(each.id).startswith(name):
                return (yield from get(Rollout, _path(each.id)))
    raise NotFound(
        f"There is no rollout of {name!r}, as a model or as an id.", hint="`lepton rollouts` lists what there is."
    )


def decisions(rollout_id: UUID | str) -> Flow[list[Decision]]:
    """Everything that was decided about a rollout, by the judge or a person, in order. Raises NotFound."""
    return get_list(Decision, f"{_path(rollout_id)}/decisions")


def rollout_windows(rollout_id: UUID | str) -> Flow[list[WindowPoint]]:
    """The seconds that a rollout was judged by, of both versions. Raises NotFound."""
    return get_list(WindowPoint, f"{_path(rollout_id)}/windows")


def replay(rollout_id: UUID | str, policy: Policy | str | Path) -> Flow[Replay]:
    """What another policy (a preset's name, a file or a Policy) would have decided on the same windows; nothing moves.

    Raises NotFound, Invalid naming the field of the policy that is wrong.
    """
    chosen = yield from preset_or_file(policy)
    return (yield from post(Replay, f"{_path(rollout_id)}/replay", chosen, repeatable=True))


def _path(rollout_id: UUID | str) -> str:
    return f"/v1/rollouts/{segment(rollout_id)}"


def _is_id(name: str) -> bool:
    try:
        return str(UUID(name)) == name.lower()
    except ValueError:
        return False
