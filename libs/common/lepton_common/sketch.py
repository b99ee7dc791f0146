"""Latencies as counts in logarithmic buckets: any quantile within 1 %, and sketches add up bucket by bucket.

The buckets are DDSketch's (Masson, Rim, Lee: "DDSketch", VLDB 2019): bucket i holds (g^(i-1), g^i] microseconds, with
g = (1 + e) / (1 - e) and the relative error e = 0.01. A sketch is a plain mapping of bucket to count.
"""

from collections.abc import Iterable, Mapping
from math import ceil, exp, log

RELATIVE_ERROR = 0.01
_LOG_GAMMA = log((1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR))
# What the hot path multiplies with: buckets a natural logarithm of seconds, and the bucket of one second.
BUCKETS_PER_LOG = 1 / _LOG_GAMMA
ONE_SECOND = log(1e6) * BUCKETS_PER_LOG
# A microsecond and less, about an hour and more: what is outside is counted at the edge.
_LONGEST_S = 3600.0
FIRST, LAST = 0, ceil(log(_LONGEST_S) * BUCKETS_PER_LOG + ONE_SECOND)

Sketch = Mapping[int, int]


def bucket_of(seconds: float) -> int:
    """The bucket of a latency; one that is no positive number is counted as the fastest."""
    if not seconds > 1e-6:
        return FIRST
    if seconds >= _LONGEST_S:
        return LAST
    return ceil(log(seconds) * BUCKETS_PER_LOG + ONE_SECOND)


def milliseconds_of(bucket: int) -> float:
    """The value that stands for a bucket: within 1 % of every latency in it."""
    gamma = exp(_LOG_GAMMA)
    return 2 * exp(bucket * _LOG_GAMMA) / (gamma + 1) / 1e3


def merged(sketches: Iterable[Sketch]) -> dict[int, int]:
    """One sketch of all the latencies."""
    total: dict[int, int] = {}
    for sketch in sketches:
        for bucket, count in sketch.items():
            total[bucket] = total.get(bucket, 0) + count
    return total


def quantile_bucket(sketch: Sketch, quantile: float) -> int | None:
    """The bucket that holds the quantile (0 to 1); None for an empty sketch."""
    total = sum(sketch.values())
    rank, seen = quantile * (total - 1), 0
    for bucket in sorted(sketch):
        seen += sketch[bucket]
        if seen > rank:
            return bucket
    return None


def quantile_ms(sketch: Sketch, quantile: float) -> float | None:
    """The quantile (0 to 1) in milliseconds; None for an empty sketch."""
    bucket = quantile_bucket(sketch, quantile)
    return None if bucket is None else milliseconds_of(bucket)


def count_above(sketch: Sketch, bucket: int) -> int:
    """How many latencies are in buckets above this one."""
    return sum(count for each, count in sketch.items() if each > bucket)
