"""Two rollouts as a real platform tells them: one that goes well, and one that is taken back."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from lepton.policies import PRESETS
from lepton.rollouts import (
    Action,
    ArmView,
    Decision,
    Gate,
    GateState,
    Rollout,
    RolloutState,
    Verdict,
    WindowPoint,
)

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
GOOD = UUID("11111111-1111-4111-8111-111111111111")
BAD = UUID("22222222-2222-4222-8222-222222222222")


@dataclass(frozen=True)
class Story:
    """What the platform answers about a rollout: `looks` one after the other, then the last for ever."""

    looks: tuple[Rollout, ...]
    decisions: tuple[Decision, ...]
    windows: tuple[WindowPoint, ...]


def at(second: float) -> datetime:
    return START + timedelta(seconds=second)


def good() -> Story:
    """Version 2 is as good as version 1, and is walked to all traffic by `fast` in 21 seconds."""
    first, second, third = (0.7, 0.9, 1.1), (0.3, 0.6, 0.8), (0.1, 0.4, 0.7)
    decided = (
        decision(1, 0, "loading", 0, 0, "version 2 of model 'digits' is on its way", actor="alice"),
        decision(2, 2, "shifted", 0, 5, "the mesh acknowledged 5 %"),
        decision(3, 3, "hold", 0, 5, "4 s at this step are not over", gates(harm=first)),
        decision(4, 7, "step", 0, 5, "4 s and 118 requests without harm", gates(harm=first)),
        decision(5, 7, "shifted", 1, 25, "the mesh acknowledged 25 %"),
        decision(6, 9, "hold", 1, 25, "errors are not proved yet", gates(harm=second, proof=(12.0, 61.5))),
        decision(7, 12, "step", 1, 25, "proved no worse in errors and slow", gates(harm=second, proof=(32.0, 61.5))),
        decision(8, 12, "shifted", 2, 50, "the mesh acknowledged 50 %"),
        decision(9, 17, "step", 2, 50, "proved no worse in errors and slow", gates(harm=third, proof=(880.0, 910.0))),
        decision(10, 17, "shifted", 3, 100, "the mesh acknowledged 100 %"),
        decision(11, 21, "promoted", 4, 100, "3 s with all of the traffic without harm"),
    )
    ready = "a worker that has version 2 ready"
    looks = (
        look(GOOD, 2, RolloutState.LOADING, 0, 1, waiting_for=ready),
        look(GOOD, 2, RolloutState.SHIFTING, 5, 1, waiting_for="4 s at this step are not over", harm=first),
        look(GOOD, 2, RolloutState.SHIFTING, 25, 2, waiting_for="proof of errors", harm=second, proof=(12.0, 61.5)),
        look(GOOD, 2, RolloutState.PROMOTED, 100, 4, reason="3 s with all of the traffic without harm"),
    )
    shares = {2: 5.0, 7: 25.0, 12: 50.0, 17: 100.0}
    return Story(looks, decided, windows(2, shares, end=21, error_ratio=0.01, slower=1.0))


def bad() -> Story:
    """Version 3 answers every third request with an error, and is taken back 3 seconds after its first traffic."""
    why = "errors: 31 of 94 requests failed, of version 2 9 of 1790"
    doubtful, sure = (14.5, 1.2, 0.9), (41_250.0, 1.4, 0.9)
    decided = (
        decision(1, 0, "loading", 0, 0, "version 3 of model 'digits' is on its way", actor="alice"),
        decision(2, 2, "shifted", 0, 5, "the mesh acknowledged 5 %"),
        decision(3, 3, "hold", 0, 5, "4 s at this step are not over", gates(harm=doubtful)),
        decision(4, 5, "roll_back", 0, 5, why, gates(harm=sure)),
        decision(5, 5, "failing", 0, 5, why),
        decision(6, 6, "rolled_back", 0, 0, why),
    )
    looks = (
        look(BAD, 3, RolloutState.SHIFTING, 5, 1, waiting_for="4 s at this step are not over", harm=doubtful),
        look(BAD, 3, RolloutState.FAILING, 5, 1, reason=why, harm=sure),
        look(BAD, 3, RolloutState.ROLLED_BACK, 0, 1, reason=why, ended=6),
    )
    return Story(looks, decided, windows(3, {2: 5.0, 6: 0.0}, end=10, error_ratio=0.33, slower=1.3))


def decision(
    number: int,
    second: float,
    action: str,
    stage: int,
    percent: float,
    reason: str,
    gates: list[Gate] | None = None,
    *,
    actor: str = "",
) -> Decision:
    return Decision(
        number=number,
        at=at(second),
        action=action,
        stage=stage,
        percent=percent,
        reason=reason,
        actor=actor,
        gates=gates or [],
    )


def gates(*, harm: tuple[float, ...] = (), proof: tuple[float, ...] = ()) -> list[Gate]:
    """Gates as the judge has them: evidence against the version, evidence for it, and the plain ones."""
    found = []
    for name, value in zip(("errors", "slow_p95", "slow_p99"), harm, strict=False):
        failed = value >= 120
        counts = (31.0, 94.0, 9.0, 1790.0) if failed else (1.0, 118.0, 21.0, 2240.0)
        known = dict(zip(("candidate_bad", "candidate_of", "stable_bad", "stable_of"), counts, strict=True))
        state = GateState.FAILED if failed else GateState.PASSED
        detail = f"{name}: {'worse than the stable' if failed else 'no proof of harm'}"
        found.append(Gate(name=name, state=state, detail=detail, numbers={"evidence": value, "needed": 120.0, **known}))
    for name, value in zip(("errors", "slow_p95"), proof, strict=False):
        state = GateState.PASSED if value >= 20 else GateState.WAITING
        numbers = {"evidence": value, "needed": 20.0, "no_worse": value / 2, "low": value * 1.5}
        found.append(Gate(name=f"proof_{name}", state=state, detail=f"{name}: no worse", numbers=numbers))
    found.append(Gate(name="traffic", state=GateState.PASSED, detail="41 of 30 requests", numbers={"requests": 41}))
    found.append(Gate(name="dwell", state=GateState.WAITING, detail="2 of 4 s", numbers={"seconds": 2, "needed": 4}))
    return found


def look(
    rollout: UUID,
    version: int,
    state: RolloutState,
    percent: float,
    stage: int,
    *,
    waiting_for: str = "",
    reason: str = "",
    harm: tuple[float, ...] = (),
    proof: tuple[float, ...] = (),
    ended: float = 21,
) -> Rollout:
    over = state in (RolloutState.PROMOTED, RolloutState.ROLLED_BACK)
    judged = Verdict(action=Action.HOLD, reason=waiting_for, second=1_767_323_050, gates=gates(harm=harm, proof=proof))
    stable = version - 1
    return Rollout(
        id=rollout,
        tenant="default",
        model="digits",
        version=version,
        stable=stable,
        previous=stable if state == RolloutState.PROMOTED else None,
        strategy=PRESETS["fast"].strategy,
        state=state,
        reason=reason,
        percent=percent,
        stage=stage,
        stages=4,
        waiting_for=waiting_for,
        actor="alice",
        started_at=START,
        finished_at=at(ended) if over else None,
        policy=PRESETS["fast"],
        verdict=judged if harm else None,
        arms=[arm(stable, 100 - percent, 0.011), arm(version, percent, 0.33 if version == 3 else 0.009)]
        if harm
        else [],
    )


def arm(version: int, percent: float, error_ratio: float) -> ArmView:
    return ArmView(
        version=version,
        percent=percent,
        requests_per_s=6 * percent,
        error_ratio=error_ratio,
        error_low=error_ratio * 0.8,
        error_high=error_ratio * 1.25,
        p50_ms=2.1,
        p99_ms=8.4,
    )


def windows(
    version: int, shares: Mapping[int, float], *, end: int, error_ratio: float, slower: float, rate: int = 600
) -> tuple[WindowPoint, ...]:
    """Both versions' seconds, from 8 seconds before the rollout on; the same at each call."""
    chance = random.Random(7)
    points = []
    for second in range(-8, end + 1):
        share = next((share for since, share in sorted(shares.items(), reverse=True) if second >= since), 0.0) / 100
        for number, part, ratio, factor in ((version - 1, 1 - share, 0.01, 1.0), (version, share, error_ratio, slower)):
            requests = round(rate * part * chance.uniform(0.9, 1.1))
            if requests:
                failed = sum(chance.random() < ratio for _ in range(requests))
                points.append(point(second, number, requests, failed, 2.1 * factor * chance.uniform(0.9, 1.15)))
    return tuple(points)


def point(second: int, version: int, requests: int, failed: int, p50_ms: float) -> WindowPoint:
    return WindowPoint(
        at=at(second),
        seconds=1,
        version=version,
        pool="cpu",
        requests=requests,
        ok=requests - failed,
        client_errors=0,
        server_errors=failed,
        timeouts=0,
        shed=0,
        p50_ms=p50_ms,
        p95_ms=p50_ms * 2.4,
        p99_ms=p50_ms * 4.1,
    )
