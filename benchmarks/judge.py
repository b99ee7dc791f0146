"""How often the rollout judge is wrong, and how soon it is right, beside two judges of other kinds on the same traffic.

    python -m benchmarks.judge [--rollouts 1000] [--processes 2] [--output benchmarks/results]

Each rollout is simulated traffic of 100 requests a second, judged after every second by the service's own `observe` and
`judge`. Beside it, on the same seconds: a naive test (two proportions, one-sided, 5 %, cumulated and looked at after
every second, of errors and of slow answers, 2.5 % each), and Flagger's rule as its documentation has it (every 60 s:
success rate below 99 % or 99th percentile above 500 ms fails a check, five failed checks in all roll back), once with
those thresholds and once with twice the usual error ratio and latency of this traffic.
"""

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
from lepton.policies import Policy
from lepton.rollouts import Action
from lepton_rollout.judge import Evidence, Observation, baseline, entered, fresh, interval, judge, observe
from lepton_rollout.policy import Kind, Stage, stages
from rich.console import Console
from rich.table import Table

from benchmarks.judge_plot import draw
from benchmarks.judge_traffic import BASE_ERRORS, Traffic, World, usual

SECONDS = 480
RAMP = (1.0, 5.0, 10.0, 25.0, 50.0)
JUDGES = ("Lepton", "naive z-test", "Flagger 99 %, 500 ms", "Flagger, tuned")
# A check of Flagger's, how many of them fail a rollout, and its documentation's thresholds.
CHECK_S, CHECKS, SUCCESS, SLOW_MS = 60, 5, 0.99, 500.0
HARMLESS = {
    "no difference": World(),
    "no difference, base rates swing by 80 %": World(swing=0.8),
    "no difference, swing and ramp from 1 to 50 %": World(swing=0.8, ramp=RAMP),
    "no difference, one second in 200 stalls": World(stalls=0.005),
}
HARMFUL = {
    "error odds x2": World(odds=2),
    "error odds x3": World(odds=3),
    "error odds x5": World(odds=5),
    "error odds x5 after 4 good minutes": World(odds=5, onset=240),
    "every answer an error": World(odds=1e6),
    "latency x1.2": World(latency=1.2),
    "latency x1.5": World(latency=1.5),
    "latency x2": World(latency=2),
    "latency x5": World(latency=5),
}
WALKS = {
    "as good as the stable": World(),
    "as good, base rates swing by 80 %": World(swing=0.8),
    "at the margin: odds x1.5 of a 2 % base": World(odds=1.5, errors=2 * BASE_ERRORS),
    "error odds x2": World(odds=2),
}


@dataclass(frozen=True)
class Call:
    """When a judge rolled back, in seconds since there was harm, and the requests until then; None: it did not."""

    seconds: int
    candidate: int
    total: int


@dataclass(frozen=True)
class Row:
    """One judge in one scenario: the part of the rollouts it rolled back (with its 95 % interval), and medians.

    `early` is the part that it rolled back before there was any harm; those are not among the others.
    """

    judge: str
    early: float
    rolled_back: float
    low: float
    high: float
    seconds: float | None
    candidate_requests: float | None
    requests: float | None


@dataclass(frozen=True)
class Walk:
    """Whole rollouts by the default policy: the parts that were promoted and rolled back, and the median seconds."""

    promoted: float
    rolled_back: float
    waiting: float
    seconds_to_promotion: float | None
    requests_to_promotion: float | None


# --- the judges -------------------------------------------------------------------------------------------------------


def lepton(traffic: Traffic, policy: Policy) -> int | None:
    """The second (from 0) in which the service's judge rolls back. It is asked after every second."""
    evidence, stage, share = fresh(), None, -1.0
    before = baseline([traffic.before])
    for at in range(traffic.seconds):
        if traffic.shares[at] != share:
            share = float(traffic.shares[at])
            stage = Stage(0, Kind.SPLIT, share, dwell_s=1e9, min_requests=100, prove=True)
            evidence = entered(evidence, stage, traffic.start + at - 1, before)
        assert stage is not None
        before_it, evidence = evidence, observe(evidence, traffic.observation(at), stage, policy)
        # Without limits the judge rolls back by the peaks alone, so it need not be asked when none of them rose.
        if _peaks(evidence) != _peaks(before_it) and judge(evidence, stage, policy).action is Action.ROLL_BACK:
            return at
    return None


def _peaks(evidence: Evidence) -> list[float]:
    return [trial.worse.peak + trial.past.peak for trial in evidence.trials.values()]


def naive(traffic: Traffic) -> int | None:
    """The first second after which either cumulated difference has p below 2.5 %."""
    calls = []
    for bad in (traffic.errors, traffic.slow):
        ours, theirs = np.cumsum(bad[0]), np.cumsum(bad[1])
        our_of, their_of = np.cumsum(traffic.requests[0]), np.cumsum(traffic.requests[1])
        with np.errstate(divide="ignore", invalid="ignore"):
            pooled = (ours + theirs) / (our_of + their_of)
            z = (ours / our_of - theirs / their_of) / np.sqrt(pooled * (1 - pooled) * (1 / our_of + 1 / their_of))
        calls += list(np.flatnonzero((z > 1.959964) & (our_of >= 30))[:1])
    return int(min(calls)) if calls else None


def flagger(traffic: Traffic, success: float, slow_ms: float) -> int | None:
    """The second of the fifth failed check. A check without requests fails nothing."""
    failed = 0
    for end in range(CHECK_S, traffic.seconds + 1, CHECK_S):
        requests = int(traffic.requests[0][end - CHECK_S : end].sum())
        errors = int(traffic.errors[0][end - CHECK_S : end].sum())
        latencies = traffic.candidate_ms(end - CHECK_S, end)
        if requests and (1 - errors / requests < success or float(np.quantile(latencies, 0.99)) > slow_ms):
            failed += 1
        if failed >= CHECKS:
            return end - 1
    return None


def called(seed: int, world: World, policy: Policy) -> list[Call | None]:
    """Every judge's call on one rollout's traffic, in the order of JUDGES."""
    traffic = Traffic.of(np.random.default_rng(seed), world, 0, SECONDS)
    tuned = flagger(traffic, 1 - 2 * BASE_ERRORS, 2 * usual(0.99))
    ends = [lepton(traffic, policy), naive(traffic), flagger(traffic, SUCCESS, SLOW_MS), tuned]
    totals = np.cumsum(traffic.requests, axis=1)
    return [
        None if end is None else Call(end + 1 - world.onset, int(totals[0][end]), int(totals[0][end] + totals[1][end]))
        for end in ends
    ]


def rows(calls: list[list[Call | None]]) -> list[Row]:
    answer = []
    for name, each in zip(JUDGES, zip(*calls, strict=True), strict=True):
        made = [call for call in each if call is not None and call.seconds > 0]
        early = sum(call is not None for call in each) - len(made)
        low, high = interval(len(made), len(each))
        answer.append(
            Row(
                name,
                early / len(each),
                len(made) / len(each),
                low,
                high,
                median(call.seconds for call in made) if made else None,
                median(call.candidate for call in made) if made else None,
                median(call.total for call in made) if made else None,
            )
        )
    return answer


# --- whole rollouts ---------------------------------------------------------------------------------------------------


def walked(seed: int, world: World, policy: Policy, longest_s: int) -> tuple[str, int, int]:
    """A rollout by the policy's own stages: how it ended ("waiting" after `longest_s`), its seconds and requests."""
    rng, way = np.random.default_rng(seed), stages(policy, first=False)
    evidence, before, at, requests = fresh(), None, 0, 0
    for stage in way:
        recent: list[Observation] = []
        action = Action.HOLD
        for traffic in _seconds(rng, world, stage, at, longest_s):
            if before is None:
                before = baseline([traffic.before])
            if not recent:
                evidence = entered(evidence, stage, traffic.start - 1, before)
            for index in range(traffic.seconds):
                recent.append(traffic.observation(index))
                evidence = observe(evidence, recent[-1], stage, policy)
                requests += int(traffic.requests[0][index] + traffic.requests[1][index])
                action = judge(evidence, stage, policy).action
                at += 1
                if action is not Action.HOLD:
                    break
            if action is not Action.HOLD:
                break
        else:
            return "waiting", at, requests
        if action is Action.ROLL_BACK:
            return "rolled back", at, requests
        before = baseline(recent)
    return "promoted", at, requests


def _seconds(rng: np.random.Generator, world: World, stage: Stage, at: int, longest_s: int) -> Iterator[Traffic]:
    """Traffic at the stage's share, a minute at a time."""
    while at < longest_s:
        yield Traffic.of(rng, world, at, 60, share=stage.percent)
        at += 60


def walk(ends: list[tuple[str, int, int]]) -> Walk:
    promoted = [(seconds, requests) for how, seconds, requests in ends if how == "promoted"]
    parts = {how: sum(each[0] == how for each in ends) / len(ends) for how in ("promoted", "rolled back", "waiting")}
    seconds = median(each[0] for each in promoted) if promoted else None
    requests = median(each[1] for each in promoted) if promoted else None
    return Walk(parts["promoted"], parts["rolled back"], parts["waiting"], seconds, requests)


# --- the run ----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=1000, help="simulated rollouts for each scenario")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    console, policy, started = Console(), Policy(), perf_counter()
    found: dict[str, list[Row]] = {}
    walks: dict[str, Walk] = {}
    seeds = range(arguments.rollouts)
    with ProcessPoolExecutor(arguments.processes) as pool:
        for name, world in (HARMLESS | HARMFUL).items():
            found[name] = rows(list(pool.map(partial(called, world=world, policy=policy), seeds, chunksize=10)))
            console.print(f"{perf_counter() - started:5.0f} s  {name}: {found[name][0].rolled_back:.1%} rolled back")
        for name, world in WALKS.items():
            ends = partial(walked, world=world, policy=policy, longest_s=3600)
            walks[name] = walk(list(pool.map(ends, seeds[: max(1, len(seeds) // 10)], chunksize=5)))
            console.print(f"{perf_counter() - started:5.0f} s  {name}: {walks[name].promoted:.1%} promoted")
    show(console, found, walks)
    result = {
        "rollouts": arguments.rollouts,
        "seconds": SECONDS,
        "policy": policy.model_dump(mode="json"),
        "scenarios": {name: [asdict(row) for row in each] for name, each in found.items()},
        "walks": {name: asdict(each) for name, each in walks.items()},
    }
    (arguments.output / "judge.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, list(HARMLESS), arguments.output / "judge.png")


def show(console: Console, found: dict[str, list[Row]], walks: dict[str, Walk]) -> None:
    table = Table("", *JUDGES, title="rolled back; median seconds (requests of the candidate / of both) until then")
    for name, each in found.items():
        table.add_row(name, *[_cell(row) for row in each])
    console.print(table)
    table = Table("whole rollouts, default policy", "promoted", "rolled back", "waiting", "median s", "median requests")
    for name, ended in walks.items():
        parts = [f"{part:.1%}" for part in (ended.promoted, ended.rolled_back, ended.waiting)]
        table.add_row(name, *parts, _number(ended.seconds_to_promotion), _number(ended.requests_to_promotion))
    console.print(table)


def _cell(row: Row) -> str:
    until = f"{_number(row.seconds)} s ({_number(row.candidate_requests)} / {_number(row.requests)})"
    early = f" ({row.early:.1%} too early)" if row.early else ""
    return f"{row.rolled_back:.1%}{early}" + (f"; {until}" if row.seconds is not None else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


if __name__ == "__main__":
    main()
