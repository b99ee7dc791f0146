import pytest
from lepton_common.records import Loaded, LoadState, WorkerState
from lepton_common.types import ModelRef
from lepton_rollout.loading import Loading, judge_loading

from .stand_ins import assigned

MODEL = ModelRef("default", "digits")


def worker(name: str, state: LoadState | None, reason: str = "", *, pool: str = "cpu", sha256: str = "") -> WorkerState:
    loaded = Loaded(
        tenant="default",
        model="digits",
        version=2,
        sha256=sha256 or assigned(2).sha256,
        state=state or LoadState.LOADING,
        reason=reason,
    )
    return WorkerState(
        id=name, pool=pool, address="127.0.0.1:1", device="cpu", versions=(loaded,) if state is not None else ()
    )


def judged(*workers: WorkerState, late: bool = False) -> tuple[Loading, str]:
    return judge_loading(MODEL, assigned(2), workers, late=late)


def test_a_pool_is_ready_when_every_live_worker_is() -> None:
    verdict, reason = judged(worker("a", LoadState.READY), worker("b", LoadState.READY))
    assert verdict is Loading.READY
    assert reason == "2 of 2 workers of pool 'cpu' are ready"


@pytest.mark.parametrize("other", [LoadState.LOADING, None])
def test_a_worker_still_at_it_is_waited_for_until_it_is_late(other: LoadState | None) -> None:
    workers = worker("a", LoadState.READY), worker("b", other)
    assert judged(*workers) == (Loading.WAIT, "")
    assert judged(*workers, late=True)[0] is Loading.READY


def test_one_ready_worker_is_enough_when_the_others_failed() -> None:
    assert judged(worker("a", LoadState.READY), worker("b", LoadState.FAILED, "no memory"))[0] is Loading.READY


def test_when_all_failed_their_reason_is_told() -> None:
    same = worker("a", LoadState.FAILED, "bad opset"), worker("b", LoadState.FAILED, "bad opset")
    assert judged(*same) == (Loading.FAILED, "bad opset")
    unlike = worker("a", LoadState.FAILED, "bad opset"), worker("b", LoadState.FAILED, "no memory")
    assert judged(*unlike) == (Loading.FAILED, "a: bad opset; b: no memory")


def test_a_pool_without_workers_is_waited_for_until_it_is_late() -> None:
    assert judged() == (Loading.WAIT, "pool 'cpu' has no worker")
    assert judged(late=True) == (
        Loading.FAILED,
        "no worker of pool 'cpu' had the version ready in time (no live workers)",
    )


def test_what_holds_workers_up_is_told_once_it_is_late() -> None:
    stuck = worker("a", LoadState.LOADING, "the store is full"), worker("b", LoadState.FAILED, "bad opset")
    assert judged(*stuck)[0] is Loading.WAIT
    assert judged(*stuck, late=True) == (
        Loading.FAILED,
        "no worker of pool 'cpu' had the version ready in time (2 live workers): a: the store is full; b: bad opset",
    )


def test_other_pools_draining_workers_and_other_bytes_do_not_count() -> None:
    draining = worker("c", LoadState.READY).model_copy(update={"draining": True})
    others = worker("a", LoadState.READY, pool="gpu"), worker("b", LoadState.READY, sha256="f" * 64), draining
    assert judged(*others)[0] is Loading.WAIT
    assert judged(*others, late=True) == (
        Loading.FAILED,
        "no worker of pool 'cpu' had the version ready in time (1 live worker)",
    )
