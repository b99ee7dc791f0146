"""How many requests may be under way at once, found by how long they wait at the worker. Pure: times are arguments.

The signal is the time a request waited for a slot of the worker, which it says itself, and never the round trip:
batches make that longer without anything being wrong. A wait of up to one run is what a busy batcher needs to fill its
next batch; a longer one is a standing queue, which belongs before the fair queue and not behind it.
"""

import math
from collections import deque

_WINDOW_S = 0.1
_MIN_SAMPLES = 4
_STEEPEST = 0.5
_LONGEST_PAUSE_S = 1.0
_SLOWLY, _QUICKLY = 0.05, 0.2
_KEPT = 64
_LOOK_EVERY = 8


class Quantile:
    """A quantile of the last 64 values, looked at with every eighth: none of them counts for much, nor for long."""

    __slots__ = ("_new", "_share", "_values", "value")

    def __init__(self, share: float) -> None:
        self.value = 0.0
        self._share = share
        self._values: deque[float] = deque(maxlen=_KEPT)
        self._new = 0

    @property
    def is_full(self) -> bool:
        return len(self._values) == _KEPT

    def add(self, value: float) -> None:
        self._values.append(value)
        self._new += 1
        if self._new >= _LOOK_EVERY or len(self._values) < _LOOK_EVERY:
            self._new = 0
            self.value = sorted(self._values)[int(len(self._values) * self._share)]


class Service:
    """How long requests of one model take, in seconds from being sent to their answer.

    The run and the wait at the worker are told apart: the one is the model's, the other goes with the load in moments.
    """

    __slots__ = ("_queued_s", "_slow_run_s", "expected_s", "mean_s", "run_s")

    def __init__(self) -> None:
        self.mean_s = 0.0
        self.run_s = Quantile(0.5)
        self._slow_run_s = Quantile(0.97)
        self._queued_s = 0.0
        self.expected_s = 0.0  # what nearly all keep to

    @property
    def is_known(self) -> bool:
        return self.run_s.is_full

    def add(self, seconds: float, queued_s: float) -> None:
        """A request took `seconds`, of which it waited `queued_s` at the worker."""
        self.mean_s += (seconds - self.mean_s) * (_SLOWLY if self.mean_s else 1.0)
        self._queued_s += (queued_s - self._queued_s) * _QUICKLY
        run_s = max(seconds - queued_s, 0.0)
        self.run_s.add(run_s)
        self._slow_run_s.add(run_s)
        self.expected_s = self._slow_run_s.value + self._queued_s


class Concurrency:
    """A limit between `least` and `most` of requests under way. `free` is how many more may start.

    Where most of a window's requests waited too long it shrinks to what would have made them wait just long enough, by
    Little's law; where requests wanted more and few waited, it grows by its square root.
    """

    __slots__ = (
        *("_begins", "_ends", "_late", "_least", "_limit", "_most", "_ratios", "_samples"),
        *("free", "is_short", "value"),
    )

    def __init__(self, first: int, least: int, most: int) -> None:
        self._least = least
        self._most = most
        self._limit = float(first)
        self.value = self.free = first
        self.is_short = False  # whether a request had to wait for it in this window
        self._open(-math.inf)

    @property
    def in_flight(self) -> int:
        return self.value - self.free

    def observe(self, now: float, queued_s: float, target_s: float, run_s: float) -> None:
        """A request was answered that waited `queued_s` at the worker, where `target_s` is enough, and ran `run_s`."""
        if now < self._begins:
            return
        self._samples += 1
        if queued_s > target_s:
            self._late += 1
            self._ratios += (target_s + run_s) / (queued_s + run_s)
        if now < self._ends or self._samples < _MIN_SAMPLES:
            return
        if 2 * self._late > self._samples:
            self._set(max(self._limit * max(_STEEPEST, self._ratios / self._late), self._least))
            # What is under way was sent under the old limit: its answers say nothing of the new one.
            self._open(now + min(queued_s + run_s, _LONGEST_PAUSE_S))
        else:
            if self.is_short:
                self._set(min(self._limit + math.sqrt(self._limit), self._most))
            self._open(now)

    def _set(self, limit: float) -> None:
        self._limit = limit
        self.free += int(limit) - self.value
        self.value = int(limit)

    def _open(self, begins: float) -> None:
        """A new window begins."""
        self._begins = begins
        self._ends = begins + _WINDOW_S
        self._samples = self._late = 0
        self._ratios = 0.0
        self.is_short = False
