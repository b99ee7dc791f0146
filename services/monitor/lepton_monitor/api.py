"""monitor's HTTP API: what was measured of a model, and counters that callers count themselves."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query
from lepton.models import Name, VersionNumber
from lepton.rollouts import Occurrences, Resolution, WindowPoint
from lepton_common.auth import Caller
from lepton_common.db import Database, Tx
from lepton_common.errors import Invalid, NotFound
from lepton_common.events import VersionWindow
from lepton_common.records import Scope
from lepton_common.sketch import quantile_ms
from lepton_common.types import ModelRef
from lepton_common.web import caller
from pydantic import AwareDatetime

from lepton_monitor import store
from lepton_monitor.domain import CALLERS, Content, by_minute, counted, heard, merge

Reader = Annotated[Caller, caller(Scope.READ)]
Tester = Annotated[Caller, caller(Scope.TEST)]
Limit = Annotated[int, Query(ge=1, le=10_000)]

_QUARTER_S, _HOUR_S, _DAY_S = 900, 3600, 86_400


def router(db: Database, now: Callable[[], datetime]) -> APIRouter:
    """The routes under /v1/windows."""
    routes = APIRouter(prefix="/v1/windows")

    @routes.get("")
    async def list_windows(
        by: Reader,
        model: Name,
        version: VersionNumber | None = None,
        since: AwareDatetime | None = None,
        until: AwareDatetime | None = None,
        resolution: Resolution = Resolution.AUTO,
        limit: Limit = 2000,
    ) -> list[WindowPoint]:
        """A model's traffic by version, the oldest first; of more than `limit` points the newest.

        Without `since` it is the last quarter of an hour by the second, or the last day by the minute.
        """
        ref = by.ref(model)
        first, end, step_s = _span(since, until, resolution, now().timestamp())
        async with db.transaction() as tx:
            found = await (_minutes if step_s == 60 else store.list_seconds)(tx, ref, first, end, limit)
        points = [
            _point(second, step_s, window)
            for second, content in found
            for window in content.versions
            if version in (None, window.version)
        ]
        return points[-limit:]

    @routes.post("/counters", status_code=204)
    async def count(new: Occurrences, by: Tester) -> None:
        """Count events that the platform does not know, in the second in which they are told."""
        at = now()
        async with db.transaction() as tx:
            await _count(tx, by.ref(new.model), new, at)

    return routes


async def _count(tx: Tx, model: ModelRef, new: Occurrences, at: datetime) -> None:
    progress = await store.find_progress(tx, model)
    if progress is None:
        raise NotFound(f"model {model.model!r} has had no requests yet, so there is nothing to count beside")
    second = max(int(at.timestamp()), progress.closed + 1)
    before = await store.find_input(tx, model, second, CALLERS, 0) or Content()
    content = counted(before, new.version, new.counter, new.count)
    await store.save_input(tx, model, second, CALLERS, 0, content, at)
    await store.save_progress(tx, model, heard(progress, CALLERS, second, is_final=True))


async def _minutes(tx: Tx, model: ModelRef, since: int, until: int, limit: int) -> list[tuple[int, Content]]:
    """Minutes, with the seconds that were closed since they were rolled up."""
    rolled_up = await store.get_rolled_up(tx, model)
    minutes = dict(await store.list_minutes(tx, model, since, until, limit))
    newer = await store.list_seconds(tx, model, max(since, rolled_up + 1), until, _HOUR_S)
    for minute, content in by_minute(newer).items():
        minutes[minute] = merge([minutes.get(minute, Content()), content])
    return sorted(minutes.items())[-limit:]


def _span(since: datetime | None, until: datetime | None, resolution: Resolution, now_s: float) -> tuple[int, int, int]:
    """From which second on, before which second, and how many seconds a point spans."""
    end_s = until.timestamp() if until else now_s
    if resolution is Resolution.AUTO:
        begin_s = since.timestamp() if since else end_s - _QUARTER_S
        is_fine = begin_s >= now_s - _HOUR_S and end_s - begin_s <= _QUARTER_S
        resolution = Resolution.SECOND if is_fine else Resolution.MINUTE
    step_s = 1 if resolution is Resolution.SECOND else 60
    begin_s = since.timestamp() if since else end_s - (_QUARTER_S if step_s == 1 else _DAY_S)
    if begin_s > end_s:
        raise Invalid("since is after until")
    return int(begin_s) // step_s * step_s, -int(-end_s // 1), step_s


def _point(second: int, seconds: int, window: VersionWindow) -> WindowPoint:
    return WindowPoint(
        at=datetime.fromtimestamp(second, UTC),
        seconds=seconds,
        version=window.version,
        pool=window.pool,
        forced=window.forced,
        requests=window.requests,
        ok=window.ok,
        client_errors=window.client_errors,
        server_errors=window.server_errors,
        timeouts=window.timeouts,
        shed=window.shed,
        p50_ms=quantile_ms(window.latency, 0.5),
        p95_ms=quantile_ms(window.latency, 0.95),
        p99_ms=quantile_ms(window.latency, 0.99),
        counters=window.counters,
    )
