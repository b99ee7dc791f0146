"""What a rollout's report plots: shares, errors, latency and evidence over the seconds since its start."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import floor, log10, sqrt

from lepton.evidence import Evidence, Side, evidence_of, figure, percent, worded
from lepton.report_svg import Mark, Plot, Points, bin_width_s
from lepton.rollouts import Decision, Gate, Rollout, WindowPoint

_Z = 1.96  # 95 % of a normal distribution.
# Fewer requests say so little that their interval would fill the plot.
_TELLING = 20
_BEFORE_S = 5.0


@dataclass(frozen=True, slots=True)
class Bin:
    """One version's traffic in a bin that begins at `second`. `refused` are answers of 4xx.

    The percentiles are means of the windows' own, weighted by requests: sketches are not sent, and for a plot that is
    near enough.
    """

    second: float
    requests: int
    judged: int
    errors: int
    refused: int
    p50_ms: float | None
    p99_ms: float | None

    @property
    def error_ratio(self) -> float | None:
        return self.errors / self.judged if self.judged else None

    @property
    def refused_ratio(self) -> float | None:
        return self.refused / self.judged if self.judged else None

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's: the error ratio lies in it with 95 % confidence."""
        return wilson(self.errors, self.judged)


def wilson(errors: int, requests: int) -> tuple[float, float]:
    if requests == 0:
        return 0.0, 1.0
    ratio, square = errors / requests, _Z * _Z / requests
    middle = ratio + square / 2
    reach = _Z * sqrt(ratio * (1 - ratio) / requests + square / (4 * requests))
    return max(0.0, (middle - reach) / (1 + square)), min(1.0, (middle + reach) / (1 + square))


@dataclass(frozen=True)
class Data:
    """A rollout's traffic in bins of `width_s` by version; seconds count from its start."""

    rollout: Rollout
    decisions: Sequence[Decision]
    first: float
    last: float
    width_s: int
    bins: dict[int, list[Bin]]

    def second(self, decision: Decision) -> float:
        return (decision.at - self.rollout.started_at).total_seconds()

    def middle(self, each: Bin) -> float:
        return min(each.second + self.width_s / 2, self.last)

    @property
    def marks(self) -> list[Mark]:
        return [
            Mark(self.second(each), each.number, f"{worded(each.action)}: {each.reason}") for each in self.decisions
        ]

    def judgements(self) -> list[tuple[float, list[Gate]]]:
        """The judge's gates at each decision, and at its last look."""
        found = [(self.second(each), each.gates) for each in self.decisions if each.gates]
        verdict = self.rollout.verdict
        if verdict and verdict.gates:
            second = verdict.second + 1 - self.rollout.started_at.timestamp()
            if not found or second > found[-1][0] + 1:
                found.append((min(second, self.last), verdict.gates))
        return found

    def kinds(self) -> list[tuple[int, str]]:
        """The versions, and how each is drawn; the stable first."""
        stable = [] if self.rollout.stable is None else [(self.rollout.stable, "stable")]
        return [*stable, (self.rollout.version, "candidate")]


def collect(rollout: Rollout, decisions: Sequence[Decision], windows: Sequence[WindowPoint]) -> Data:
    """The windows in bins; those whose callers named the version are left out, as the split had no say in them."""
    start = rollout.started_at
    moments = [0.0, *((each.at - start).total_seconds() for each in decisions)]
    if rollout.finished_at:
        moments.append((rollout.finished_at - start).total_seconds())
    timed = [((each.at - start).total_seconds(), each) for each in windows if not each.forced]
    last = max([*(second + each.seconds for second, each in timed), *moments, 1.0])
    # Enough of the time before to compare with, and not so much that the rollout itself becomes small.
    timed = [(second, each) for second, each in timed if second >= -max(_BEFORE_S, last / 5)]
    first = min([0.0, *(second for second, _ in timed)])
    width = bin_width_s(last - first)
    binned: dict[tuple[int, int], list[WindowPoint]] = defaultdict(list)
    for second, window in timed:
        binned[window.version, floor(second / width)].append(window)
    bins: dict[int, list[Bin]] = defaultdict(list)
    for (version, number), found in sorted(binned.items()):
        bins[version].append(_bin(number * width, found))
    return Data(rollout, decisions, first, last, width, dict(bins))


def _bin(second: float, windows: Sequence[WindowPoint]) -> Bin:
    errors = sum(each.server_errors + each.timeouts for each in windows)
    answered = sum(each.ok + each.client_errors for each in windows)
    return Bin(
        second=second,
        requests=sum(each.requests for each in windows),
        judged=answered + errors,
        errors=errors,
        refused=sum(each.client_errors for each in windows),
        p50_ms=_mean((each.p50_ms, each.requests) for each in windows),
        p99_ms=_mean((each.p99_ms, each.requests) for each in windows),
    )


def _mean(values: Iterable[tuple[float | None, int]]) -> float | None:
    known = [(value, weight) for value, weight in values if value is not None and weight]
    return sum(value * weight for value, weight in known) / sum(weight for _, weight in known) if known else None


def total(bins: Iterable[Bin]) -> Bin:
    """Several bins as one."""
    found = list(bins)
    return Bin(
        second=found[0].second if found else 0,
        requests=sum(each.requests for each in found),
        judged=sum(each.judged for each in found),
        errors=sum(each.errors for each in found),
        refused=sum(each.refused for each in found),
        p50_ms=_mean((each.p50_ms, each.requests) for each in found),
        p99_ms=_mean((each.p99_ms, each.requests) for each in found),
    )


# --- the plots --------------------------------------------------------------------------------------------------------


def shares(data: Data) -> Plot:
    """How much of the traffic each version had."""
    plot = Plot("Share of the live traffic", data.first, data.last, 0, 100, unit=" %", height=200, badges=True)
    steps, now = [(data.first, 0.0)], 0.0
    for decision in data.decisions:
        second = data.second(decision)
        steps += [(second, now), (second, decision.percent)]
        now = decision.percent
    steps.append((data.last, now))
    if data.rollout.stable is not None:
        plot.area([(data.first, 100), (data.last, 100)], "stable")
    plot.area(steps, "candidate")
    return plot


def errors(data: Data) -> Plot:
    """The error ratio of both versions, with the interval that holds it with 95 % confidence; dashed what was refused,
    if anything was."""
    totals = [total(bins) for bins in data.bins.values()]
    telling = [each for bins in [*data.bins.values(), totals] for each in bins if each.judged >= _TELLING]
    # The intervals of few requests would press the lines flat: they are cut off at the top.
    highest = max((100 * max(each.errors, each.refused) / each.judged for each in telling), default=0.0)
    plot = Plot("Requests that failed", data.first, data.last, 0, min(100.0, max(1.6 * highest, 0.5)), unit=" %")
    for version, kind in data.kinds():
        bins = data.bins.get(version, [])
        for run in _unbroken(bins, data.width_s):
            ends = [(data.middle(each), each.interval) for each in run]
            plot.band([(second, 100 * low, 100 * high) for second, (low, high) in ends], kind)
    for version, kind in data.kinds():
        points = _points(data, version, lambda each: None if each.error_ratio is None else 100 * each.error_ratio)
        plot.line(points, kind)
        if refuses(data):
            ratios = _points(data, version, lambda each: each.refused_ratio and 100 * each.refused_ratio)
            plot.line(ratios, f"{kind} dashed")
    _hints(plot, data, _failed)
    return plot


def refuses(data: Data) -> bool:
    """Whether any request was answered with 4xx."""
    return any(each.refused for bins in data.bins.values() for each in bins)


def _failed(each: Bin) -> str:
    told = f"{percent(each.error_ratio)} of {each.judged:,} requests failed"
    return f"{told}, {percent(each.refused_ratio)} refused" if each.refused else told


def latency(data: Data) -> Plot:
    """The median (solid) and the 99th percentile (dashed) of both versions' answers."""
    values = [value for bins in data.bins.values() for each in bins for value in (each.p50_ms, each.p99_ms) if value]
    low, high = min(values, default=1.0), max(values, default=10.0)
    # A version that is many times slower would press the other one flat.
    log = high / low > 30
    bottom = 10 ** floor(log10(low)) if log else 0.0
    plot = Plot("Latency", data.first, data.last, bottom, high * 1.1, unit=" ms", log=log)
    for version, kind in data.kinds():
        plot.line(_points(data, version, lambda each: each.p99_ms), f"{kind} dashed")
        plot.line(_points(data, version, lambda each: each.p50_ms), kind)
    _hints(plot, data, lambda each: f"p50 {_ms(each.p50_ms)}, p99 {_ms(each.p99_ms)}")
    return plot


def evidence(data: Data) -> tuple[Plot, list[tuple[str, str]]] | None:
    """The judge's e-values at its decisions, and each line's class and name; None where there was no judgement."""
    series: dict[tuple[Side, str], list[tuple[float, Evidence]]] = defaultdict(list)
    for second, gates in data.judgements():
        for each in evidence_of(gates):
            series[each.side, f"{each.about}{each.beside}"].append((second, each))
    if not series:
        return None
    # What never was evidence is named; its lines would lie upon each other.
    silent = [about for (side, about), points in sorted(series.items()) if side is Side.AGAINST and _is_silent(points)]
    lines = {
        key: points for key, points in sorted(series.items()) if key not in {(Side.AGAINST, name) for name in silent}
    }
    plot = _evidence_plot(data, [each for points in series.values() for _, each in points])
    legend, counts = [], {Side.AGAINST: 0, Side.FOR: 0}
    for (side, about), points in lines.items():
        kind = f"{side.value} dash{counts[side] % 4}"
        counts[side] += 1
        plot.line([(second, each.value) for second, each in points], kind, dots=True)
        legend.append((kind, f"{'harm' if side is Side.AGAINST else 'proof'}: {about}"))
    if silent:
        legend.append(("none", f"never any harm: {'; '.join(silent)}"))
    return plot, legend


def _is_silent(points: Iterable[tuple[float, Evidence]]) -> bool:
    return all(each.value <= 1.001 for _, each in points)


def _evidence_plot(data: Data, found: Sequence[Evidence]) -> Plot:
    """From none to well beyond the thresholds; what is surer than that is drawn at the edge."""
    high = 10 ** (floor(log10(max(each.threshold for each in found))) + 2)
    plot = Plot("Evidence", data.first, data.last, 0.1, high, log=True, height=230)
    for side, label in ((Side.AGAINST, "taken back from {} on"), (Side.FOR, "proved from {} on")):
        # Beside the stable less is needed than by the past, and the label is that one's.
        thresholds = sorted({each.threshold for each in found if each.side is side and not each.beside})
        for value in thresholds[:1]:
            plot.threshold(value, label.format(figure(value)), side.value, below=side is Side.FOR)
    return plot


def _unbroken(bins: Sequence[Bin], width_s: int) -> list[list[Bin]]:
    """The bins in stretches without a second of silence between them."""
    found: list[list[Bin]] = []
    for each in bins:
        if found and each.second - found[-1][-1].second <= width_s:
            found[-1].append(each)
        else:
            found.append([each])
    return found


def _points(data: Data, version: int, value: Callable[[Bin], float | None]) -> Points:
    points: list[tuple[float, float | None]] = []
    for run in _unbroken(data.bins.get(version, []), data.width_s):
        points += [(data.middle(each), value(each)) for each in run]
        points.append((run[-1].second + data.width_s, None))
    return points


def _hints(plot: Plot, data: Data, told: Callable[[Bin], str]) -> None:
    """Each bin tells its numbers when it is pointed at."""
    lines: dict[float, list[str]] = defaultdict(list)
    for version, _ in data.kinds():
        for each in data.bins.get(version, []):
            lines[each.second].append(f"version {version}: {told(each)}")
    for second, texts in sorted(lines.items()):
        span = f"{figure(second)} to {figure(second + data.width_s)} s after the start"
        plot.hint(second, second + data.width_s, "\n".join([span, *texts]))


def _ms(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g} ms"
