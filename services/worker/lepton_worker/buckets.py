"""The queue of one version: works in buckets of those that may run together, counted in rows."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lepton_common.errors import LeptonError
from lepton_common.tensors import Array

from lepton_worker.timing import Timing

Outputs = dict[str, Array]
# What became of the work, and for how many seconds it waited for a slot.
Done = Callable[[Outputs | LeptonError, float], None]
Key = tuple[Any, ...]

ALONE: Key = ("alone",)  # the bucket of works that are never merged


class Work:
    """One request's share of the queue. `done` is None once it is answered, or abandoned by its caller.

    `timing` is that of a traced request.
    """

    __slots__ = ("arrived", "deadline", "done", "inputs", "queued", "rows", "timing", "waited_s")

    def __init__(self, inputs: dict[str, Array], rows: int, arrived: float, deadline: float, done: Done) -> None:
        self.inputs = inputs
        self.rows = rows
        self.arrived = arrived
        self.deadline = deadline
        self.done: Done | None = done
        self.queued = True
        self.waited_s = 0.0
        self.timing: Timing | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Works that run together, all of the bucket `key`."""

    key: Key
    works: Sequence[Work]


class Buckets:
    """Works that wait. `rows` counts those that somebody still waits for."""

    def __init__(self) -> None:
        self.rows = 0
        self._buckets: dict[Key, deque[Work]] = {}

    def __bool__(self) -> bool:
        return bool(self._buckets)

    def add(self, key: Key, work: Work) -> None:
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = deque()
        bucket.append(work)
        self.rows += work.rows

    def forget(self, work: Work) -> None:
        """Nobody waits for the work any more. Its entry goes with the next `take` or `expire`."""
        if work.queued:
            self._leave(work)

    def take(self, max_rows: int, now: float, expired: list[Work]) -> Batch | None:
        """The next works to run together, taken out; None when none is left. Those whose time is up go to `expired`.

        A work of more than `max_rows` comes alone. The buckets take turns.
        """
        while self._buckets:
            key = next(iter(self._buckets))
            bucket = self._buckets.pop(key)
            works = self._take_from(bucket, 0 if key is ALONE else max_rows, now, expired)
            if bucket:
                self._buckets[key] = bucket
            if works:
                return Batch(key, works)
        return None

    def expire(self, now: float) -> list[Work]:
        """Works whose time is up, taken out; the abandoned ones are gone too."""
        expired = []
        for key, bucket in self._buckets.items():
            expired += [work for work in bucket if work.done is not None and work.deadline <= now]
            self._buckets[key] = deque(work for work in bucket if work.done is not None and work.deadline > now)
        for work in expired:
            self._leave(work)
        return expired

    def clear(self) -> list[Work]:
        """Everything is taken out."""
        works = [work for bucket in self._buckets.values() for work in bucket]
        self._buckets.clear()
        self.rows = 0
        return works

    def _take_from(self, bucket: deque[Work], max_rows: int, now: float, expired: list[Work]) -> list[Work]:
        taken: list[Work] = []
        rows = 0
        while bucket:
            work = bucket[0]
            if work.done is None:
                bucket.popleft()
                continue
            if work.deadline <= now:
                expired.append(work)
            elif taken and rows + work.rows > max_rows:
                break
            else:
                taken.append(work)
                rows += work.rows
            self._leave(bucket.popleft())
        return taken

    def _leave(self, work: Work) -> None:
        work.queued = False
        self.rows -= work.rows
