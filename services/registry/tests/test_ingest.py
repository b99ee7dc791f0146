"""Pushes by Kafka on the real parts: what any producer writes becomes a version, or it is told why not."""

import asyncio
import hashlib
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import orjson
import pytest
from cloudevents.core.bindings.kafka import to_binary
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from confluent_kafka import OFFSET_BEGINNING, Consumer, Producer, TopicPartition
from lepton.policies import PRESETS
from lepton_common.asked import Ingest
from lepton_common.auth import Caller
from lepton_common.blobs import Blobs
from lepton_common.db import Database, migrate
from lepton_common.errors import Conflict, Forbidden
from lepton_common.foreign import read
from lepton_common.kafka import KafkaBus
from lepton_common.outbound import Outbound
from lepton_common.records import Scope
from lepton_common.telemetry import Telemetry
from lepton_registry import handlers, store_ingests
from lepton_registry.handlers import on_ingest
from lepton_registry.inspector import ChildInspector
from lepton_registry.pushes import Intake
from lepton_registry.runner import Ingests
from lepton_registry.settings import Settings
from lepton_registry.sources import Sources
from lepton_registry.store_ingests import Waiting
from lepton_registry.uploads import Staging

from .conftest import OPERATOR, model_bytes, serving, url_of

KEY = {"authorization": f"Bearer {OPERATOR}"}


class Program:
    """A program that knows Kafka, and nothing of Lepton."""

    def __init__(self, broker: str) -> None:
        self._producer = Producer({"bootstrap.servers": broker, "linger.ms": 0})
        self._consumer = Consumer({"bootstrap.servers": broker, "group.id": "unused", "enable.auto.commit": False})
        partitions = [
            (topic, number) for topic in ("lepton.models", "lepton.audit", "lepton.ingest.dlq") for number in range(6)
        ]
        self._consumer.assign([TopicPartition(*each, OFFSET_BEGINNING) for each in partitions])
        self._told: list[dict[str, Any]] = []

    def ask(self, headers: dict[str, str] | dict[str, bytes], value: Any) -> None:
        data = value if isinstance(value, bytes) else orjson.dumps(value)
        self._producer.produce("lepton.ingest", data, headers=list(headers.items()))
        self._producer.flush(30)

    async def told(self, request: str) -> dict[str, Any]:
        """What came of the request: the event's value with its type, or the dead letter's headers."""
        return await self.first(lambda each: bool(each.get("request", each.get("id")) == request))

    async def first(self, is_meant: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first event or dead letter that is meant, as soon as it is there."""
        async with asyncio.timeout(60):
            while not (found := [each for each in self._told if is_meant(each)]):
                messages: list[Any] = await asyncio.to_thread(self._consumer.consume, 100, 0.05)
                self._told += [_told(each) for each in messages]
        return found[0]

    def close(self) -> None:
        self._consumer.close()


def _told(message: Any) -> dict[str, Any]:
    headers = {name: value.decode() for name, value in message.headers()}
    if message.topic().endswith(".dlq"):
        return headers
    return {**orjson.loads(message.value()), "type": headers["ce_type"]}


@asynccontextmanager
async def registry(settings: Settings, kafka: str, telemetry: Telemetry) -> AsyncIterator[httpx.AsyncClient]:
    bus = KafkaBus(kafka, "registry", telemetry)
    async with serving(settings, bus), httpx.AsyncClient(base_url=url_of(settings), headers=KEY, timeout=30) as client:
        yield client


async def test_what_any_producer_pushes_becomes_a_version_or_it_is_told_why_not(
    settings: Settings, kafka: str, telemetry: Telemetry, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "v2.onnx").write_bytes(model_bytes(2))
    (folder / "bad.onnx").write_bytes(b"not a model")
    allowing = settings.model_copy(update={"ingest_from": f"file://{folder}"})
    async with registry(allowing, kafka, telemetry) as client:
        with closing(Program(kafka)) as program:
            await exchange(client, program, folder)


async def exchange(client: httpx.AsyncClient, program: Program, folder: Path) -> None:
    first = hashlib.sha256(model_bytes(1)).hexdigest()
    (await client.put(f"/v1/artifacts/{first}", content=model_bytes(1))).raise_for_status()
    event = CloudEvent(
        attributes={"id": "build-1", "source": "/ci", "type": "push"}, data={"model": "digits", "sha256": first}
    )
    binary = to_binary(event, JSONFormat())
    for _ in range(2):
        program.ask({**binary.headers, "authorization": KEY["authorization"].encode()}, binary.value)
    done = await program.told("build-1")
    assert (done["type"], done["version"], done["is_new"], done["source"]) == ("IngestFinished", 1, True, "/ci")

    # Forbidden and unreadable messages hold up nobody.
    program.ask({"id": "no-key"}, {"model": "digits", "sha256": first})
    program.ask({"id": "bad-key", "authorization": f"Bearer lp_{'x' * 43}"}, {"model": "digits", "sha256": first})
    program.ask({**KEY, "id": "outside"}, {"model": "digits", "uri": "https://evil.com/m.onnx"})
    program.ask({**KEY, "id": "mistyped"}, {"modle": "digits", "sha256": first})
    program.ask({**KEY, "id": "unknown"}, {"model": "digits", "sha256": "0" * 64})
    program.ask({**KEY, "id": "bad"}, {"model": "digits", "uri": f"file://{folder}/bad.onnx"})
    program.ask({**KEY, "id": "v2"}, {"model": "digits", "uri": f"file://{folder}/v2.onnx", "policy": "careful"})

    second = await program.told("v2")
    assert (second["type"], second["version"], second["is_new"]) == ("IngestFinished", 2, True)
    program.ask({**KEY, "id": "again"}, {"model": "digits", "uri": f"file://{folder}/v2.onnx", "deploy": False})
    again = await program.told("again")
    assert (again["type"], again["version"], again["is_new"]) == ("IngestFinished", 2, False)
    for request, reason in (
        ("unknown", f"no artifact {'0' * 64}"),
        ("bad", "not an ONNX model"),
    ):
        failed = await program.told(request)
        assert (failed["type"], failed["reason"][: len(reason)]) == ("IngestFailed", reason)
    for request, why, error in (
        ("no-key", "forbidden", "no key: send the header authorization"),
        ("bad-key", "forbidden", "unknown API key"),
        ("outside", "forbidden", "uri: https://evil.com:443/m.onnx is not below any prefix"),
        ("mistyped", "undecodable", "Field required"),
    ):
        letter = await program.told(request)
        assert letter["lepton-dlq-reason"] == why
        assert error in letter["lepton-dlq-error"]
        assert not {"authorization", "Authorization"} & letter.keys()

    refused = await program.first(lambda each: each.get("type") == "AccessRefused")
    assert (refused["what"], refused["peer"], refused["status"]) == ("lepton.ingest", "kafka", 401)

    registered = [each for each in program._told if each.get("type") == "VersionRegistered"]
    assert [(each["version"], each["rollout"], each["policy"]) for each in registered] == [
        (1, True, None),
        (2, True, PRESETS["careful"].model_dump(mode="json")),
    ]
    versions = (await client.get("/v1/models/digits/versions")).json()["items"]
    assert [(each["version"], each["sha256"]) for each in versions] == [(1, first), (2, second["sha256"])]


@pytest.fixture
async def db(postgres_dsn: str) -> AsyncIterator[Database]:
    db = Database(postgres_dsn, "registry")
    await migrate(db, "lepton_registry")
    yield db
    await db.close()


def waiting(tenant: str = "default", uri: str = "file:///nowhere/m.onnx", minute: int = 0) -> Waiting:
    return Waiting(
        id=uuid4(),
        tenant=tenant,
        request=f"{tenant}-{minute}",
        source="",
        asked=Ingest(model="digits", uri=uri),
        actor="ci",
        traceparent=None,
        at=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minute),
    )


async def add(db: Database, *ingests: Waiting) -> None:
    async with db.transaction() as tx:
        for each in ingests:
            await store_ingests.add_ingest(tx, each)


async def claim(db: Database, lease_s: float = 60) -> str | None:
    async with db.transaction() as tx:
        claimed = await store_ingests.claim_ingest(tx, lease_s, 2)
    return claimed.request if claimed else None


async def test_one_tenants_many_pushes_leave_room_for_anothers(db: Database) -> None:
    await add(db, *(waiting("loud", minute=minute) for minute in range(5)), waiting("quiet", minute=9))
    assert [await claim(db) for _ in range(4)] == ["loud-0", "quiet-9", "loud-1", None]


async def test_a_push_whose_holder_died_is_taken_over_and_the_old_holder_changes_nothing(db: Database) -> None:
    await add(db, waiting())
    async with db.transaction() as tx:
        lost = await store_ingests.claim_ingest(tx, -1, 2)
    assert lost is not None
    assert await claim(db) == "default-0"
    async with db.transaction() as tx:
        assert not await store_ingests.renew_lease(tx, lost, 60)
        with pytest.raises(Conflict):
            await store_ingests.remove_ingest(tx, lost)
        await store_ingests.put_back(tx, lost, timedelta())
    assert await claim(db) is None


async def test_what_fails_for_a_passing_reason_is_tried_again_and_given_up_in_the_end(
    db: Database, tmp_path: Path, telemetry: Telemetry
) -> None:
    # Nothing listens at port 1.
    source = Sources(["https://localhost:1/"], Outbound(private=True, tls=ssl.create_default_context()))
    intake = Intake(db, Blobs(tmp_path / "blobs"), ChildInspector(10))
    ingests = Ingests(db, Staging(tmp_path / "staging", 1 << 20), source, intake, telemetry, pause_s=0)
    await add(db, waiting(uri="https://localhost:1/m.onnx"))
    running = asyncio.create_task(ingests.run())
    try:
        async with asyncio.timeout(60):
            while not (told := await emitted(db)):
                ingests.wake.set()
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
        await asyncio.wait({running})
    assert told == [
        ("IngestFailed", "given up after 6 tries: host 'localhost' does not answer, or not over TLS as it should")
    ]
    assert await claim(db) is None


async def emitted(db: Database) -> list[tuple[str, str]]:
    async with db.transaction() as tx:
        rows = (await tx.execute("SELECT type, payload FROM outbox ORDER BY seq")).all()
    return [(kind, orjson.loads(payload)["reason"]) for kind, payload in rows]


async def test_a_key_for_some_models_pushes_those_only_and_a_tenant_cannot_pile_up_pushes(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = Caller("default", frozenset({Scope.DEPLOY}), "1", "ci", models=("fraud-*",))
    sources = Sources([], Outbound())

    async def push(model: str) -> None:
        data = orjson.dumps({"model": model, "sha256": "0" * 64})
        message = replace(read([], data), id=uuid4().hex)
        async with db.transaction() as tx:
            await on_ingest(message, caller, tx, sources=sources, at=datetime.now(UTC))

    await push("fraud-eu")
    with pytest.raises(Forbidden, match="for the models fraud-"):
        await push("digits")
    monkeypatch.setattr(handlers, "MOST_WAITING", 1)
    with pytest.raises(Conflict, match="has 1 pushes waiting: replay this one later"):
        await push("fraud-us")
