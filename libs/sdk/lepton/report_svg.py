"""Plots as SVG inside a page: scales, axes, lines and bands. Colours are the page's, by class."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from math import ceil, floor, isfinite, log10

from lepton.evidence import duration, figure

WIDTH = 960
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 8, 30
_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 43200, 86400)
_BADGE = 20

Points = Sequence[tuple[float, float | None]]


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from `low` to `high` onto pixels from `start` to `end`. A value outside is drawn at the edge."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        if self.log:
            part = (log10(value) - log10(self.low)) / (log10(self.high) - log10(self.low))
        else:
            part = (value - self.low) / (self.high - self.low)
        return round(self.start + part * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Four to six round values; powers of ten on a logarithmic scale."""
        if self.log:
            powers = range(ceil(log10(self.low) - 1e-9), floor(log10(self.high) + 1e-9) + 1)
            every = max(1, ceil(len(powers) / 6))
            return [10.0**power for power in powers if power % every == 0]
        step = _round_step((self.high - self.low) / 4)
        return [step * count for count in range(ceil(self.low / step), floor(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment that all plots show: its badge, and what it says when pointed at."""

    second: float
    number: int
    text: str


@dataclass
class Plot:
    """One plot, filled from the back to the front. `first` and `last` are seconds from the rollout's start."""

    title: str
    first: float
    last: float
    low: float
    high: float
    unit: str = ""
    log: bool = False
    height: int = 210
    badges: bool = False
    _back: list[str] = field(default_factory=list)
    _front: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        top = TOP + (_BADGE if self.badges else 0)
        self.x = Scale(self.first, max(self.last, self.first + 1), LEFT, WIDTH - RIGHT)
        self.y = Scale(self.low, self.high, self.height - BOTTOM, top, self.log)

    def area(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """The area under the points."""
        ground = self.y(self.low)
        path = [f"{self.x(second)},{self.y(value)}" for second, value in points]
        ends = f"{self.x(points[0][0])},{ground}", f"{self.x(points[-1][0])},{ground}"
        self._back.append(f'<polygon class="area {kind}" points="{ends[0]} {" ".join(path)} {ends[1]}"/>')

    def band(self, points: Sequence[tuple[float, float, float]], kind: str) -> None:
        """What lies between the lower and the upper values."""
        upper = [f"{self.x(second)},{self.y(high)}" for second, _, high in points]
        lower = [f"{self.x(second)},{self.y(low)}" for second, low, _ in reversed(points)]
        if len(points) == 1:  # A lone bin has a width too.
            self._back.append(_line(self.x(points[0][0]), upper[0].split(",")[1], lower[0].split(",")[1], kind))
        else:
            self._back.append(f'<polygon class="band {kind}" points="{" ".join(upper + lower)}"/>')

    def line(self, points: Points, kind: str, *, dots: bool = False) -> None:
        """A line through the points, broken where there is no value; a value alone is a dot."""
        for run in runs(points):
            path = [f"{self.x(second)},{self.y(value)}" for second, value in run]
            if len(run) > 1:
                self._front.append(f'<polyline class="line {kind}" points="{" ".join(path)}"/>')
            if dots or len(run) == 1:
                self._front += [
                    f'<circle class="dot {kind}" cx="{x}" cy="{y}" r="3"/>'
                    for x, _, y in (p.partition(",") for p in path)
                ]

    def threshold(self, value: float, label: str, kind: str, *, below: bool = False) -> None:
        """A line at a height of its own, with what it means above or below its beginning."""
        y = self.y(value)
        self._back.append(f'<line class="threshold {kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        place = f'x="{LEFT + 4}" y="{y + 14 if below else y - 5}"'
        self._front.append(f'<text class="label {kind}" {place}>{escape(label)}</text>')

    def hint(self, first: float, last: float, text: str) -> None:
        """What is told about a span when it is pointed at."""
        left, right, top = self.x(first), self.x(last), self.y(self.high)
        self._front.append(
            f'<rect class="hint" x="{left}" y="{top}" width="{max(right - left, 1):.1f}" '
            f'height="{self.y(self.low) - top:.1f}"><title>{escape(text)}</title></rect>'
        )

    def svg(self, marks: Sequence[Mark]) -> str:
        axes = [*self._y_axis(), *self._x_axis(), *self._marks(marks)]
        parts = "\n".join([*axes[:-1], *self._back, axes[-1], *self._front])
        label = escape(self.title, quote=True)
        return f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{label}">\n{parts}\n</svg>'

    def _y_axis(self) -> list[str]:
        parts = []
        for tick in self.y.ticks():
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(
                f'<text class="tick" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{figure(tick)}{self.unit}</text>'
            )
        return parts

    def _x_axis(self) -> list[str]:
        step = next((each for each in _STEPS_S if (self.last - self.first) / each <= 10), _STEPS_S[-1])
        ground, parts = self.y(self.low), []
        for count in range(ceil(self.first / step), floor(self.last / step) + 1):
            x, second = self.x(count * step), count * step
            label = f"\N{MINUS SIGN}{duration(-second)}" if second < 0 else duration(second)
            parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{ground}" y2="{ground + 4}"/>')
            anchor = "middle" if x < WIDTH - 50 else "end"
            parts.append(f'<text class="tick" x="{x}" y="{ground + 18}" text-anchor="{anchor}">{label}</text>')
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{ground}" y2="{ground}"/>')
        return parts

    def _marks(self, marks: Sequence[Mark]) -> list[str]:
        top, ground = self.y(self.high), self.y(self.low)
        parts = []
        for group in _together([mark for mark in marks if self.first <= mark.second <= self.last], self.x):
            x = self.x(group[0].second)
            text = escape("\n".join(f"{mark.number}: {mark.text}" for mark in group))
            lines = f'<line class="mark" x1="{x}" x2="{x}" y1="{top}" y2="{ground}"/>'
            if self.badges:
                numbers = f"{group[0].number}" + (f"\N{EN DASH}{group[-1].number}" if len(group) > 1 else "")
                width = 10 + 7 * len(numbers)
                lines += f'<rect class="badge" x="{x - width / 2}" y="{top - 20}" width="{width}" height="16" rx="8"/>'
                lines += f'<text class="badge-text" x="{x}" y="{top - 8}" text-anchor="middle">{numbers}</text>'
            parts.append(f"<g><title>{text}</title>{lines}</g>")
        return ["\n".join(parts)]


def runs(points: Points) -> list[list[tuple[float, float]]]:
    """The stretches without a gap."""
    found: list[list[tuple[float, float]]] = [[]]
    for second, value in points:
        if value is None or not isfinite(value):
            found.append([])
        else:
            found[-1].append((second, value))
    return [run for run in found if run]


def bin_width_s(span_s: float, most: int = 120) -> int:
    """The length of a bin, such that there are no more than `most`."""
    return next((each for each in _STEPS_S if span_s / each <= most), ceil(span_s / most))


def _together(marks: Sequence[Mark], x: Scale) -> list[list[Mark]]:
    """The marks in groups whose badges do not overlap."""
    groups: list[list[Mark]] = []
    for mark in marks:
        # A badge of two numbers is up to 45 pixels wide.
        if groups and x(mark.second) - x(groups[-1][0].second) < 46:
            groups[-1].append(mark)
        else:
            groups.append([mark])
    return groups


def _round_step(step: float) -> float:
    """The next larger of 1, 2, 2.5, 5 and 10 times a power of ten."""
    power = 10.0 ** floor(log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * 0.999)


def _line(x: float, upper: str, lower: str, kind: str) -> str:
    return f'<line class="whisker {kind}" x1="{x}" x2="{x}" y1="{upper}" y2="{lower}"/>'
