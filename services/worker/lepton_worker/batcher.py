"""Merges the requests of one version into batches, work-conserving: a free slot never waits while something is queued.

A lone request runs at once, so batching costs it nothing; batches form by themselves while all slots are busy.
Everything happens on the loop's thread, except for `_run_in_slot`.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from lepton_common.errors import DeadlineExceeded, Invalid, LeptonError, Overloaded, Unavailable
from lepton_common.events import Batching
from lepton_common.tensors import Array

from lepton_worker.buckets import ALONE, Batch, Buckets, Done, Key, Outputs, Work
from lepton_worker.slots import Slots
from lepton_worker.usage import Account

Run = Callable[[Mapping[str, Array]], Outputs]

# Handing a batch to a thread and back takes both threads about this long: what is quicker runs on the loop's thread.
_QUICK_S = 200e-6
_SWEEP_S = 0.05  # how late a queued request may hear that its time is up
_SMOOTHING = 0.1
_MAX_SHAPES = 256  # whose run times are remembered
_MAX_SIZES = 1024  # of runs, that are told apart: callers choose them


@dataclass
class Statistics:
    """What a batcher did since it began."""

    succeeded: int = 0
    failed: int = 0
    expired: int = 0
    rejected: int = 0
    cancelled: int = 0
    rows: int = 0
    queue_s: float = 0.0
    run_s: float = 0.0
    request_s: float = 0.0  # from arrival to the end of the run
    isolated: int = 0  # batches that failed and whose members ran again one by one
    last_at_ms: int = 0
    executions: int = 0
    by_size: dict[int, tuple[int, float]] = field(default_factory=dict)  # rows of a run -> (runs, seconds)

    def count(self, works: Sequence[Work], rows: int, started: float, ended: float) -> None:
        """The works ran together, as so many rows, between these times of time.monotonic."""
        elapsed_s = ended - started
        self.executions += 1
        if rows in self.by_size or len(self.by_size) < _MAX_SIZES:
            runs, seconds = self.by_size.get(rows, (0, 0.0))
            self.by_size[rows] = (runs + 1, seconds + elapsed_s)
        arrived = sum([work.arrived for work in works])
        self.run_s += elapsed_s
        self.queue_s += len(works) * started - arrived
        self.request_s += len(works) * ended - arrived
        self.last_at_ms = int(time.time() * 1000)


class Batcher:
    """Runs requests of one version, `slots` batches at a time, one by one when they are not `mergeable`. `account` is
    its tenant's."""

    def __init__(self, run: Run, slots: int, batching: Batching, account: Account, *, mergeable: bool) -> None:
        self.statistics = Statistics()
        self._run = run
        self._slots = slots
        self._account = account
        self._threads = Slots(slots, self._run_in_slot, account)
        self._mergeable = mergeable
        self.limit(batching)
        self._loop = asyncio.get_running_loop()
        self._waiting = Buckets()
        self._retries: deque[Work] = deque()
        self._free_slots = slots
        self._scheduled = False
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False
        self._idle = asyncio.Event()
        self._run_s: dict[Key, float] = {}  # how long runs take, by bucket; smoothed
        self._row_s = 0.0

    @property
    def queued_rows(self) -> int:
        return self._waiting.rows

    def limit(self, batching: Batching) -> None:
        """These limits hold for every request from now on."""
        self._max_rows = batching.max_rows if self._mergeable else 0
        self._max_queued_rows = batching.max_queued_rows

    def submit(self, inputs: dict[str, Array], deadline: float, done: Done) -> Work:
        """`done` is called once, later, on this thread, with the outputs or the error and the seconds that the work
        waited for a slot; never after `cancel`.

        `deadline` is in time.monotonic: work still queued then is not run. Raises Overloaded when the queue is full.
        """
        if self._closed:
            raise Unavailable("the version is being unloaded", retry_after_s=1)
        key, rows = self._bucket_of(inputs)
        queued_rows = self._waiting.rows
        # A request larger than the whole queue is let into an empty one, otherwise it could never run.
        if queued_rows and queued_rows + rows > self._max_queued_rows:
            self.statistics.rejected += 1
            wait_s = queued_rows * self._row_s / self._slots
            raise Overloaded(f"the queue is full: {queued_rows} rows wait", retry_after_s=math.ceil(wait_s) or 1)
        work = Work(inputs, rows, time.monotonic(), deadline, done)
        self._waiting.add(key, work)
        if self._free_slots:
            # Not at once, but after the callbacks that are due already: they may bring rows for the same batch.
            self._schedule()
        else:
            self._watch()
        return work

    def cancel(self, work: Work) -> None:
        """The caller left: queued work is not run, and the result of running work is dropped."""
        if work.done is not None:
            work.done = None
            self.statistics.cancelled += 1
            self._waiting.forget(work)

    async def close(self, grace_s: float) -> None:
        """Nothing new is taken; what is queued or running finishes within `grace_s`, the rest is Unavailable."""
        self._closed = True
        try:
            async with asyncio.timeout(grace_s):
                while self._waiting or self._retries or self._free_slots < self._slots:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            left = [*self._retries, *self._waiting.clear()]
            self._retries.clear()
            for work in left:
                self._finish(work, Unavailable("the version was unloaded before the request could run"))
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._threads.close()
        if self._free_slots == self._slots:
            await asyncio.to_thread(self._threads.join)

    def _bucket_of(self, inputs: Mapping[str, Array]) -> tuple[Key, int]:
        """Which works may run with these inputs, and their rows. Names, datatypes and order are the signature's.

        Without a row a request still takes a place in the queue, so it counts as one.
        """
        if not self._mergeable:
            return ALONE, 1
        key: Key = ()
        rows = -1
        for array in inputs.values():
            shape = array.shape
            if rows < 0:
                rows = shape[0]
            elif rows != shape[0]:
                return ALONE, max(rows, shape[0])
            key += (shape[1:],)
        return (key if 0 < rows < self._max_rows else ALONE), max(rows, 1)

    # --- running ---

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Every free slot has a batch, as long as there is work."""
        self._scheduled = False
        expired: list[Work] = []
        while self._free_slots and (batch := self._next_batch(expired)) is not None:
            if self._run_s.get(batch.key, math.inf) < _QUICK_S:
                outcome, started, ended = self._timed_run(batch)
                if self._accept(batch, outcome, started, ended):
                    self._answer(batch, outcome)
                if self._waiting or self._retries:
                    self._schedule()
                break  # One a turn: the loop serves others in between.
            self._free_slots -= 1
            self._threads.put(batch)
        if not self._waiting and not self._retries and self._free_slots == self._slots:
            self._idle.set()
        elif self._waiting:
            self._watch()
        for work in expired:
            self._expire(work)

    def _next_batch(self, expired: list[Work]) -> Batch | None:
        while self._retries:
            work = self._retries.popleft()
            if work.done is not None:
                return Batch(ALONE, (work,))
        return self._waiting.take(self._max_rows, time.monotonic(), expired)

    def _watch(self) -> None:
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(_SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        """Queued works whose time is up hear so while all slots are busy."""
        self._sweeper = None
        for work in self._waiting.expire(time.monotonic()):
            self._expire(work)
        self._dispatch()

    def _run_in_slot(self, batch: Batch) -> None:
        began_s = time.thread_time()
        outcome = self._timed_run(batch)
        self._loop.call_soon_threadsafe(self._finished, batch, *outcome, time.thread_time() - began_s)

    def _timed_run(self, batch: Batch) -> tuple[Outputs | Exception, float, float]:
        """The batch's outputs or its error, and when it started and ended."""
        outcome: Outputs | Exception
        started = time.monotonic()
        try:
            outcome = self._run(_merged(batch.works))
        except Exception as error:
            outcome = error
        return outcome, started, time.monotonic()

    def _finished(
        self, batch: Batch, outcome: Outputs | Exception, started: float, ended: float, used_s: float
    ) -> None:
        self._free_slots += 1
        self._account.add(used_s, ended)
        accepted = self._accept(batch, outcome, started, ended)
        # The next batch runs while these answers are written.
        self._dispatch()
        if accepted:
            self._answer(batch, outcome)

    def _accept(self, batch: Batch, outcome: Outputs | Exception, started: float, ended: float) -> bool:
        """Whether the outcome can be given to the members; otherwise each of them is to run again by itself.

        One poisonous member must not fail the others: it gets its own error that way.
        """
        works, elapsed_s = batch.works, ended - started
        rows = sum([work.rows for work in works])
        for work in works:
            work.waited_s = started - work.arrived
            if work.timing is not None:
                work.timing.ran(started, ended, rows, len(works))
        self.statistics.count(works, rows, started, ended)
        self._row_s += _SMOOTHING * (elapsed_s / rows - self._row_s)
        if batch.key is not ALONE:
            if len(self._run_s) >= _MAX_SHAPES:
                self._run_s.clear()
            before_s = self._run_s.get(batch.key, elapsed_s)
            self._run_s[batch.key] = before_s + _SMOOTHING * (elapsed_s - before_s)
        if len(works) == 1 or _splits(outcome, rows):
            return True
        self.statistics.isolated += 1
        self._retries.extend(works)
        return False

    # --- answering ---

    def _answer(self, batch: Batch, outcome: Outputs | Exception) -> None:
        if isinstance(outcome, Exception):
            self._finish(batch.works[0], self._told(outcome))
        elif len(batch.works) == 1:
            self._finish(batch.works[0], outcome)
        else:
            start = 0
            for work in batch.works:
                end = start + work.rows
                self._finish(work, {name: array[start:end] for name, array in outcome.items()})
                start = end

    def _finish(self, work: Work, outcome: Outputs | LeptonError) -> None:
        done, work.done = work.done, None
        if done is None:
            return
        if isinstance(outcome, LeptonError):
            self.statistics.failed += not isinstance(outcome, Invalid)
        else:
            self.statistics.succeeded += 1
            self.statistics.rows += work.rows
        try:
            done(outcome, work.waited_s)
        except Exception as error:  # The others of the batch must get their answers.
            self._report(error)

    def _expire(self, work: Work) -> None:
        self.statistics.expired += 1
        self._finish(work, DeadlineExceeded("the deadline passed before the request could run"))

    def _told(self, error: Exception) -> LeptonError:
        """What the caller hears of it: nothing of an error that was not raised on purpose."""
        if isinstance(error, LeptonError):
            return error
        self._report(error)
        return LeptonError("internal error")

    def _report(self, error: Exception) -> None:
        self._loop.call_exception_handler({"message": "a request failed", "exception": error})


def _merged(works: Sequence[Work]) -> dict[str, Array]:
    first = works[0].inputs
    if len(works) == 1:
        return first
    return {name: np.concatenate([work.inputs[name] for work in works]) for name in first}


def _splits(outcome: Outputs | Exception, rows: int) -> bool:
    """Whether the outcome of a batch of so many rows can be given back to its members."""
    return not isinstance(outcome, Exception) and all(array.shape[:1] == (rows,) for array in outcome.values())
