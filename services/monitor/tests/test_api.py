"""monitor as it runs: what callers read and count."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from lepton_common.etcd import EtcdClient
from lepton_common.events import VersionWindow, WindowClosed
from lepton_common.records import Scope
from lepton_monitor.settings import Settings

from .conftest import client, key, serving
from .stand_ins import LoopBus, version, window


@pytest.fixture
async def bus(settings: Settings) -> AsyncIterator[LoopBus]:
    bus = LoopBus()
    async with serving(settings, bus):
        yield bus


@pytest.fixture
async def caller(bus: LoopBus, settings: Settings, etcd: EtcdClient) -> AsyncIterator[httpx.AsyncClient]:
    async with client(settings, await key(etcd, Scope.READ, Scope.TEST)) as caller:
        yield caller


async def closed(bus: LoopBus, first: int, *seconds: tuple[VersionWindow, ...]) -> list[WindowClosed]:
    """These seconds, one after the other from `first` on, are closed."""
    before = len(bus.closed)
    await bus.tell(*(window(first + step, "a", *versions) for step, versions in enumerate(seconds)))
    return await bus.until_closed(before + len(seconds))


async def windows(caller: httpx.AsyncClient, **query: Any) -> list[dict[str, Any]]:
    answer = await caller.get("/v1/windows", params={"model": "digits", **query})
    points: list[dict[str, Any]] = answer.raise_for_status().json()
    return points


def iso(second: float) -> str:
    return datetime.fromtimestamp(second, UTC).isoformat()


async def test_closed_seconds_are_read_by_version_with_percentiles(bus: LoopBus, caller: httpx.AsyncClient) -> None:
    now = int(time.time()) - 3
    await closed(bus, now, (version(1, ms=10, ok=99, server_errors=1), version(2, ms=20, ok=3)), (version(1, ok=1),))
    points = await windows(caller)
    assert [(each["at"], each["seconds"], each["version"]) for each in points] == [
        (iso(now).replace("+00:00", "Z"), 1, 1),
        (iso(now).replace("+00:00", "Z"), 1, 2),
        (iso(now + 1).replace("+00:00", "Z"), 1, 1),
    ]
    assert (points[0]["requests"], points[0]["ok"], points[0]["server_errors"]) == (100, 99, 1)
    assert points[1]["p50_ms"] == pytest.approx(20, rel=0.01)
    assert points[1]["p99_ms"] == pytest.approx(20, rel=0.01)
    assert [each["version"] for each in await windows(caller, version=2)] == [2]
    assert await windows(caller, since=iso(now + 1), limit=1) == points[2:]
    assert await windows(caller, until=iso(now + 1)) == points[:2]
    assert await windows(caller, limit=1) == points[2:]


async def test_minutes_have_every_second_that_is_closed(bus: LoopBus, caller: httpx.AsyncClient) -> None:
    minute = (int(time.time()) - 300) // 60 * 60
    await closed(bus, minute + 58, (version(1, ok=5),), (version(1, ok=6),), (version(1, server_errors=7),))
    points = await windows(caller, resolution="1m")
    assert [(each["seconds"], each["requests"], each["p50_ms"] is None) for each in points] == [
        (60, 11, False),
        (60, 7, True),
    ]
    assert await windows(caller, since=iso(time.time() - 7200)) == points


async def test_another_tenants_windows_are_not_seen(
    bus: LoopBus, caller: httpx.AsyncClient, settings: Settings, etcd: EtcdClient
) -> None:
    await closed(bus, int(time.time()) - 3, (version(1, ok=1),))
    assert len(await windows(caller)) == 1
    async with client(settings, await key(etcd, Scope.READ, tenant="other")) as stranger:
        assert await windows(stranger) == []


async def test_a_callers_counter_is_in_the_second_in_which_it_was_told(bus: LoopBus, caller: httpx.AsyncClient) -> None:
    await closed(bus, int(time.time()) - 3, (version(1, ok=1),))
    before = int(time.time())
    body = {"model": "digits", "version": 1, "counter": "complaints", "count": 2}
    answers = await asyncio.gather(*(caller.post("/v1/windows/counters", json=body) for _ in range(10)))
    assert {answer.status_code for answer in answers} == {204}
    after = int(time.time())
    counted: dict[int, int] = {}
    while sum(counted.values()) < 20:
        (*_, newest) = await bus.until_closed(len(bus.closed) + 1)
        counted[newest.second] = newest.versions[0].counters["complaints"]
    assert before <= min(counted) <= max(counted) <= after
    assert sum(each["counters"].get("complaints", 0) for each in await windows(caller)) == 20


async def test_counters_join_the_traffic_of_their_second(bus: LoopBus, caller: httpx.AsyncClient) -> None:
    await closed(bus, int(time.time()) - 3, (version(1, ok=1),))
    body = {"model": "digits", "version": 2, "counter": "complaints"}
    assert (await caller.post("/v1/windows/counters", json=body)).status_code == 204
    # Whichever second it was told in, a gateway tells of it as well.
    now = int(time.time())
    await bus.tell(*(window(second, "a", version(2, ok=8)) for second in (now - 1, now)))
    seconds = {each.second: each for each in await bus.until_closed(3)}
    (counted,) = [each for each in seconds.values() if each.versions[0].counters]
    assert [(each.version, each.ok, each.counters) for each in counted.versions] == [(2, 8, {"complaints": 1})]


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ({}, "query.model: Field required"),
        ({"model": "m", "since": "2026-11-01T00:00:00"}, "query.since: Input should have timezone info"),
        ({"model": "m", "since": "2026-11-02T00:00:00Z", "until": "2026-11-01T00:00:00Z"}, "since is after until"),
        ({"model": "m", "limit": "0"}, "query.limit: Input should be greater than or equal to 1"),
        ({"model": "m", "resolution": "2s"}, "query.resolution: Input should be 'auto', '1s' or '1m'"),
    ],
)
async def test_wrong_questions_are_named(caller: httpx.AsyncClient, query: dict[str, str], detail: str) -> None:
    answer = await caller.get("/v1/windows", params=query)
    assert (answer.status_code, answer.json()["detail"]) == (400, detail)


@pytest.mark.parametrize(
    ("change", "status", "detail"),
    [
        (
            {"model": "unheard-of"},
            404,
            "model 'unheard-of' has had no requests yet, so there is nothing to count beside",
        ),
        ({"counter": "Not A Name"}, 400, "body.counter: String should match pattern '^[a-z][a-z0-9_]{0,62}$'"),
        ({"count": 0}, 400, "body.count: Input should be greater than or equal to 1"),
        ({"version": 0}, 400, "body.version: Input should be greater than or equal to 1"),
    ],
)
async def test_wrong_counters_are_named(
    caller: httpx.AsyncClient, change: dict[str, Any], status: int, detail: str
) -> None:
    body = {"model": "digits", "version": 1, "counter": "complaints"} | change
    answer = await caller.post("/v1/windows/counters", json=body)
    assert (answer.status_code, answer.json()["detail"]) == (status, detail)


async def test_scopes_are_asked_for(bus: LoopBus, settings: Settings, etcd: EtcdClient) -> None:
    body = {"model": "digits", "version": 1, "counter": "complaints"}
    async with client(settings, await key(etcd, Scope.INFER)) as caller:
        assert (await caller.get("/v1/windows", params={"model": "digits"})).status_code == 403
        assert (await caller.post("/v1/windows/counters", json=body)).status_code == 403


async def test_a_span_of_a_year_is_answered_with_what_is_there(bus: LoopBus, caller: httpx.AsyncClient) -> None:
    await closed(bus, int(time.time()) - 3, (version(1, ok=1),))
    year = datetime.now(UTC) - timedelta(days=365)
    assert len(await windows(caller, since=year.isoformat())) == 1
    assert len(await windows(caller, since=year.isoformat(), resolution="1s")) == 1
