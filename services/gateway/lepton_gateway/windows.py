"""What became of each model's requests, second by second: one structure for the windows and for Prometheus. Pure.

An answer only adds to the current second of its model: a dictionary look-up and an append. When the second is over its
latencies are put into buckets, all at once, it goes to `Windows.closed`, for whoever tells of it, and is added to the
totals that Prometheus reads.

A second is that of the clock at the answer itself, so a process that was frozen labels nothing wrongly. Where the clock
is set back, seconds would come twice: a new epoch begins, as if the gateway had been started again.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import chain
from math import ceil, log

import numpy as np
from lepton_common.sketch import BUCKETS_PER_LOG, FIRST, LAST, ONE_SECOND
from lepton_common.types import ModelRef

# How a request came to its version: by the split, by its number, or it was no inference and is in no window.
SPLIT, FORCED, ASKED = range(3)
CLIENT_GONE = 499
# A 503 of a full queue and a caller that left, told apart from failures and from what a model says. To everyone else
# they are 503 and 499.
QUEUE_FULL, LEFT = 1503, 1499
_OK, _UNAVAILABLE = 200, 503

# Status and bucket in one number, so that an answer costs one increment. No latency has a bucket as high as this.
_STRIDE = 4096
_MAX_USERS = 100_000
_MAX_CLOSED = 5_000


class Outcome(IntEnum):
    """From the best to the worst that may befall a user."""

    OK = 0
    CLIENT_ERROR = 1
    SHED = 2
    TIMEOUT = 3
    SERVER_ERROR = 4


def outcome_of(status: int) -> Outcome:
    """The class of an answer. A status that no model should give, such as a redirect, is the server's error."""
    if 200 <= status < 300:
        return Outcome.OK
    if status in (429, QUEUE_FULL):
        return Outcome.SHED
    if status == 504:
        return Outcome.TIMEOUT
    return Outcome.CLIENT_ERROR if 400 <= status < 500 else Outcome.SERVER_ERROR


class Cell:
    """Answers of one version: how many of each status and latency, and how long they took together.

    `waiting` are the latencies in seconds of answers of status 200 that are not counted yet: see `settle`. `named` are
    those of `counts` that are some user's in `users`; who gave any other is a user of their own.
    """

    __slots__ = ("counts", "named", "seconds", "users", "waiting")

    def __init__(self) -> None:
        self.counts: defaultdict[int, int] = defaultdict(int)
        self.named: defaultdict[int, int] = defaultdict(int)
        self.seconds = 0.0
        self.waiting: list[float] = []
        # By a hash of the user: the worst outcome and the longest latency of all their answers.
        self.users: dict[int, int] = {}

    def settle(self) -> None:
        """Every answer is counted: all at once, which costs a tenth of one by one."""
        if not self.waiting:
            return
        latencies = np.array(self.waiting)
        self.waiting.clear()
        self.seconds += float(latencies.sum())
        # `sketch.bucket_of`, for all of them.
        exact = np.log(np.maximum(latencies, 1e-6)) * BUCKETS_PER_LOG + ONE_SECOND
        buckets = np.clip(np.ceil(exact), FIRST, LAST).astype(np.int64)
        for bucket, count in zip(*np.unique(buckets, return_counts=True), strict=True):
            self.counts[_OK * _STRIDE + int(bucket)] += int(count)

    def add(self, other: "Cell") -> None:
        """The other's answers too, but not its users."""
        other.settle()
        for key, count in other.counts.items():
            self.counts[key] += count
        self.seconds += other.seconds

    def add_user(self, user: int, status: int, bucket: int) -> None:
        """An answer that is counted is that user's. Users beyond so many in a second are nobody in particular."""
        before = self.users.get(user)
        outcome = int(outcome_of(status))
        if before is not None:
            worst, longest = divmod(before, _STRIDE)
            self.users[user] = max(worst, outcome) * _STRIDE + max(longest, bucket)
        elif len(self.users) < _MAX_USERS:
            self.users[user] = outcome * _STRIDE + bucket
        else:
            return
        self.named[status * _STRIDE + bucket] += 1

    def by_status(self) -> dict[int, int]:
        """How many of each status that callers saw."""
        found: dict[int, int] = {}
        for key, count in self.counts.items():
            status = key // _STRIDE
            status = _UNAVAILABLE if status == QUEUE_FULL else status
            found[status] = found.get(status, 0) + count
        return found

    def latency(self) -> dict[int, int]:
        """The sketch of all latencies."""
        return _latency(self.counts.items())

    def outcomes(self) -> dict[Outcome, int]:
        return _outcomes(self.counts.items())

    def user_outcomes(self) -> dict[Outcome, int]:
        """Of all users, those of their own included."""
        found = _outcomes(self._unnamed())
        for value in self.users.values():
            outcome = Outcome(value // _STRIDE)
            found[outcome] = found.get(outcome, 0) + 1
        return found

    def user_latency(self) -> dict[int, int]:
        return _latency(chain(((value, 1) for value in self.users.values()), self._unnamed()))

    def _unnamed(self) -> list[tuple[int, int]]:
        rest = ((key, count - self.named.get(key, 0)) for key, count in self.counts.items())
        return [(key, count) for key, count in rest if count]


def _outcomes(counts: Iterable[tuple[int, int]]) -> dict[Outcome, int]:
    found: dict[Outcome, int] = {}
    for key, count in counts:
        outcome = outcome_of(key // _STRIDE)
        found[outcome] = found.get(outcome, 0) + count
    return found


def _latency(counts: Iterable[tuple[int, int]]) -> dict[int, int]:
    sketch: dict[int, int] = {}
    for key, count in counts:
        bucket = min(key % _STRIDE, LAST)
        sketch[bucket] = sketch.get(bucket, 0) + count
    return sketch


@dataclass(slots=True)
class Shadowing:
    """One second of a shadowed version beside the stable one."""

    version: int
    agreed: int = 0
    disagreed: int = 0
    both_right: int = 0
    both_wrong: int = 0
    only_stable_right: int = 0
    only_shadow_right: int = 0
    failed: int = 0
    dropped: int = 0
    latency: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Closed:
    """One second of a model, over. `split` and `forced` are by the version that answered, as the mesh says it.

    `refused` never went to the mesh, `left` are callers that did not wait. `pools` are where the versions run.
    `sticky`: users stay on their version, so they are what is counted.
    """

    ref: ModelRef
    epoch: int
    second: int
    split: Mapping[bytes, Cell]
    forced: Mapping[bytes, Cell]
    refused: int
    left: int
    in_flight: int
    pools: Mapping[int, str]
    shadow: Shadowing | None
    sticky: bool


class Windows:
    """The current second of every model. `clock` says Unix time; `epoch` tells this life of the gateway from others."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.epoch = int(clock() * 1e3)
        self.second = int(clock())
        self.end = self.second + 1
        self.closed: deque[Closed] = deque()
        self.dropped = 0
        self._awake: dict[ModelRef, Counts] = {}

    def of(self, ref: ModelRef) -> "Counts":
        """The model's counts: those that still wait for answers when it comes back, else new ones."""
        return self._awake.get(ref) or Counts(self, ref)

    def awake(self, counts: "Counts") -> None:
        """The model has requests: its seconds are told, up to the first without any."""
        self._awake[counts.ref] = counts

    def roll(self) -> None:
        """What belongs to a second that is over by the clock is closed. Costs nothing when none is."""
        now = int(self.clock())
        if now != self.second:
            self.close(now)

    def close(self, now: int) -> None:
        """The current second is over, the one that begins is `now`."""
        for counts in list(self._awake.values()):
            if len(self.closed) >= _MAX_CLOSED:
                self.closed.popleft()
                self.dropped += 1
            self.closed.append(counts.close(self.epoch, self.second))
            if not counts.is_awake:
                del self._awake[counts.ref]
        if now <= self.second:
            self.epoch = max(self.epoch + 1, int(self.clock() * 1e3))
        self.second, self.end = now, now + 1


class Counts:
    """One model: its requests under way, its current second, and its totals."""

    __slots__ = (
        *("_left", "_refused", "_totals", "_windows"),
        *("cells", "in_flight", "is_awake", "pools", "ref", "shadow", "sticky"),
    )

    def __init__(self, windows: Windows, ref: ModelRef) -> None:
        self._windows = windows
        self._totals: dict[bytes, Cell] = {}
        self.ref = ref
        self.in_flight = 0
        self.is_awake = False
        self.pools: Mapping[int, str] = {}
        self.sticky = False
        self._begin()

    def _begin(self) -> None:
        # By how the requests came, then by the version that answered; b"" when none did.
        self.cells: tuple[dict[bytes, Cell], ...] = ({}, {}, {})
        self._refused = 0
        self._left = Cell()
        self.shadow: Shadowing | None = None

    def wake(self) -> None:
        """Called with the first request after a second without any."""
        self._windows.roll()
        self.is_awake = True
        self._windows.awake(self)

    def add(self, kind: int, version: bytes, status: int, seconds: float, user: int | None = None) -> None:
        """An answer was given now. `user` is a hash of who asked, where users stay on their version and this one is
        known."""
        windows = self._windows
        now = windows.clock()
        if not windows.second <= now < windows.end:
            windows.close(int(now))
        cell = self.cells[kind].get(version)
        if cell is None:
            cell = self.cells[kind][version] = Cell()
        if status == _OK and user is None:
            cell.waiting.append(seconds)
            return
        # `sketch.bucket_of`, without the call.
        bucket = ceil(log(seconds) * BUCKETS_PER_LOG + ONE_SECOND) if seconds > 1e-6 else FIRST
        cell.counts[status * _STRIDE + bucket] += 1
        cell.seconds += seconds
        if user is not None:
            cell.add_user(user, status, bucket)

    def left(self, kind: int, seconds: float) -> None:
        """A caller left before the answer: no version's doing as far as anyone knows."""
        if kind == ASKED:
            self.add(ASKED, b"", CLIENT_GONE, seconds)
            return
        self._windows.roll()
        bucket = ceil(log(seconds) * BUCKETS_PER_LOG + ONE_SECOND) if seconds > 1e-6 else FIRST
        self._left.counts[CLIENT_GONE * _STRIDE + bucket] += 1
        self._left.seconds += seconds

    def refused(self) -> None:
        """The gateway itself had no room for a request."""
        self._windows.roll()
        self._refused += 1
        if not self.is_awake:
            self.wake()

    def shadowing(self, version: int) -> Shadowing:
        """The current second of that shadow; the one before it, if another, is forgotten."""
        self._windows.roll()
        if self.shadow is None or self.shadow.version != version:
            self.shadow = Shadowing(version)
            if not self.is_awake:
                self.wake()
        return self.shadow

    def close(self, epoch: int, second: int) -> Closed:
        """The second as it was; it is in the totals, and a new one has begun. Asleep when there was nothing in it."""
        for _, cell in self._current():
            cell.settle()
        split, forced, _ = self.cells
        closed = Closed(
            self.ref,
            epoch,
            second,
            split,
            forced,
            self._refused,
            sum(self._left.counts.values()),
            self.in_flight,
            self.pools,
            self.shadow,
            self.sticky,
        )
        has_traffic = bool(any(self.cells) or self._refused or self._left.counts or self.shadow)
        _gather(self._totals, self._current())
        self._begin()
        self.is_awake = has_traffic or self.in_flight > 0
        return closed

    def totals(self) -> dict[bytes, Cell]:
        """Everything so far by version, the current second included."""
        found: dict[bytes, Cell] = {}
        _gather(found, [*self._totals.items(), *self._current()])
        return found

    def _current(self) -> list[tuple[bytes, Cell]]:
        current = [item for cells in self.cells for item in cells.items()]
        return [*current, (b"", self._left)] if self._left.counts else current


def _gather(into: dict[bytes, Cell], cells: Iterable[tuple[bytes, Cell]]) -> None:
    for version, cell in cells:
        total = into.get(version)
        if total is None:
            total = into[version] = Cell()
        total.add(cell)
