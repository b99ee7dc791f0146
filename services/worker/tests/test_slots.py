import asyncio
import os
import threading
import time
from collections.abc import Mapping

from lepton_common.tensors import Array
from lepton_worker.buckets import Outputs
from lepton_worker.usage import Usage

from .batches import batching, row


async def test_slots_run_side_by_side() -> None:
    together = threading.Barrier(3)

    def run(inputs: Mapping[str, Array]) -> Outputs:
        together.wait(10)
        return {"y": inputs["x"]}

    async with batching(run, slots=3, mergeable=False) as caller:
        answers = await asyncio.gather(*(caller.ask(row(number)) for number in range(3)))
    assert [answer["y"].tolist() for answer in answers] == [[[0]], [[1]], [[2]]]


async def test_a_tenant_that_uses_more_than_others_runs_at_a_lower_priority() -> None:
    usage = Usage()
    seen: list[int] = []

    def run(inputs: Mapping[str, Array]) -> Outputs:
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return {"y": inputs["x"]}

    async with batching(run, slots=2, mergeable=False, usage=usage) as caller:
        await caller.ask(row(0))
        usage.add("other", 1.0, time.monotonic())
        await caller.ask(row(0))
        usage.add("acme", 2.0, time.monotonic())
        await caller.ask(row(0))
        usage.add("other", 2.0, time.monotonic())
        await caller.ask(row(0))
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert seen == [own, own, min(own + 10, 19), own]


async def test_a_run_that_only_takes_long_is_no_large_use() -> None:
    usage = Usage()

    def run(inputs: Mapping[str, Array]) -> Outputs:
        time.sleep(0.2)  # as if its thread was not let onto a core
        return {"y": inputs["x"]}

    async with batching(run, usage=usage) as caller:
        usage.add("other", 0.1, time.monotonic())
        await caller.ask(row(0))
    assert not usage.is_large("acme")
