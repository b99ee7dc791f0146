"""kill -9 at random instants of many canaries: the process is real, and so are Kafka, PostgreSQL, etcd and Envoy."""

import asyncio
import json
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from lepton_common import envelope
from lepton_common.db import Database
from lepton_common.events import VersionWindow, WindowClosed
from lepton_common.kafka import KafkaBus
from lepton_common.mirror import Mirror
from lepton_common.records import SERVING, Serving
from lepton_common.sketch import bucket_of
from lepton_common.telemetry import Telemetry
from lepton_common.types import ModelRef
from lepton_rollout import store
from lepton_rollout.domain import Rollout, State
from lepton_rollout.record import weights

from .lab import Lab
from .stand_ins import infer
from .test_main import process, registered

# How many instants; more of them by hand: 200 take 18 minutes.
KILLS = int(os.environ.get("LEPTON_KILLS", "12"))
MODELS = [ModelRef("default", f"model-{number}") for number in range(6)]
# A canary of some five seconds.
POLICY = {
    "steps": [10, 50],
    "dwell_s": 1,
    "min_requests": 20,
    "bake_s": 1,
    "judge": {"errors": {"margin": 5, "acceptable": 0.2}, "slow": {"margin": 5, "acceptable": 0.4}},
    "cool_down_s": 0,
}
FAST = bucket_of(0.01)
FIRST_BAD = 1000  # versions from here on fail


@dataclass
class World:
    """What happens around the process while it is killed again and again."""

    lab: Lab
    bus: KafkaBus
    serving: Mirror[Serving]
    client: httpx.AsyncClient
    random: random.Random
    bad_with_everything: set[tuple[str, int]]
    failures: list[str] = field(default_factory=list)
    asked: int = 0
    newest: dict[ModelRef, int] = field(default_factory=dict)

    async def measure(self) -> None:
        """For ever, monitor's part: each second's windows, by the split as it is."""
        sequence = 0
        while True:
            sequence += 1
            second = int(time.time())
            await asyncio.sleep(second + 1 - time.time())
            events = [self._window(serving, second, sequence) for serving in self.serving.items.values()]
            await self.bus.send([envelope.encode(event, "monitor") for event in events])

    def _window(self, serving: Serving, second: int, sequence: int) -> WindowClosed:
        versions = []
        for share in serving.split:
            count = round(200 * share.percent / 100)
            errors = count // 2 if share.version >= FIRST_BAD else 0
            versions.append(
                VersionWindow(version=share.version, ok=count - errors, server_errors=errors, latency={FAST: count})
            )
        return WindowClosed(
            tenant=serving.tenant,
            model=serving.model,
            second=second,
            sequence=sequence,
            gateways=1,
            versions=tuple(versions),
        )

    async def call(self) -> None:
        """For ever: callers of every model, none of whom may fail."""
        while True:
            for model in MODELS:
                answer = await infer(self.client, model)
                self.asked += 1
                if answer.status_code != 200:
                    self.failures.append(f"{model}: {answer.status_code} {answer.text[:100]}")
            await asyncio.sleep(0.02)

    async def start(self, rollout: httpx.AsyncClient) -> None:
        """Every model that has no rollout gets one, of a good version or of a bad one."""
        open_ones = (await rollout.get("/v1/rollouts", params={"limit": 1000})).raise_for_status().json()
        busy = {each["model"] for each in open_ones if each["finished_at"] is None}
        for model in MODELS:
            if model.model in busy:
                continue
            self.newest[model] = version = self.newest[model] + 1
            version += FIRST_BAD if self.random.random() < 0.4 else 0
            await registered(self.bus, model, version)
            body = {"model": model.model, "version": version, "policy": POLICY}
            async with asyncio.timeout(30):
                while (await rollout.post("/v1/rollouts", json=body)).status_code == 404:
                    pass  # until Kafka has told it of the version


@asynccontextmanager
async def world(lab: Lab, bus: KafkaBus, client: httpx.AsyncClient) -> AsyncIterator[World]:
    bad_with_everything: set[tuple[str, int]] = set()

    def seen(key: str, serving: Serving | None) -> None:
        for share in serving.split if serving else ():
            if share.version >= FIRST_BAD and share.percent == 100:
                bad_with_everything.add((key, share.version))

    mirror = Mirror(lab.etcd, SERVING, Serving.model_validate_json, seen)
    following = asyncio.create_task(mirror.run())
    await mirror.synced()
    try:
        yield World(lab, bus, mirror, client, random.Random(11), bad_with_everything)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


@pytest.mark.timeout(3600)
async def test_killed_at_any_instant_every_rollout_ends_as_mesh_etcd_and_table_agree(
    lab: Lab, kafka: str, telemetry: Telemetry, client: httpx.AsyncClient
) -> None:
    await lab.worker("a")
    await lab.worker("b")
    bus = KafkaBus(kafka, "world", telemetry)
    kills = 0
    async with world(lab, bus, client) as around:
        async with process(lab, kafka) as (_, rollout):
            await serve_first_versions(around, rollout)
        async with asyncio.TaskGroup() as group:
            background = [group.create_task(around.measure()), group.create_task(around.call())]
            while kills < KILLS:
                async with process(lab, kafka) as (child, rollout):
                    await around.start(rollout)
                    await asyncio.sleep(around.random.uniform(0, 3))
                    child.kill()
                    kills += 1
            async with process(lab, kafka) as (_, rollout):
                ended = await all_ended(rollout)
                await agree(around)
            for task in background:
                task.cancel()
    await bus.close()

    outcomes = {state: sum(each["state"] == state for each in ended) for state in {each["state"] for each in ended}}
    print(f"\n{kills} kills, {len(ended)} rollouts {outcomes}, {around.asked} requests, {len(around.failures)} failed")
    assert not around.failures, around.failures[:5]
    assert not around.bad_with_everything
    assert set(outcomes) <= {State.PROMOTED, State.ROLLED_BACK}
    assert {each["state"] for each in ended if each["version"] >= FIRST_BAD} <= {State.ROLLED_BACK}
    assert {each["state"] for each in ended if each["version"] < FIRST_BAD} <= {State.PROMOTED}
    await judged_before_promotion(lab, ended)


async def serve_first_versions(around: World, rollout: httpx.AsyncClient) -> None:
    for model in MODELS:
        around.newest[model] = 1
        await registered(around.bus, model, 1)
    async with asyncio.timeout(60):
        for model in MODELS:
            while (await rollout.get(f"/v1/serving/{model.model}")).json().get("stable") is None:
                pass


async def all_ended(rollout: httpx.AsyncClient) -> list[dict[str, Any]]:
    """Every rollout, once all are over."""
    async with asyncio.timeout(300):
        while True:
            found: list[dict[str, Any]] = (await rollout.get("/v1/rollouts", params={"limit": 1000})).json()
            if all(each["finished_at"] for each in found):
                return found
            await asyncio.sleep(0.2)


async def agree(around: World) -> None:
    """The mesh's weights, etcd's split and the table's last word are one. The reapplying may take its ten seconds."""
    folder = around.lab.settings.mesh_dir
    async with asyncio.timeout(30):
        while True:
            routed = mesh_weights(folder)
            wanted = {str(each.ref): weights(each.split) for each in around.serving.items.values()}
            if routed == wanted:
                break
            await asyncio.sleep(0.1)
    for serving in around.serving.items.values():
        last = await last_promoted(around.lab, serving.ref)
        assert [(share.version, share.percent) for share in serving.split] == [(last.version, 100)]


def mesh_weights(folder: Path) -> dict[str, dict[int, int]]:
    """By model, what its last route gives to each version."""
    (routes,) = json.loads((folder / "rds.json").read_text())["resources"]
    found = {}
    for host in routes["virtual_hosts"]:
        route = host["routes"][-1].get("route")
        if route is None:
            continue
        clusters = route["weighted_clusters"]["clusters"]
        found[host["name"]] = {_version(cluster): cluster["weight"] for cluster in clusters}
    return found


def _version(cluster: dict[str, Any]) -> int:
    headers = {each["header"]["key"]: each["header"]["value"] for each in cluster["request_headers_to_add"]}
    return int(headers["x-lepton-version"])


async def last_promoted(lab: Lab, model: ModelRef) -> Rollout:
    db = Database(lab.settings.postgres_dsn, "rollout")
    try:
        async with db.transaction() as tx:
            found = await store.list_rollouts(tx, model.tenant, model.model, 1000)
    finally:
        await db.close()
    return max((each for each in found if each.state is State.PROMOTED), key=lambda each: str(each.finished_at))


async def judged_before_promotion(lab: Lab, ended: list[dict[str, Any]]) -> None:
    """Each canary that was promoted has a verdict to step for every stage, made on numbers."""
    db = Database(lab.settings.postgres_dsn, "rollout")
    try:
        for each in ended:
            if each["state"] != State.PROMOTED or each["stages"] == 1:
                continue
            async with db.transaction() as tx:
                decisions = await store.list_decisions(tx, each["id"])
            steps = [decision for decision in decisions if decision.action == "step"]
            assert len(steps) >= each["stages"], decisions
            assert all(step.gates for step in steps)
    finally:
        await db.close()
