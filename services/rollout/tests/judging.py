"""A judge's cases: versions' seconds, and what is said of them."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from lepton.policies import Policy
from lepton.rollouts import Action, Gate, Verdict
from lepton_common.events import ShadowWindow, VersionWindow, WindowClosed
from lepton_rollout.judge import (
    Baseline,
    Evidence,
    Observation,
    baseline,
    entered,
    fresh,
    judge,
    observe,
)
from lepton_rollout.policy import Kind, Stage

STABLE, CANDIDATE = 1, 2
FAST, SLOW, SLOWEST = 500, 540, 700
BEGIN = 1000
SPLIT = Stage(0, Kind.SPLIT, 10.0, dwell_s=10, min_requests=100)
PROVING = replace(SPLIT, prove=True)
BAKE = Stage(1, Kind.ALL, 100.0, dwell_s=10, min_requests=100, bake=True)


def arm(version: int, requests: int, errors: int = 0, slow: int = 0, **more: object) -> VersionWindow:
    ok = requests - errors
    latency = {bucket: count for bucket, count in ((FAST, ok - slow), (SLOWEST, slow)) if count}
    return VersionWindow.model_validate(
        {"version": version, "ok": ok, "server_errors": errors, "latency": latency, **more}
    )


def second(
    at: int, ours: tuple[int, int] = (10, 0), theirs: tuple[int, int] = (90, 0), slow: tuple[int, int] = (0, 0)
) -> Observation:
    """A second of (requests, errors) for the candidate and for the stable, and of their slow answers."""
    return Observation(
        at, arm(CANDIDATE, *ours, slow[0]) if ours[0] else None, arm(STABLE, *theirs, slow[1]) if theirs[0] else None
    )


# Two minutes of the stable before any step: 1 % errors, 5 % slower than most.
BEFORE = baseline(
    [Observation(0, stable=VersionWindow(version=STABLE, ok=9900, server_errors=100, latency={FAST: 9400, SLOW: 600}))]
)


def after(
    windows: Iterable[Observation], stage: Stage = SPLIT, policy: Policy | None = None, known: Baseline = BEFORE
) -> Evidence:
    evidence = entered(fresh(), stage, BEGIN, known)
    for window in windows:
        evidence = observe(evidence, window, stage, policy or Policy())
    return evidence


def verdict(
    windows: Iterable[Observation], stage: Stage = SPLIT, policy: Policy | None = None, known: Baseline = BEFORE
) -> Verdict:
    return judge(after(windows, stage, policy, known), stage, policy or Policy())


def gate(given_verdict: Verdict, name: str) -> Gate:
    return next(each for each in given_verdict.gates if each.name == name)


def good(seconds: int, start: int = BEGIN) -> list[Observation]:
    return [second(start + 1 + at) for at in range(seconds)]


def seconds_until(
    action: Action, window: Callable[[int], Observation], stage: Stage = SPLIT, policy: Policy | None = None
) -> int:
    evidence = entered(fresh(), stage, BEGIN, BEFORE)
    for at in range(1, 600):
        evidence = observe(evidence, window(BEGIN + at), stage, policy or Policy())
        if judge(evidence, stage, policy or Policy()).action is action:
            return at
    raise AssertionError(f"no {action} in ten minutes")


def closed(at: int, *versions: VersionWindow, shadow: ShadowWindow | None = None) -> WindowClosed:
    return WindowClosed(tenant="t", model="m", second=at, sequence=at, gateways=1, versions=versions, shadow=shadow)
