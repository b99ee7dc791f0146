"""Whether a pool's workers hold a version, as their own words have it. Pure."""

from collections.abc import Iterable
from enum import StrEnum
from typing import assert_never

from lepton_common.records import Assigned, LoadState, WorkerState
from lepton_common.types import ModelRef


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
    return Loading.WAIT, "" if verdicts else f"pool {assigned.pool!r} has no worker"


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
