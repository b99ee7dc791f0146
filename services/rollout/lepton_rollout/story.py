"""What there is to tell of a rollout's change: events for everybody, decisions for who asks why. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lepton.rollouts import Action, Verdict
from lepton_common.events import RolloutEvent, RolloutFinished, RolloutHeld, TrafficShifted

from lepton_rollout.domain import Rollout, State, is_news


@dataclass(frozen=True, slots=True)
class Note:
    """A decision to be kept. `verdict` holds the numbers, where the judge made it."""

    action: str
    reason: str
    verdict: Verdict | None = None


def notes(before: Rollout, after: Rollout) -> Iterator[Note]:
    """The decisions between the two. What the judge only repeats is none."""
    verdict = after.walk.verdict
    if verdict is not None and verdict != before.walk.verdict and is_news(before.walk.verdict, verdict):
        yield Note(verdict.action, verdict.reason, verdict)
    if after.walk.applied and not before.walk.applied:
        yield Note("shifted", f"the mesh acknowledged {_share(after)}")
    if after.walk.held and after.walk.held != before.walk.held:
        yield Note("held", after.walk.held)
    # What the judge said is on record with its numbers; giving up is what follows from it.
    repeats = after.state is State.FAILING and verdict is not None and verdict.reason == after.reason
    if after.state is not before.state and after.state is not State.SHIFTING and not repeats:
        yield Note(after.state, after.reason)


def events(before: Rollout, after: Rollout, at: datetime) -> Iterator[RolloutEvent]:
    """The facts between the two."""
    about = {
        "tenant": after.model.tenant,
        "model": after.model.model,
        "rollout": after.id,
        "version": after.version,
        "at": at,
    }
    if after.walk.percent != before.walk.percent:
        yield TrafficShifted.model_validate({**about, "percent": after.walk.percent, "reason": after.reason})
    if page := _page(before, after):
        yield RolloutHeld.model_validate({**about, "reason": page, "page": True})
    elif after.lacks_approval and _asks(after) and not _asks(before):
        yield RolloutHeld.model_validate({**about, "reason": after.walk.waiting_for})
    if after.finished_at is not None:
        yield RolloutFinished.model_validate(
            {
                **about,
                "outcome": after.state,
                "reason": after.reason,
                "previous": after.previous,
                "evidence": _evidence(after.walk.verdict),
            }
        )


def _page(before: Rollout, after: Rollout) -> str:
    """Why somebody should look now; empty when nobody need, or was told already."""
    if after.walk.held != before.walk.held:
        return after.walk.held
    was, verdict = before.walk.verdict, after.walk.verdict
    return verdict.reason if verdict and verdict.page and not (was and was.page) else ""


def _asks(rollout: Rollout) -> bool:
    return rollout.walk.waiting_for.startswith("approval")


def _share(rollout: Rollout) -> str:
    return f"{rollout.stage.percent:g} % ({rollout.stage.kind})"


def _evidence(verdict: Verdict | None) -> dict[str, Any]:
    """The numbers of the last verdict, if there was something to judge."""
    if verdict is None or (verdict.action is Action.HOLD and not verdict.gates):
        return {}
    return {"second": verdict.second, "gates": {gate.name: gate.numbers for gate in verdict.gates}}
