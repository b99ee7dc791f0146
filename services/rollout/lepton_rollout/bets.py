"""Evidence that may be looked at after every window: e-processes, in plain mathematics.

An e-process is what a bet against a null hypothesis has made of 1. While the hypothesis is true it exceeds 1/alpha with
probability at most alpha, whenever one looks and stops (Ville's inequality); it says nothing when there is no traffic.
Sources: Turner, Grünwald: "Exact anytime-valid confidence intervals for contingency tables" (2023) for the stratified
test; Fisher's noncentral hypergeometric distribution; Shin, Ramdas, Rinaldo: "E-detectors" (2022) for starting late.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp, inf, lgamma, log, log1p, sqrt
from operator import add

# A bet for harm is placed half at once and half spread over all later windows, thinner and thinner: so that a version
# which goes bad after long good service is found nearly as fast as one that was bad from the start.
_SPREAD = 300.0
# The most that a window may add to a bet for harm. Answers of one second hang together (a stall, a full queue, a
# batch), more than independent ones would; so it takes several bad seconds to condemn a version, whatever the traffic.
_ONE_WINDOW = 1.5
# The terms of a sum that are left out: less than this part of the largest.
_NEGLIGIBLE = 1e-13
# So many terms are all added up; beyond this standard deviation they are so smooth that every few of them will do.
_FEW = 64
_SMOOTH = 5.2
# Evidence is shown as a number, not as its logarithm, up to this one.
_LARGEST_LOG = 600.0


@dataclass(frozen=True, slots=True)
class Bet:
    """The wealth of a bet, one logarithm for each alternative, and its history in O(1).

    `log` is the logarithm of the e-process, `peak` its highest value so far, `windows` how many had anything to say.
    """

    logs: tuple[float, ...] = ()
    windows: int = 0
    log: float = 0.0
    peak: float = 0.0

    @property
    def value(self) -> float:
        """The e-process itself, capped to what can be shown."""
        return exp(min(self.log, _LARGEST_LOG))

    @property
    def highest(self) -> float:
        return exp(min(self.peak, _LARGEST_LOG))

    def steady(self, ratios: Sequence[float]) -> "Bet":
        """The bet after a window with these log likelihood ratios, placed whole at the start."""
        logs = tuple(map(add, self.logs or (0.0,) * len(ratios), ratios))
        return self._at(logs, log_mean(logs))

    def alert(self, ratios: Sequence[float]) -> "Bet":
        """The bet after a window, placed half at the start and half over time. What is not placed yet keeps its value,
        and each part is an e-process by itself, so their sum is one; taking less than was won leaves it one."""
        count = self.windows + 1
        placed = log(0.5 * _SPREAD / ((_SPREAD + count - 1) * (_SPREAD + count)))
        unplaced = log(0.5 * _SPREAD / (_SPREAD + count))
        logs = tuple(
            [
                _log_add(each, placed) + min(ratio, _ONE_WINDOW)
                for each, ratio in zip(self.logs or (log(0.5),) * len(ratios), ratios, strict=True)
            ]
        )
        return self._at(logs, _log_add(unplaced, log_mean(logs)))

    def _at(self, logs: tuple[float, ...], now: float) -> "Bet":
        # Written so that a peak that is not a number stays so.
        peak = self.peak if now <= self.peak else now
        return Bet(logs, self.windows + 1, now, peak)


def log_sum(logs: Sequence[float]) -> float:
    """log Σ exp, without overflow."""
    largest = max(logs)
    return largest + log(sum([exp(each - largest) for each in logs]))


def _log_add(one: float, other: float) -> float:
    larger, less = (one, other) if one > other else (other, one)
    return larger + log1p(exp(less - larger))


def log_mean(logs: Sequence[float]) -> float:
    return log_sum(logs) - log(len(logs))


# --- two versions in the same window ----------------------------------------------------------------------------------


def odds_ratios(
    bad: tuple[int, int], of: tuple[int, int], nulls: Sequence[tuple[float, Sequence[float]]]
) -> list[list[float]]:
    """For each null hypothesis (odds ratio, alternatives), log P(alternative) - log P(null) of what was seen.

    `bad` of `of` answers were bad, (candidate, stable). Given the window's totals, the candidate's part of the bad ones
    follows Fisher's noncentral hypergeometric distribution, so whatever makes both versions worse cancels out. Nothing
    is learned from a window without bad answers, or with one version alone.
    """
    total = bad[0] + bad[1]
    if total == 0 or total == of[0] + of[1] or not all(of):
        return [[] for _ in nulls]
    points = [log(odds) for null, alternatives in nulls for odds in (null, *alternatives)]
    scores = [
        bad[0] * point - norm for point, norm in zip(points, log_totals(of[0], of[1], total, points), strict=True)
    ]
    answer, at = [], 0
    for _, alternatives in nulls:
        null, *others = scores[at : at + 1 + len(alternatives)]
        answer.append([other - null for other in others])
        at += 1 + len(alternatives)
    return answer


def log_totals(candidate: int, stable: int, bad: int, points: Sequence[float]) -> list[float]:
    """log Σ_k C(candidate, k) C(stable, bad-k) ψ^k for each log ψ, less a constant that is the same for all of them."""
    low, high = max(0, bad - stable), min(bad, candidate)
    weigh = _polynomial if high - low <= _FEW else _series
    return weigh(_Table(candidate, stable, bad, low, high), points)


@dataclass(frozen=True, slots=True)
class _Table:
    """A window's totals, and the least and the greatest number of bad answers that may be the candidate's."""

    candidate: int
    stable: int
    bad: int
    low: int
    high: int

    def mode(self, odds: float) -> int:
        """The most likely k: the last whose term is not smaller than the one before."""
        a, b = odds - 1, (self.candidate + self.bad + 2) * odds + self.stable - self.bad
        c = (self.candidate + 1) * (self.bad + 1) * odds
        return min(self.high, max(self.low, int(2 * c / (b + sqrt(max(0.0, b * b - 4 * a * c))))))

    def deviation(self, mode: int) -> float:
        """The standard deviation around a mode; 0 near the ends, where it is not known so simply."""
        cells = (mode, self.candidate - mode, self.bad - mode, self.stable - self.bad + mode)
        return sqrt(1 / sum([1 / cell for cell in cells])) if min(cells) > 0 else 0.0

    def grown(self, k: int) -> float:
        """The term of k + 1 divided by the term of k, at even odds."""
        return (self.candidate - k) * (self.bad - k) / ((k + 1) * (self.stable - self.bad + k + 1))

    def term(self, k: int) -> float:
        return -(
            lgamma(k + 1) + lgamma(self.candidate - k + 1) + lgamma(self.bad - k + 1)
            + lgamma(self.stable - self.bad + k + 1)
        )  # fmt: skip


def _polynomial(table: _Table, points: Sequence[float]) -> list[float]:
    """All terms, computed once: the usual window has a few bad answers."""
    middle = table.mode(1.0)
    above, below = [1.0], []
    for k in range(middle, table.high):
        above.append(above[-1] * table.grown(k))
    weight = 1.0
    for k in range(middle - 1, table.low - 1, -1):
        weight /= table.grown(k)
        below.append(weight)
    weights = above[::-1] + below
    answer = []
    for point in points:
        total, odds = 0.0, exp(point)
        for weight in weights:
            total = total * odds + weight
        answer.append(log(total) + table.low * point)
    return answer


def _series(table: _Table, points: Sequence[float]) -> list[float]:
    """The terms around each mode; where the distribution is wide, every h-th of those within 9 standard deviations.

    Given its totals a window's k is a sum of independent coin tosses (the polynomial has real roots only). So with
    h ≤ sd/1.2 the relative error of leaving terms out is below 2 exp(-sd²(1 - cos(2π/h))), that of stopping at 9 sd
    below 2 exp(-40.5/(1 + 3/sd)) (Bernstein): together less than 1e-10, with 22 terms or so whatever the traffic.
    """
    answer, zero = [], None
    for point in points:
        odds = exp(point)
        mode = table.mode(odds)
        deviation = table.deviation(mode)
        if deviation >= _SMOOTH:
            step = int(deviation / 1.2)
            total = step * _every(table, point, mode, step, int(9 * deviation / step) + 1)
        else:
            total = 1 + _each(table, odds, mode)
        term = table.term(mode)
        zero = term if zero is None else zero
        answer.append(term - zero + mode * point + log(total))
    return answer


def _each(table: _Table, odds: float, mode: int) -> float:
    """The sum of all terms but the mode's, as parts of that one."""
    total, weight = 0.0, 1.0
    for k in range(mode, table.high):
        weight *= table.grown(k) * odds
        if weight < _NEGLIGIBLE:
            break
        total += weight
    weight = 1.0
    for k in range(mode - 1, table.low - 1, -1):
        weight /= table.grown(k) * odds
        if weight < _NEGLIGIBLE:
            break
        total += weight
    return total


def _every(table: _Table, point: float, mode: int, step: int, reach: int) -> float:
    """The sum of every `step`-th term within `reach` steps of the mode, as parts of the mode's."""
    one, other, third, fourth = (
        mode + 1,
        table.candidate - mode + 1,
        table.bad - mode + 1,
        table.stable - table.bad + mode + 1,
    )
    base = lgamma(one) + lgamma(other) + lgamma(third) + lgamma(fourth)
    first = -min(reach, (mode - table.low) // step) * step
    last = min(reach, (table.high - mode) // step) * step
    return sum(
        [
            exp(base + d * point - lgamma(one + d) - lgamma(other - d) - lgamma(third - d) - lgamma(fourth + d))
            for d in range(first, last + 1, step)
        ]
    )


# --- one version against a ratio --------------------------------------------------------------------------------------


def ratios_against(bad: int, of: int, null: float, alternatives: Sequence[float]) -> list[float]:
    """log P(alternative) - log P(null) of `bad` in `of` independent answers, for ratios between 0 and 1.

    As long as all alternatives are on one side of `null`, a true ratio that moves about on its other side makes no
    evidence either: what one answer multiplies the bet by is linear in the ratio.
    """
    return [bad * log(each / null) + (of - bad) * (log1p(-each) - log1p(-null)) for each in alternatives]


def times_odds(ratio: float, factor: float) -> float:
    """The ratio whose odds are `factor` times this one's."""
    return factor * ratio / (1 + (factor - 1) * ratio)


@lru_cache(maxsize=4096)
def highest_ratio(bad: float, of: int, level: float) -> float:
    """An upper bound of the true ratio, too low with probability `level` at most (Chernoff). 1 without data."""
    if not of > 0:
        return 1.0
    seen, low, high = bad / of, bad / of, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if of * _divergence(seen, middle) <= -log(level):
            low = middle
        else:
            high = middle
    return high


def _divergence(seen: float, true: float) -> float:
    if true >= 1:
        return 0.0 if seen >= 1 else inf
    left = seen * log(seen / true) if seen > 0 else 0.0
    return left + ((1 - seen) * log((1 - seen) / (1 - true)) if seen < 1 else 0.0)


def interval(errors: int, requests: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a ratio, for people and for looking once. (0, 1) without requests."""
    if requests <= 0:
        return 0.0, 1.0
    z, ratio = 1.959963984540054, errors / requests
    middle = ratio + z * z / (2 * requests)
    reach = z * sqrt(ratio * (1 - ratio) / requests + z * z / (4 * requests * requests))
    scale = 1 + z * z / requests
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


# --- did the split take effect ----------------------------------------------------------------------------------------


def log_mismatch(candidate: int, stable: int, share: float, prior: float = 100.0) -> float:
    """The logarithm of the evidence that requests were not split by `share`: any other share, near it by `prior`,
    against it (a Beta-binomial mixture)."""
    one, other = prior * share, prior * (1 - share)
    seen = _log_beta(one + candidate, other + stable) - _log_beta(one, other)
    return seen - candidate * log(share) - stable * log1p(-share)


def _log_beta(one: float, other: float) -> float:
    return lgamma(one) + lgamma(other) - lgamma(one + other)
