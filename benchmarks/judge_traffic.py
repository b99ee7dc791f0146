"""Simulated traffic of a rollout: two versions' counts and latencies, second by second."""

from dataclasses import dataclass
from functools import cached_property
from math import exp, log
from statistics import NormalDist

import numpy as np
from lepton_common.events import VersionWindow
from lepton_common.sketch import BUCKETS_PER_LOG, ONE_SECOND
from lepton_rollout.judge import Observation
from numpy.typing import NDArray

RATE = 100
# The stable: errors of all requests, and lognormal latencies.
BASE_ERRORS, MEDIAN_MS, SPREAD = 0.01, 50.0, 0.5
BEFORE_S = 120
# A full swing up and down.
PERIOD_S = 120
STALL_MS = 300.0
_START = 1_000_000

Numbers = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class World:
    """What is true: the candidate's odds of an error and its latency, as factors, from the second `onset` on.

    `swing`: by which part both versions' error ratio and latency move up and down. `ramp`: shares of equal length.
    `stalls`: the part of the seconds in which one version's every answer is late, for each version by itself.
    """

    odds: float = 1.0
    latency: float = 1.0
    errors: float = BASE_ERRORS
    swing: float = 0.0
    ramp: tuple[float, ...] = (10.0,)
    onset: int = 0
    stalls: float = 0.0


def usual(quantile: float) -> float:
    """The stable's latency at a quantile, in milliseconds."""
    return MEDIAN_MS * exp(SPREAD * NormalDist().inv_cdf(quantile))


@dataclass(frozen=True)
class Traffic:
    """Seconds of a rollout from `start` on. Arrays are (candidate, stable) by second; latencies lie flat in order."""

    start: int
    shares: Numbers
    requests: Integers
    errors: Integers
    latencies: tuple[Numbers, Numbers]
    before: Observation

    @classmethod
    def of(cls, rng: np.random.Generator, world: World, at: int, seconds: int, share: float | None = None) -> "Traffic":
        """`seconds` of this world from its second `at` on, by its ramp, or at one share."""
        time = np.arange(at, at + seconds)
        wave = 1 + world.swing * np.sin(2 * np.pi * time / PERIOD_S)
        ramp = np.array(world.ramp) if share is None else np.array([share])
        shares = np.repeat(ramp, -(-seconds // len(ramp)))[:seconds]
        total = rng.poisson(RATE, seconds)
        ours = rng.binomial(total, shares / 100)
        requests = np.stack([ours, total - ours])
        harmed = time >= world.onset
        base = world.errors * wave
        odds = np.where(harmed, world.odds, 1.0) * base / (1 - base)
        errors = rng.binomial(requests, np.stack([odds / (1 + odds), base]))
        slower = np.stack([np.where(harmed, world.latency, 1.0), np.ones(seconds)]) * wave**0.5
        late = STALL_MS * (rng.random((2, seconds)) < world.stalls)
        latencies = [
            MEDIAN_MS
            * np.repeat(slower[arm], requests[arm])
            * np.exp(SPREAD * rng.standard_normal(requests[arm].sum()))
            + np.repeat(late[arm], requests[arm])
            for arm in (0, 1)
        ]
        return cls(_START + at, shares, requests, errors, (latencies[0], latencies[1]), _before(rng, world))

    @property
    def seconds(self) -> int:
        return len(self.shares)

    @cached_property
    def _ends(self) -> Integers:
        return np.concatenate([np.zeros((2, 1), dtype=np.int64), np.cumsum(self.requests, axis=1)], axis=1)

    @cached_property
    def _sketches(self) -> tuple[list[dict[int, int]], list[dict[int, int]]]:
        """Each second's latencies by bucket."""
        ours, theirs = (sketches(each, self.requests[arm]) for arm, each in enumerate(self.latencies))
        return ours, theirs

    @cached_property
    def slow(self) -> Integers:
        """How many answers took longer than the stable's usual 95th percentile, and a quarter more."""
        beyond = [np.concatenate([[0], np.cumsum(each > 1.25 * usual(0.95))]) for each in self.latencies]
        return np.stack([np.diff(beyond[arm][self._ends[arm]]) for arm in (0, 1)])

    def _part(self, arm: int, since: int, until: int) -> Numbers:
        return self.latencies[arm][self._ends[arm][since] : self._ends[arm][until]]

    def candidate_ms(self, since: int, until: int) -> Numbers:
        return self._part(0, since, until)

    def observation(self, at: int) -> Observation:
        """What the judge is given of a second."""
        return Observation(self.start + at, self._window(0, at), self._window(1, at))

    def _window(self, arm: int, at: int) -> VersionWindow | None:
        count, bad = int(self.requests[arm][at]), int(self.errors[arm][at])
        if count == 0:
            return None
        return window(2 - arm, count, bad, self._sketches[arm][at])


def bucketed(latencies_ms: Numbers) -> Integers:
    """`sketch.bucket_of`, of many."""
    return np.ceil((np.log(latencies_ms) - log(1e3)) * BUCKETS_PER_LOG + ONE_SECOND).astype(np.int64)


def sketches(latencies_ms: Numbers, requests: Integers) -> list[dict[int, int]]:
    """The latencies of so many requests a second, as a sketch for each second."""
    buckets = bucketed(latencies_ms)
    first, width = int(buckets.min(initial=0)), int(buckets.max(initial=0)) + 1
    width -= first
    places = np.repeat(np.arange(len(requests)), requests) * width + buckets - first
    counts = np.bincount(places, minlength=width * len(requests)).reshape(-1, width)
    answer: list[dict[int, int]] = [{} for _ in requests]
    seconds, found = np.nonzero(counts)
    for second, bucket, count in zip(seconds.tolist(), found.tolist(), counts[seconds, found].tolist(), strict=True):
        answer[second][bucket + first] = count
    return answer


def window(version: int, count: int, bad: int, latency: dict[int, int]) -> VersionWindow:
    # Not validated: these numbers are our own, and there are millions of them.
    return VersionWindow.model_construct(
        version=version, ok=count - bad, server_errors=bad, latency=latency, counters={}
    )


def _before(rng: np.random.Generator, world: World) -> Observation:
    """The stable's two minutes before the rollout, as one window."""
    count = RATE * BEFORE_S
    latencies = MEDIAN_MS * np.exp(SPREAD * rng.standard_normal(count))
    latencies += STALL_MS * np.repeat(rng.random(BEFORE_S) < world.stalls, RATE)
    bad = int(rng.binomial(count, world.errors))
    return Observation(_START - 1, stable=window(1, count, bad, sketches(latencies, np.array([count]))[0]))
