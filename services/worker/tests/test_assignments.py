import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lepton_common.blobs import Blobs
from lepton_common.errors import Invalid, NotFound, Unavailable
from lepton_common.events import Batching
from lepton_common.records import Assigned, Limits, LoadState, Serving
from lepton_common.types import ModelRef
from lepton_worker.assignments import Assignments, Resources
from lepton_worker.cache import Cache
from lepton_worker.domain import NotLoaded, Verdict

from .conftest import OnnxFile

MODEL = ModelRef("default", "double")
QUICK = Resources(instances=1, unload_grace_s=5, linger_s=0.01)


class Examined:
    """Every artifact passes, or fails as it is told to."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def verdict(self, path: Path) -> Verdict:
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        return Verdict(True, "", 8)


class Worker:
    """Assignments on a real store and cache, driven by records as etcd's mirror would."""

    def __init__(self, folder: Path, resources: Resources) -> None:
        self.records: dict[str, Serving] = {}
        self.blobs = Blobs(folder / "blobs")
        self.examined = Examined()
        self.changes = asyncio.Condition()
        cache = Cache(folder / "cache", 1 << 20, self.blobs)
        self.assignments = Assignments(self.records, "cpu", cache, self.examined, resources)
        self.assignments.on_change = self._changed
        self._notices: set[asyncio.Task[None]] = set()

    def _changed(self) -> None:
        async def notify() -> None:
            async with self.changes:
                self.changes.notify_all()

        notice = asyncio.create_task(notify())
        self._notices.add(notice)
        notice.add_done_callback(self._notices.discard)

    async def artifact(self, version: int, path: Path) -> Assigned:
        digest = hashlib.sha256(await asyncio.to_thread(path.read_bytes)).hexdigest()
        size_bytes = await self.blobs.put_file(path, digest)
        return Assigned(version=version, sha256=digest, size_bytes=size_bytes)

    def serve(self, *versions: Assigned, stable: int | None = 1, limits: Limits | None = None) -> None:
        self.records[str(MODEL)] = Serving(
            tenant="default",
            model="double",
            generation=1,
            stable=stable,
            versions=versions,
            limits=limits or Limits(),
        )
        self.assignments.reconsider()

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(20), self.changes:
            await self.changes.wait_for(is_so)

    async def until_states(self, **states: LoadState) -> None:
        """Returns once the versions v1, v2… are in exactly these states."""
        await self.until(lambda: {f"v{each.version}": each.state for each in self.assignments.views()} == states)

    async def ask(self, version: int | None = None) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        lane = self.assignments.lane(MODEL, version)
        inputs = {"x": np.ones((1, 2), np.float32)}
        lane.batcher.submit(inputs, float("inf"), lambda outcome, waited_s: answer.set_result(outcome))
        return (await answer)["y"].tolist()


@asynccontextmanager
async def running(folder: Path, resources: Resources = QUICK) -> AsyncIterator[Worker]:
    worker = Worker(folder, resources)
    task = asyncio.create_task(worker.assignments.run())
    try:
        yield worker
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_an_assigned_version_is_loaded_and_serves(tmp_path: Path, onnx_file: OnnxFile) -> None:
    async with running(tmp_path) as worker:
        worker.serve(await worker.artifact(1, onnx_file()))
        await worker.until_states(v1=LoadState.READY)
        assert await worker.ask() == [[2, 2]]
        assert await worker.ask(1) == [[2, 2]]
        assert worker.assignments.versions(MODEL) == ["1"]


async def test_a_version_of_another_pool_is_not_loaded(tmp_path: Path, onnx_file: OnnxFile) -> None:
    async with running(tmp_path) as worker:
        assigned = await worker.artifact(1, onnx_file())
        worker.serve(assigned.model_copy(update={"pool": "gpu"}))
        await worker.until(lambda: worker.assignments.not_ready() is None)
        with pytest.raises(NotLoaded, match="not on this worker"):
            worker.assignments.lane(MODEL, 1)


async def test_a_withdrawn_version_serves_on_for_a_moment_and_is_then_gone(tmp_path: Path, onnx_file: OnnxFile) -> None:
    async with running(tmp_path, Resources(instances=1, linger_s=0.5)) as worker:
        worker.serve(await worker.artifact(1, onnx_file()))
        await worker.until_states(v1=LoadState.READY)
        worker.serve(stable=None)
        await worker.until_states(v1=LoadState.UNLOADING)
        assert await worker.ask(1) == [[2, 2]]
        await worker.until_states()
        with pytest.raises(NotFound):
            worker.assignments.lane(MODEL, 1)


async def test_a_version_wanted_again_while_it_lingers_stays(tmp_path: Path, onnx_file: OnnxFile) -> None:
    async with running(tmp_path, Resources(instances=1, linger_s=600)) as worker:
        assigned = await worker.artifact(1, onnx_file())
        worker.serve(assigned)
        await worker.until_states(v1=LoadState.READY)
        lane = worker.assignments.lane(MODEL, 1)
        worker.serve()
        await worker.until_states(v1=LoadState.UNLOADING)
        worker.serve(assigned)
        await worker.until_states(v1=LoadState.READY)
        assert worker.assignments.lane(MODEL, 1) is lane


async def test_a_version_wanted_again_after_it_left_is_loaded_again(tmp_path: Path, onnx_file: OnnxFile) -> None:
    async with running(tmp_path) as worker:
        assigned = await worker.artifact(1, onnx_file())
        for _ in range(2):
            worker.serve(assigned)
            await worker.until_states(v1=LoadState.READY)
            assert await worker.ask() == [[2, 2]]
            worker.serve()
            await worker.until_states()


async def test_other_bytes_under_the_same_number_replace_the_old_ones(tmp_path: Path, onnx_file: OnnxFile) -> None:
    async with running(tmp_path) as worker:
        worker.serve(await worker.artifact(1, onnx_file()))
        await worker.until_states(v1=LoadState.READY)
        other = await worker.artifact(1, onnx_file("g (float[N, 2] x) => (float[N, 2] y) { y = Identity(x) }"))
        worker.serve(other)
        await worker.until(
            lambda: (
                [(each.sha256, each.state) for each in worker.assignments.views()] == [(other.sha256, LoadState.READY)]
            )
        )
        assert await worker.ask() == [[1, 1]]


async def test_swapping_versions_fails_no_request(tmp_path: Path, onnx_file: OnnxFile) -> None:
    triple = "g (float[N, 2] x) => (float[N, 2] y) { d = Add(x, x) y = Add(d, x) }"
    async with running(tmp_path) as worker:
        first = await worker.artifact(1, onnx_file())
        second = await worker.artifact(2, onnx_file(triple))
        worker.serve(first)
        await worker.until_states(v1=LoadState.READY)
        answers: list[Any] = []
        stop = asyncio.Event()

        async def load() -> None:
            while not stop.is_set():
                answers.append(await worker.ask())

        callers = [asyncio.create_task(load()) for _ in range(4)]
        for stable, other in ((2, 1), (1, 2)) * 3:
            worker.serve(first, second, stable=other)  # make
            await worker.until_states(v1=LoadState.READY, v2=LoadState.READY)
            worker.serve(first if stable == 1 else second, stable=stable)  # before break
            await worker.until_states(**{f"v{stable}": LoadState.READY})
        stop.set()
        await asyncio.gather(*callers)
        assert {value for answer in answers for row in answer for value in row} == {2.0, 3.0}


async def test_a_model_that_fails_says_why_and_harms_no_other(tmp_path: Path, onnx_file: OnnxFile) -> None:
    async with running(tmp_path) as worker:
        worker.serve(await worker.artifact(1, onnx_file()))
        await worker.until_states(v1=LoadState.READY)
        worker.examined.failure = Invalid("it crashed")
        worker.serve(await worker.artifact(1, onnx_file()), await worker.artifact(2, onnx_file(labels="[]")))
        await worker.until_states(v1=LoadState.READY, v2=LoadState.FAILED)
        assert worker.assignments.views()[1].reason == "it crashed"
        with pytest.raises(NotLoaded, match="model 'double' version 2 is failed: it crashed"):
            worker.assignments.lane(MODEL, 2)
        assert await worker.ask(1) == [[2, 2]]
        # Withdrawn, it is forgotten at once.
        worker.serve(await worker.artifact(1, onnx_file()))
        await worker.until_states(v1=LoadState.READY)


async def test_loading_is_tried_again_while_the_store_is_away(tmp_path: Path, onnx_file: OnnxFile) -> None:
    async with running(tmp_path) as worker:
        worker.examined.failure = Unavailable("the store is away")
        worker.serve(await worker.artifact(1, onnx_file()))
        await worker.until(lambda: any(each.reason == "the store is away" for each in worker.assignments.views()))
        assert worker.assignments.not_ready() is None
        worker.examined.failure = None
        await worker.until_states(v1=LoadState.READY)


async def test_a_worker_is_not_ready_before_its_first_versions_were_tried(tmp_path: Path, onnx_file: OnnxFile) -> None:
    async with running(tmp_path) as worker:
        assert worker.assignments.not_ready() == "waiting for the first assignments"
        worker.examined.gate.clear()
        worker.serve(await worker.artifact(1, onnx_file()))
        await worker.until_states(v1=LoadState.LOADING)
        assert worker.assignments.not_ready() == "loading default/double/1"
        with pytest.raises(NotLoaded, match="is loading: try again"):
            worker.assignments.lane(MODEL, None)
        worker.examined.gate.set()
        await worker.until_states(v1=LoadState.READY)
        assert worker.assignments.not_ready() is None


async def test_a_version_withdrawn_while_it_loads_is_gone(tmp_path: Path, onnx_file: OnnxFile) -> None:
    async with running(tmp_path) as worker:
        worker.examined.gate.clear()
        worker.serve(await worker.artifact(1, onnx_file()))
        await worker.until_states(v1=LoadState.LOADING)
        worker.serve()
        await worker.until_states()
        with pytest.raises(NotFound):
            worker.assignments.lane(MODEL, 1)


async def test_new_limits_hold_without_a_reload(tmp_path: Path, onnx_file: OnnxFile) -> None:
    async with running(tmp_path) as worker:
        assigned = await worker.artifact(1, onnx_file())
        worker.serve(assigned)
        await worker.until_states(v1=LoadState.READY)
        lane = worker.assignments.lane(MODEL, 1)
        changed = assigned.model_copy(update={"batching": Batching(max_rows=7)})
        worker.serve(changed, limits=Limits(timeout_ms=1500))
        await worker.until(lambda: lane.timeout_s == 1.5)
        assert worker.assignments.lane(MODEL, 1) is lane
        assert lane.config("cpu")["max_batch_size"] == 7


def test_a_model_that_is_not_served_is_not_found(tmp_path: Path) -> None:
    assignments = Assignments({}, "cpu", Cache(tmp_path, 1, Blobs(tmp_path / "blobs")), Examined(), QUICK)
    for version in (None, 1):
        with pytest.raises(NotFound, match="'nowhere'"):
            assignments.lane(ModelRef("default", "nowhere"), version)
