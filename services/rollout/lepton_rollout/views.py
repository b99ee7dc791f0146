"""What the API shows of rollouts and of what is served. Pure."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from lepton.models import LoadedVersion, ModelLimits, ResponseCache, ServingView, TrafficShare
from lepton.rollouts import Action, ArmView, Decision, MeshView, Replay, Rollout, RolloutState, Verdict, WindowPoint
from lepton_common import sketch
from lepton_common.events import VersionWindow, WindowClosed
from lepton_common.records import Serving, WorkerState

from lepton_rollout import domain
from lepton_rollout.bets import interval
from lepton_rollout.policy import Stage

# What "now" means for a rate: long enough to be steady, short enough to show what just happened.
RECENT_S = 10


def rollout_view(
    rollout: domain.Rollout, serving: Serving | None = None, recent: Sequence[WindowClosed] = ()
) -> Rollout:
    """The rollout; with its serving record and the last windows, also who has how much traffic, and how it fares."""
    return Rollout(
        id=rollout.id,
        tenant=rollout.model.tenant,
        model=rollout.model.model,
        version=rollout.version,
        stable=rollout.stable,
        previous=rollout.previous,
        strategy=rollout.policy.strategy,
        state=RolloutState(rollout.state),
        reason=rollout.reason,
        percent=rollout.walk.percent,
        stage=min(rollout.walk.stage + 1, len(rollout.plan)),
        stages=len(rollout.plan),
        paused=rollout.walk.paused,
        by_hand=serving is not None and serving.hand is not None and rollout.finished_at is None,
        waiting_for=rollout.walk.waiting_for,
        group=rollout.group,
        actor=rollout.actor,
        started_at=rollout.started_at,
        finished_at=rollout.finished_at,
        policy=rollout.policy,
        verdict=rollout.walk.verdict,
        arms=list(_arms(rollout, serving, recent)) if serving else [],
    )


def _arms(rollout: domain.Rollout, serving: Serving, recent: Sequence[WindowClosed]) -> Iterator[ArmView]:
    shares = {share.version: share.percent for share in serving.split}
    seconds = recent[-1].second - recent[0].second + 1 if recent else 0
    for version in dict.fromkeys(each for each in (rollout.stable, rollout.version) if each is not None):
        parts = [each for window in recent for each in window.versions if each.version == version and not each.forced]
        requests = sum(each.requests for each in parts)
        counted = sum(each.requests - each.shed for each in parts)
        errors = sum(each.errors for each in parts)
        refused = sum(each.client_errors for each in parts)
        latency = sketch.merged(each.latency for each in parts)
        low, high = interval(errors, counted) if counted else (None, None)
        yield ArmView(
            version=version,
            percent=shares.get(version, 0.0),
            requests_per_s=requests / seconds if seconds else 0.0,
            error_ratio=errors / counted if counted else None,
            refused_ratio=refused / counted if counted else None,
            error_low=low,
            error_high=high,
            p50_ms=sketch.quantile_ms(latency, 0.5),
            p99_ms=sketch.quantile_ms(latency, 0.99),
        )


def window_points(windows: Iterable[WindowClosed]) -> list[WindowPoint]:
    """Every version's seconds, in order."""
    return [_point(window.second, each) for window in windows for each in window.versions]


def _point(second: int, version: VersionWindow) -> WindowPoint:
    return WindowPoint(
        at=datetime.fromtimestamp(second, UTC),
        seconds=1,
        version=version.version,
        pool=version.pool,
        forced=version.forced,
        requests=version.requests,
        ok=version.ok,
        client_errors=version.client_errors,
        server_errors=version.server_errors,
        timeouts=version.timeouts,
        shed=version.shed,
        p50_ms=sketch.quantile_ms(version.latency, 0.5),
        p95_ms=sketch.quantile_ms(version.latency, 0.95),
        p99_ms=sketch.quantile_ms(version.latency, 0.99),
        counters=version.counters,
    )


def replay_view(steps: Sequence[tuple[int, Stage, Verdict]], seconds_judged: int) -> Replay:
    """Each change of mind of a judge that saw the same windows; one that never came to an end held."""
    decisions: list[Decision] = []
    before: Verdict | None = None
    for second, stage, verdict in steps:
        if domain.is_news(before, verdict):
            decisions.append(
                Decision(
                    number=len(decisions) + 1,
                    at=datetime.fromtimestamp(second, UTC),
                    action=verdict.action,
                    stage=stage.number,
                    percent=stage.percent,
                    reason=verdict.reason,
                    gates=verdict.gates,
                )
            )
        before = verdict
    second, outcome = (steps[-1][0], steps[-1][2].action) if steps else (0, Action.HOLD)
    return Replay(outcome=outcome, second=second, seconds_judged=seconds_judged, decisions=decisions)


def mesh_view(serving: Serving, virtual_service: dict[str, Any], destination_rule: dict[str, Any]) -> MeshView:
    """The model's objects as the mesh runs them, and who moves its traffic."""
    held_by = serving.hand.by if serving.hand else "rollout"
    return MeshView(
        model=serving.model, held_by=held_by, virtual_service=virtual_service, destination_rule=destination_rule
    )


def serving_view(serving: Serving, workers: Collection[WorkerState]) -> ServingView:
    """What is served of a model, and by which workers."""
    return ServingView(
        tenant=serving.tenant,
        model=serving.model,
        generation=serving.generation,
        stable=serving.stable,
        previous=serving.previous,
        split=[TrafficShare(version=share.version, percent=share.percent) for share in serving.split],
        versions=sorted({each.version for each in serving.versions}),
        workers=[
            LoadedVersion(
                version=loaded.version, worker=worker.id, device=worker.device, state=loaded.state, reason=loaded.reason
            )
            for worker in sorted(workers, key=lambda worker: worker.id)
            for loaded in worker.versions
            if (loaded.tenant, loaded.model) == (serving.tenant, serving.model)
        ],
        cache=serving.cache and ResponseCache(ttl_s=serving.cache.ttl_s, max_bytes=serving.cache.max_bytes),
        limits=ModelLimits(**serving.limits.model_dump()),
    )
