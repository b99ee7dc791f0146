"""What the judge's gates say, for people: evidence against and for a version, its way to a threshold, the numbers."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from math import log10

from lepton.policies import Policy, Strategy, share_of
from lepton.rollouts import Gate, GateState, Rollout, RolloutState

ENDS = {
    RolloutState.PROMOTED: "has all of the traffic",
    RolloutState.ROLLED_BACK: "was taken back",
    RolloutState.ABORTED: "was given up",
    RolloutState.FAILED: "was not deployed",
}
MARKS = {GateState.PASSED: "✓", GateState.WAITING: "…", GateState.FAILED: "✗"}


# What there is of something, and the number that says how much of it is needed.
_NEEDED = {"requests": "needed", "elapsed_s": "needed_s"}
# The numbers of a bet, which are told in a sentence.
_COUNTS = ("candidate_bad", "candidate_of", "stable_bad", "stable_of")
_BETS = {"evidence", "needed", "evidence_against_past", "needed_against_past", *_COUNTS}


class Side(StrEnum):
    AGAINST = "against"
    FOR = "for"


@dataclass(frozen=True, slots=True)
class Evidence:
    """An e-value: what a bet on the claim has made of 1 by now. At `threshold` the claim is believed. `beside` says
    what the version is measured by, where that is not the stable of the same seconds."""

    side: Side
    about: str
    value: float
    threshold: float
    detail: str = ""
    beside: str = ""

    @property
    def progress(self) -> float:
        """How far it is from no evidence (0) to the threshold (1), on a logarithmic scale."""
        # Written so that NaN and what is below 1 count as none.
        if not (self.value > 1 and self.threshold > 1):
            return 0.0
        return min(1.0, log10(self.value) / log10(self.threshold))


def evidence_of(gates: Iterable[Gate]) -> list[Evidence]:
    """The evidence among the gates, that against the version first."""
    found = [each for gate in gates for each in _evidence(gate)]
    return sorted(found, key=lambda each: each.side is Side.FOR)


def plain_gates(gates: Iterable[Gate]) -> list[Gate]:
    """The gates that are no evidence: traffic, time, limits, people."""
    return [each for each in gates if not _evidence(each)]


def _evidence(gate: Gate) -> list[Evidence]:
    """A gate's evidence, if it has any: a bet against the version beside the stable, and one against its past."""
    numbers = gate.numbers
    about = worded(gate.name.removeprefix("proof_"))
    if gate.name.startswith("proof_"):
        told = "proven" if gate.state is GateState.PASSED else "not proven yet"
        return _bet(Side.FOR, about, gate, told)
    if "candidate_bad" not in numbers:
        return []
    bad, of, stable_bad, stable_of = (figure(numbers.get(name, float("nan"))) for name in _COUNTS)
    told = f"{bad} of {of}; the stable {stable_bad} of {stable_of}"
    past = _bet(Side.AGAINST, about, gate, f"{bad} of {of}", "_against_past")
    return _bet(Side.AGAINST, about, gate, told) + [replace(each, beside=", by the past") for each in past]


def _bet(side: Side, about: str, gate: Gate, told: str, suffix: str = "") -> list[Evidence]:
    value, needed = gate.numbers.get(f"evidence{suffix}"), gate.numbers.get(f"needed{suffix}")
    return [] if value is None or needed is None else [Evidence(side, about, value, needed, told)]


def worded(name: str) -> str:
    """A gate's name as words."""
    return name.replace("_", " ")


def numbers_of(gate: Gate) -> str:
    """A gate's numbers in a line."""
    bets = _evidence(gate)
    parts = [f"evidence {figure(each.value)} of {figure(each.threshold)} needed{each.beside}" for each in bets]
    parts += [bets[0].detail] if bets and bets[0].side is Side.AGAINST else []
    others = {name: value for name, value in gate.numbers.items() if not bets or name not in _BETS}
    return ", ".join([*parts, *_counted(others)])


def _counted(numbers: Mapping[str, float]) -> Iterator[str]:
    """Each number with its name; what there is comes with what is needed."""
    needed = {have: of for have, of in _NEEDED.items() if have in numbers and of in numbers}
    for name, value in numbers.items():
        if name in needed:
            yield f"{worded(name.removesuffix('_s'))} {figure(value)} of {_figure_of(needed[name], numbers)} needed"
        elif name not in needed.values():
            yield f"{worded(name.removesuffix('_s'))} {_figure_of(name, numbers)}"


def _figure_of(name: str, numbers: Mapping[str, float]) -> str:
    return figure(numbers[name]) + (" s" if name.endswith("_s") else "")


def figure(value: float) -> str:
    """A number for people: four digits, thousands apart, powers of ten only where it must be."""
    if value != value:
        return "unknown"
    if abs(value) >= 1e7 or 0 < abs(value) < 1e-4:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def percent(ratio: float | None) -> str:
    """A ratio from 0 to 1 as a percentage."""
    if ratio is None:
        return "-"
    return f"{ratio * 100:.3g} %"


def duration(seconds: float) -> str:
    """A length of time in its two largest units."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s" if seconds % 60 else f"{seconds // 60} min"
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def is_over(rollout: Rollout) -> bool:
    return rollout.state in ENDS


def waiting(rollout: Rollout) -> str:
    """What it waits for, as a clause."""
    why = rollout.waiting_for
    return f"it {why}" if why.startswith("waits ") else f"it waits: {why}"


def outcome(rollout: Rollout) -> str:
    """How a rollout stands, as a sentence."""
    name = f"{rollout.model} version {rollout.version}"
    if not is_over(rollout):
        if rollout.by_hand:
            return (
                f"The traffic of {rollout.model} is moved by hand; `lepton rollout resume {rollout.model}` ends that."
            )
        waits = f"; {waiting(rollout)}" if rollout.waiting_for else ""
        state = "paused" if rollout.paused else rollout.state.value
        return f"{name} is {state} at {rollout.percent:g} % of the traffic{waits}."
    took = ""
    if rollout.finished_at:
        took = f" after {duration((rollout.finished_at - rollout.started_at).total_seconds())}"
    why = f": {rollout.reason}" if rollout.reason else ""
    return f"{name} {ENDS[rollout.state]}{took}{why}."


def summary(policy: Policy) -> str:
    """A policy in a line."""
    shares = ", ".join(f"{share_of(step):g}" for step in policy.steps)
    dwell = duration(policy.dwell_s)
    match policy.strategy:
        case Strategy.IMMEDIATE:
            return "immediate: all traffic at once"
        case Strategy.BLUE_GREEN:
            return f"blue-green: ready for {dwell}, then all traffic, watched for {duration(policy.bake_s)}"
        case Strategy.AB:
            part = "what matches a header" if policy.match else f"{share_of(policy.steps[0]):g} %"
            return f"ab: {part} for {duration(policy.duration_s)}"
        case Strategy.SHADOW:
            copies = f"copies of {policy.shadow.percent:g} % for {duration(policy.shadow.dwell_s)}"
            return f"shadow: {copies}, then {shares}, 100 %, {dwell} each"
    return f"canary: {shares}, 100 %, at least {dwell} each"
