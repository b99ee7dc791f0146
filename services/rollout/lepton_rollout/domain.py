"""The rules of moving a model's traffic: what a serving record becomes, and when a rollout may go on. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import assert_never
from uuid import UUID

from lepton_common.errors import Conflict, NotFound
from lepton_common.records import Assigned, LoadState, Serving, Share, WorkerState
from lepton_common.types import ModelRef

TOTAL_WEIGHT = 10_000


class State(StrEnum):
    """loading → shifting → promoted, or failing → failed from the first two.

    Until a rollout shifts, no traffic has moved. `failing` takes the version off the workers again.
    """

    LOADING = "loading"
    SHIFTING = "shifting"
    PROMOTED = "promoted"
    FAILING = "failing"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Rollout:
    """A version's way to all of its model's traffic. `assigned` is what the workers of its pool load.

    `previous` served before it; it is known once the rollout is promoted.
    """

    id: UUID
    model: ModelRef
    assigned: Assigned
    strategy: str
    actor: str
    started_at: datetime
    load_by: datetime
    state: State = State.LOADING
    reason: str = ""
    previous: int | None = None
    finished_at: datetime | None = None

    @property
    def version(self) -> int:
        return self.assigned.version

    @property
    def percent(self) -> float:
        """The share of traffic it brought its version to."""
        return 100.0 if self.state is State.PROMOTED else 0.0


# --- what a serving record becomes ------------------------------------------------------------------------------------


def unserved(model: ModelRef) -> Serving:
    """The record of a model before anything of it is served."""
    return Serving(tenant=model.tenant, model=model.model, generation=0)


def warmed(serving: Serving, assigned: Assigned) -> Serving:
    """The pool's workers hold the version; its share of traffic is what it was."""
    if serving.assigned(assigned.version) == assigned:
        return serving
    others = tuple(each for each in serving.versions if each.version != assigned.version)
    return _next(serving, versions=(*others, assigned))


def promoted(serving: Serving, version: int) -> Serving:
    """The version takes all traffic and is the stable one; what was stable is `previous` and stays warm.

    What was `previous` until now is let go. Raises Conflict when no pool holds the version.
    """
    if serving.assigned(version) is None:
        raise Conflict(f"version {version} of model {serving.model!r} is not assigned to any pool")
    split = (Share(version=version, percent=100),)
    if serving.stable == version:
        return _next(serving, split=split)
    let_go = {serving.previous} - {version, serving.stable}
    versions = tuple(each for each in serving.versions if each.version not in let_go)
    return _next(serving, stable=version, previous=serving.stable, split=split, versions=versions)


def abandoned(serving: Serving, version: int) -> Serving:
    """A version that never got traffic is no longer held; one that serves, or that one can return to, stays."""
    if version in {serving.stable, serving.previous} | _live(serving):
        return serving
    return _next(serving, versions=_without(serving, version))


def cooled(serving: Serving, version: int) -> Serving:
    """No worker holds the warm version. Raises NotFound when none does, Conflict while it takes traffic."""
    if serving.assigned(version) is None:
        raise NotFound(f"version {version} of model {serving.model!r} is not loaded")
    if version in _live(serving):
        raise Conflict(f"version {version} of model {serving.model!r} takes live traffic: deploy another version first")
    return _next(serving, versions=_without(serving, version))


def unrouted(serving: Serving) -> Serving:
    """The model takes no traffic. Its versions stay on the workers while the mesh may still lead there."""
    return _next(serving, split=())


def withdrawn(serving: Serving) -> Serving:
    """No worker holds any version. `stable` and `previous` are remembered, so that a load restores the model."""
    return _next(serving, split=(), versions=())


def returned(serving: Serving) -> int:
    """The version a rollback goes to. Raises NotFound for a model never served, Conflict without a previous one."""
    if serving.generation == 0:
        raise NotFound(f"model {serving.model!r} is not served")
    if serving.previous is None:
        raise Conflict(f"model {serving.model!r} has no previous version to go back to")
    return serving.previous


def _live(serving: Serving) -> set[int]:
    return {share.version for share in serving.split if share.percent > 0}


def _without(serving: Serving, version: int) -> tuple[Assigned, ...]:
    return tuple(each for each in serving.versions if each.version != version)


def _next(serving: Serving, **changes: object) -> Serving:
    """The changed record under the next generation; the record itself when nothing changed."""
    after = serving.model_copy(update=changes)
    return serving if after == serving else after.model_copy(update={"generation": serving.generation + 1})


# --- weights ----------------------------------------------------------------------------------------------------------


def weights(split: tuple[Share, ...]) -> dict[int, int]:
    """Each version's weight in ten-thousandths by largest remainder, in the split's order, leaving out those of none.

    They total 10 000, or there are none. A share above zero never vanishes: it gets at least 1.
    """
    shares = {share.version: share.percent for share in split if share.percent > 0}
    total = sum(shares.values())
    exact = {version: percent * TOTAL_WEIGHT / total for version, percent in shares.items()}
    floors = {version: max(1, int(weight)) for version, weight in exact.items()}
    by_remainder = sorted(exact, key=lambda version: floors[version] - exact[version])
    missing = TOTAL_WEIGHT - sum(floors.values()) if floors else 0
    for version in by_remainder[: max(0, missing)]:
        floors[version] += 1
    if missing < 0:
        floors[max(floors, key=lambda version: floors[version])] += missing
    return floors


# --- when a rollout may go on -----------------------------------------------------------------------------------------


class Loading(StrEnum):
    """What the workers of a pool make of a version."""

    WAIT = "wait"
    READY = "ready"
    FAILED = "failed"


def judge_loading(
    model: ModelRef, assigned: Assigned, workers: Iterable[WorkerState], *, late: bool
) -> tuple[Loading, str]:
    """Whether the pool holds the version, and why.

    Ready: no live worker is still at it and at least one has it; once `late`, one is enough, because the mesh retries
    on another worker. Failed: every live worker failed, or none had it in time. Draining workers do not count.
    """
    verdicts: dict[str, tuple[Loading, str]] = {}
    for worker in workers:
        if worker.pool == assigned.pool and not worker.draining:
            verdicts[worker.id] = _verdict(model, assigned, worker)
    ready = [worker for worker, (state, _) in verdicts.items() if state is Loading.READY]
    failed = {worker: reason for worker, (state, reason) in verdicts.items() if state is Loading.FAILED}
    settled = len(ready) + len(failed) == len(verdicts)
    if ready and (settled or late):
        return Loading.READY, f"{len(ready)} of {len(verdicts)} workers of pool {assigned.pool!r} are ready"
    if failed and settled:
        return Loading.FAILED, _same_or_all(failed)
    if late:
        live = f"{len(verdicts) or 'no'} live worker{'' if len(verdicts) == 1 else 's'}"
        told = {worker: reason for worker, (_, reason) in verdicts.items() if reason}
        why = f": {_same_or_all(told)}" if told else ""
        return Loading.FAILED, f"no worker of pool {assigned.pool!r} had the version ready in time ({live}){why}"
    return Loading.WAIT, ""


def _verdict(model: ModelRef, assigned: Assigned, worker: WorkerState) -> tuple[Loading, str]:
    for loaded in worker.versions:
        if (loaded.tenant, loaded.model, loaded.version) != (model.tenant, model.model, assigned.version):
            continue
        if loaded.sha256 != assigned.sha256:
            return Loading.WAIT, ""
        match loaded.state:
            case LoadState.READY:
                return Loading.READY, ""
            case LoadState.FAILED:
                return Loading.FAILED, loaded.reason or "the worker gave no reason"
            case LoadState.LOADING | LoadState.UNLOADING:
                return Loading.WAIT, loaded.reason
            case _:
                assert_never(loaded.state)
    return Loading.WAIT, ""


def _same_or_all(reasons: dict[str, str]) -> str:
    """The reason, once if all workers agree, else each worker's."""
    if len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"{worker}: {reason}" for worker, reason in sorted(reasons.items()))


# --- a rollout's steps ------------------------------------------------------------------------------------------------


def told(rollout: Rollout, at: datetime) -> Rollout:
    """The workers hear of it only now, as when etcd was away: their time to load the version begins here."""
    return replace(rollout, load_by=at + (rollout.load_by - rollout.started_at))


def shifting(rollout: Rollout, reason: str) -> Rollout:
    """The workers have the version: its traffic may move."""
    return replace(rollout, state=State.SHIFTING, reason=reason)


def failing(rollout: Rollout, reason: str) -> Rollout:
    """The rollout gives up, and why; its version is still on the workers."""
    return replace(rollout, state=State.FAILING, reason=reason)


def finished(rollout: Rollout, serving: Serving, at: datetime) -> Rollout:
    """The rollout at its end: `promoted` when it shifted, `failed` when it was failing."""
    if rollout.state is State.SHIFTING:
        return replace(rollout, state=State.PROMOTED, previous=serving.previous, finished_at=at)
    return replace(rollout, state=State.FAILED, finished_at=at)
