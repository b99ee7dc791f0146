"""The whole registry on real parts: a push is told, heard and found on the timeline, also when a part was away."""

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
from lepton.processes import running
from lepton.servers import Etcd, Postgres
from lepton_common import envelope
from lepton_common.events import RolloutFinished
from lepton_common.kafka import KafkaBus
from lepton_common.telemetry import Telemetry
from lepton_registry.settings import Settings

from .conftest import OPERATOR, RecordingBus, model_bytes, serving, until, url_of


async def test_pushed_and_promoted_model_has_its_story_on_the_timeline(
    settings: Settings, kafka: str, telemetry: Telemetry
) -> None:
    bus = KafkaBus(kafka, "registry", telemetry)
    data = model_bytes()
    digest = hashlib.sha256(data).hexdigest()
    headers = {"authorization": f"Bearer {OPERATOR}"}
    async with serving(settings, bus), httpx.AsyncClient(base_url=url_of(settings), headers=headers) as client:
        (await client.put(f"/v1/artifacts/{digest}", content=data)).raise_for_status()
        (await client.post("/v1/models/digits/versions", json={"sha256": digest})).raise_for_status()
        finished = RolloutFinished(
            tenant="default", model="digits", rollout=uuid4(), version=1, outcome="promoted", reason="all ready"
        )
        # Twice, as Kafka may: the effect is one.
        await bus.send([envelope.encode(finished, "rollout")] * 2)

        async def entries() -> list[dict[str, Any]]:
            page = (await client.get("/v1/models/digits/timeline")).raise_for_status().json()
            return list(page["items"])

        async def is_all_told() -> bool:
            return len(await entries()) >= 4

        await until(is_all_told, within_s=60)
        story = ["ModelCreated", "VersionRegistered", "RolloutFinished", "VersionPromoted"]
        assert [each["type"] for each in await entries()] == story
        assert [each["reason"] for each in await entries()] == ["", "", "all ready", ""]
        model = (await client.get("/v1/models/digits")).json()
        assert model["aliases"] == {"production": 1}
        assert (await client.get("/v1/models/digits/versions/1")).json()["state"] == "promoted"


async def test_push_is_taken_while_kafka_is_away_and_told_later(
    settings: Settings, kafka: str, telemetry: Telemetry
) -> None:
    away = KafkaBus("127.0.0.1:1", "registry", telemetry)
    bus = KafkaBus(kafka, "back", telemetry)
    data = model_bytes()
    digest = hashlib.sha256(data).hexdigest()
    headers = {"authorization": f"Bearer {OPERATOR}"}
    async with serving(settings, away), httpx.AsyncClient(base_url=url_of(settings), headers=headers) as client:
        (await client.put(f"/v1/artifacts/{digest}", content=data)).raise_for_status()
        assert (await client.post("/v1/models/late/versions", json={"sha256": digest})).status_code == 201
    async with serving(settings, bus), httpx.AsyncClient(base_url=url_of(settings), headers=headers) as client:

        async def is_told() -> bool:
            return len((await client.get("/v1/models/late/timeline")).json()["items"]) == 2

        await until(is_told, within_s=60)


async def test_commands_say_try_again_while_a_part_is_away_and_work_when_it_is_back(
    settings: Settings, tmp_path: Path
) -> None:
    postgres, etcd = Postgres(tmp_path / "postgres"), Etcd(tmp_path / "etcd")
    headers = {"authorization": f"Bearer {OPERATOR}"}
    with running(postgres) as database, running(etcd) as table, ExitStack() as again:
        own = settings.model_copy(update={"postgres_dsn": postgres.dsn, "etcd": etcd.address})
        async with (
            serving(own, RecordingBus()),
            httpx.AsyncClient(base_url=url_of(own), headers=headers, timeout=30) as client,
        ):
            for part, path in ((database, "/v1/models"), (table, "/v1/keys")):
                assert (await client.get(path)).status_code == 200
                part.kill()
                away = await client.get(path)
                assert away.status_code == 503
                assert int(away.headers["retry-after"]) >= 1
                assert "is not available" in away.json()["detail"]
                again.enter_context(running(part.recipe))

                async def is_back(path: str = path) -> bool:
                    return (await client.get(path)).status_code == 200

                await until(is_back, within_s=30)
