import asyncio
import threading
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lepton_common.errors import DeadlineExceeded, Invalid, LeptonError, Overloaded, Unavailable
from lepton_common.tensors import Array
from lepton_worker.batcher import Statistics
from lepton_worker.buckets import Outputs

from .batches import NEVER, Caller, Model, batching, row


@asynccontextmanager
async def held(model: Model, **options: Any) -> AsyncIterator[tuple[Caller, asyncio.Future[Any]]]:
    """A batcher whose only slot is busy with a first request, until the model is opened."""
    model.open.clear()
    async with batching(model, **options) as caller:
        _, first = caller.submit(row(0))
        await asyncio.sleep(0)
        assert caller.batcher.queued_rows == 0
        try:
            yield caller, first
        finally:
            model.open.set()


async def test_a_lone_request_runs_at_once_and_alone() -> None:
    model = Model()
    async with batching(model) as caller:
        outputs = await caller.ask(row(3))
    assert outputs["y"].tolist() == [[6]]
    assert model.ran == [1]


async def test_what_waits_while_the_slots_are_busy_runs_together() -> None:
    model = Model()
    async with held(model) as (caller, first):
        answers = [caller.submit(row(value))[1] for value in range(1, 6)]
        model.open.set()
        await first
        assert [(await answer)["y"].tolist() for answer in answers] == [[[2 * value]] for value in range(1, 6)]
    assert model.ran == [1, 5]


async def test_rows_are_counted_and_a_batch_never_exceeds_its_limit() -> None:
    model = Model()
    async with held(model, max_rows=8) as (caller, _):
        answers = [caller.submit(row(value, rows=3))[1] for value in range(5)]
        model.open.set()
        for value, answer in enumerate(answers):
            assert (await answer)["y"].tolist() == [[2 * value]] * 3
    assert model.ran == [1, 6, 6, 3]


async def test_a_request_larger_than_a_batch_runs_alone() -> None:
    model = Model()
    async with held(model, max_rows=4) as (caller, _):
        small, large, more = (caller.submit(row(1, rows=rows))[1] for rows in (1, 9, 1))
        model.open.set()
        await asyncio.gather(small, large, more)
    assert sorted(model.ran[1:]) == [2, 9]


async def test_different_shapes_run_apart() -> None:
    model = Model()
    async with held(model) as (caller, _):
        answers = [caller.submit(row(1, width=width))[1] for width in (2, 3, 2, 3)]
        model.open.set()
        assert [(await answer)["y"].shape for answer in answers] == [(1, 2), (1, 3), (1, 2), (1, 3)]
    assert model.ran == [1, 2, 2]


async def test_inputs_with_different_rows_run_alone() -> None:
    shapes: list[Any] = []

    def run(inputs: Mapping[str, Array]) -> Outputs:
        shapes.append([array.shape for array in inputs.values()])
        return {"y": inputs["a"]}

    async with batching(run) as caller:
        inputs = {"a": np.zeros((2, 1)), "b": np.zeros((1, 1))}
        await asyncio.gather(caller.ask(inputs), caller.ask(inputs))
    assert shapes == [[(2, 1), (1, 1)]] * 2


async def test_a_model_whose_rows_cannot_be_merged_runs_every_request_alone() -> None:
    model = Model()
    async with held(model, mergeable=False) as (caller, _):
        answers = [caller.submit(row(value, rows=2))[1] for value in range(3)]
        model.open.set()
        assert [(await answer)["y"].shape for answer in answers] == [(2, 1)] * 3
    assert model.ran == [1, 2, 2, 2]


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    model = Model()
    async with held(model, max_queued_rows=4) as (caller, _):
        caller.submit(row(1, rows=3))
        with pytest.raises(Overloaded, match="the queue is full: 3 rows wait") as raised:
            caller.submit(row(1, rows=2))
        assert raised.value.retry_after_s is not None
        assert raised.value.retry_after_s >= 1
        caller.submit(row(1))
        assert caller.batcher.statistics.rejected == 1


async def test_requests_without_a_row_fill_the_queue_as_well() -> None:
    async with held(Model(), max_queued_rows=4) as (caller, _):
        for _ in range(4):
            caller.submit(row(1, rows=0))
        with pytest.raises(Overloaded):
            caller.submit(row(1, rows=0))


async def test_runs_are_told_apart_by_size_up_to_a_bound() -> None:
    statistics = Statistics()
    for rows in range(1, 3000):
        statistics.count((), rows, started=0.0, ended=1.0)
    assert statistics.executions == 2999
    assert len(statistics.by_size) == 1024


async def test_a_request_larger_than_the_whole_queue_is_let_into_an_empty_one() -> None:
    async with batching(Model(), max_queued_rows=4) as caller:
        assert (await caller.ask(row(1, rows=50)))["y"].shape == (50, 1)


async def test_work_whose_deadline_passed_is_not_run_and_hears_so_while_the_slots_are_busy() -> None:
    model = Model()
    async with held(model) as (caller, first):
        _, late = caller.submit(row(1), deadline=time.monotonic() + 0.01)
        assert isinstance(await late, DeadlineExceeded)
        assert not first.done()
    assert model.ran == [1]
    assert caller.batcher.statistics.expired == 1


async def test_work_whose_deadline_passed_before_it_came_is_not_run() -> None:
    model = Model()
    async with batching(model) as caller:
        assert isinstance(await caller.ask(row(1), deadline=time.monotonic() - 1), DeadlineExceeded)
    assert model.ran == []


async def test_work_whose_caller_left_is_not_run_and_makes_room_at_once() -> None:
    model = Model()
    async with held(model, max_queued_rows=2) as (caller, _):
        work, answer = caller.submit(row(1, rows=2))
        caller.batcher.cancel(work)
        caller.batcher.cancel(work)
        _, other = caller.submit(row(2, rows=2))
        model.open.set()
        await other
        assert not answer.done()
    assert model.ran == [1, 2]
    assert caller.batcher.statistics.cancelled == 1


async def test_a_caller_that_leaves_while_its_batch_runs_hears_nothing_and_the_others_do() -> None:
    model = Model()
    async with held(model) as (caller, _):
        answers = [caller.submit(row(value)) for value in range(3)]
        model.open.set()
        caller.batcher.cancel(answers[1][0])
        assert (await answers[2][1])["y"].tolist() == [[4]]
        assert answers[0][1].done()
        assert not answers[1][1].done()


async def test_a_poisonous_member_fails_alone() -> None:
    model = Model()
    async with held(model) as (caller, _):
        answers = [caller.submit(row(value))[1] for value in (1, -1, 3)]
        model.open.set()
        good, bad, other = await asyncio.gather(*answers)
    assert good["y"].tolist() == [[2]]
    assert other["y"].tolist() == [[6]]
    assert isinstance(bad, Invalid)
    assert caller.batcher.statistics.isolated == 1


async def test_outputs_that_cannot_be_split_are_run_again_one_by_one() -> None:
    def run(inputs: Mapping[str, Array]) -> Outputs:
        return {"y": inputs["x"].sum(axis=0, keepdims=True)}

    async with batching(run) as caller:
        first, second = await asyncio.gather(caller.ask(row(1)), caller.ask(row(2)))
    assert (first["y"].tolist(), second["y"].tolist()) == ([[1]], [[2]])


async def test_an_error_that_was_not_raised_on_purpose_tells_the_caller_nothing() -> None:
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context["exception"]))

    def run(inputs: Mapping[str, Array]) -> Outputs:
        raise ZeroDivisionError("/secret/path")

    async with batching(run) as caller:
        error = await caller.ask(row(1))
    assert (type(error), error.message) == (LeptonError, "internal error")
    assert isinstance(reported[0], ZeroDivisionError)


async def test_an_answer_that_cannot_be_written_harms_no_other() -> None:
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context["exception"]))
    async with batching(Model()) as caller:
        caller.batcher.submit(row(1), NEVER, lambda outcome, waited_s: 1 / 0)  # type: ignore[arg-type]  # it returns nothing
        assert (await caller.ask(row(2)))["y"].tolist() == [[4]]
    assert isinstance(reported[0], ZeroDivisionError)


async def test_closing_finishes_what_is_queued_and_takes_nothing_new() -> None:
    model = Model()
    async with held(model) as (caller, first):
        _, queued = caller.submit(row(1))
        closing = asyncio.create_task(caller.batcher.close(5))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="being unloaded"):
            caller.submit(row(2))
        model.open.set()
        await closing
        assert first.done()
        assert queued.result()["y"].tolist() == [[2]]


async def test_closing_does_not_wait_longer_than_its_grace() -> None:
    model = Model()
    async with held(model) as (caller, first):
        _, queued = caller.submit(row(1))
        await caller.batcher.close(0.01)
        assert isinstance(queued.result(), Unavailable)
        assert not first.done()
        model.open.set()
        assert (await first)["y"].tolist() == [[0]]


async def test_quick_models_run_on_the_loops_thread_and_slow_ones_never() -> None:
    threads: list[int] = []
    pause_s = 0.0

    def run(inputs: Mapping[str, Array]) -> Outputs:
        threads.append(threading.get_ident())
        time.sleep(pause_s)
        return {"y": inputs["x"]}

    async with batching(run) as caller:
        while threading.get_ident() not in threads:
            await caller.ask(row(1))
        pause_s = 0.01
        await caller.ask(row(1))
        await caller.ask(row(1))
    assert threads[0] != threading.get_ident()
    assert threads[-1] != threading.get_ident()


REQUESTS = st.lists(
    st.tuples(
        st.integers(-3, 9),  # its value; negative ones are poison
        st.integers(1, 6),  # rows
        st.integers(1, 2),  # width
        st.sampled_from(["stay", "stay", "stay", "leave", "leave later", "late"]),
    ),
    max_size=25,
)


@settings(max_examples=60)
@given(requests=REQUESTS, slots=st.integers(1, 3), max_rows=st.integers(1, 8))
def test_every_answer_goes_to_its_owner_and_is_the_one_without_batching(
    requests: list[tuple[int, int, int, str]], slots: int, max_rows: int
) -> None:
    async def play() -> None:
        async with batching(Model(), slots=slots, max_rows=max_rows, max_queued_rows=1000) as caller:
            submitted = []
            for turn, (value, rows, width, fate) in enumerate(requests):
                deadline = time.monotonic() - 1 if fate == "late" else NEVER
                work, answer = caller.submit(row(value, rows, width), deadline)
                submitted.append((work, answer))
                if fate == "leave":
                    caller.batcher.cancel(work)
                if turn % 5 == 4:
                    await asyncio.sleep(0)
            for (work, _), (*_, fate) in zip(submitted, requests, strict=True):
                if fate == "leave later":
                    caller.batcher.cancel(work)
            for (_, answer), (value, rows, width, fate) in zip(submitted, requests, strict=True):
                if fate == "stay":
                    check(await answer, value, rows, width)
                elif fate == "late":
                    assert isinstance(await answer, DeadlineExceeded)
            for (_, answer), (value, rows, width, fate) in zip(submitted, requests, strict=True):
                if fate == "leave":
                    assert not answer.done()
                elif fate == "leave later" and answer.done():
                    check(answer.result(), value, rows, width)
            assert caller.batcher.queued_rows == 0

    def check(outcome: Any, value: int, rows: int, width: int) -> None:
        if value < 0:
            assert isinstance(outcome, Invalid)
        else:
            assert outcome["y"].tolist() == [[2 * value] * width] * rows

    asyncio.run(play())
