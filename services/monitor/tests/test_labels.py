"""Labels as any producer writes them, on the real Kafka: kept once, looked at, dropped when they are old."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import orjson
import pytest
from confluent_kafka import Producer
from lepton_common.auth import Caller
from lepton_common.errors import Forbidden, Invalid
from lepton_common.etcd import EtcdClient
from lepton_common.foreign import Message, read
from lepton_common.kafka import KafkaBus
from lepton_common.records import Scope
from lepton_common.telemetry import Telemetry
from lepton_common.types import ModelRef
from lepton_monitor.handlers import on_label
from lepton_monitor.partitions import drop_partitions
from lepton_monitor.settings import Settings
from lepton_monitor.store_labels import list_labels

from .conftest import client, key, serving
from .lab import Lab
from .stand_ins import START

KEPT = timedelta(days=90)
CALLER = Caller("default", frozenset({Scope.INFER}), "1", "app")


def message(data: dict[str, Any], identity: str = "1", **attributes: str) -> Message:
    cloud = {"ce_id": identity, "ce_source": "/app", "ce_type": "label", "ce_specversion": "1.0"}
    more = {f"ce_{name}": value for name, value in attributes.items()}
    return read([(name, value.encode()) for name, value in (cloud | more).items()], orjson.dumps(data))


async def hear(lab: Lab, told: Message, caller: Caller = CALLER) -> None:
    async with lab.db.transaction() as tx:
        await on_label(told, caller, tx, kept=KEPT, now=lab.clock)


async def kept(lab: Lab) -> list[tuple[object, ...]]:
    return await lab.rows("SELECT request, key, model, label, at FROM labels ORDER BY at, request NULLS FIRST")


async def test_a_label_is_kept_once_with_when_it_was_known(lab: Lab) -> None:
    at = datetime.fromtimestamp(START - 86_400 * 3, UTC)
    for _ in range(2):
        await hear(lab, message({"request": "r1", "label": "fraud", "model": "digits", "at": at.isoformat()}))
    await hear(lab, message({"key": "card-7", "label": [1, 0.5, True, "a"]}, "2", time=at.isoformat()))
    await hear(lab, message({"request": "r2", "label": 3}, "3"))
    assert await kept(lab) == [
        (None, "card-7", None, [1, 0.5, True, "a"], at),
        ("r1", None, "digits", "fraud", at),
        ("r2", None, None, 3, lab.clock()),
    ]
    async with lab.db.transaction() as tx:
        (label,) = await list_labels(tx, ModelRef("default", "digits"), 10)
        assert (label.request, label.label) == ("r1", "fraud")
        assert await list_labels(tx, ModelRef("other", "digits"), 10) == []


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ({"label": 1}, "data: request or key: exactly one of them has to say what the label is of"),
        ({"request": "r", "key": "k", "label": 1}, "data: request or key: exactly one of them"),
        ({"request": "r"}, "label: Field required"),
        ({"request": "r", "label": {"a": 1}}, "label"),
        ({"request": "r", "label": "a\0b"}, "label"),
        ({"request": "r", "label": 1, "tiem": 1}, "tiem: Extra inputs are not permitted"),
        ({"request": "r", "label": 1, "model": "Not A Name"}, "model: String should match pattern"),
        ({"request": "r", "label": 1, "at": "2026-01-01T00:00:00"}, "at: Input should have timezone info"),
        ({"request": "r", "label": 1, "at": "2020-01-01T00:00:00Z"}, "at: labels are kept for 90 days"),
        ({"request": "r", "label": 1, "at": "2100-01-01T00:00:00Z"}, "at: it is ahead of this machine's clock"),
    ],
)
async def test_what_is_no_label_is_refused_by_name(lab: Lab, data: dict[str, Any], error: str) -> None:
    with pytest.raises(Invalid) as refused:
        await hear(lab, message(data))
    assert refused.value.message.startswith(error)
    assert await kept(lab) == []


async def test_a_key_for_some_models_labels_those_only(lab: Lab) -> None:
    some = replace(CALLER, models=("fraud-*",))
    await hear(lab, message({"request": "r", "label": 1, "model": "fraud-eu"}), some)
    for data in ({"request": "r", "label": 1, "model": "digits"}, {"request": "r", "label": 1}):
        with pytest.raises(Forbidden, match="for"):
            await hear(lab, message(data, "2"), some)
    assert len(await kept(lab)) == 1


async def test_old_labels_are_dropped_by_the_day(lab: Lab) -> None:
    for number, days in enumerate((0, 5, 80)):
        at = datetime.fromtimestamp(START - days * 86_400, UTC)
        await hear(lab, message({"request": f"r{days}", "label": 1, "at": at.isoformat()}, str(number)))
    async with lab.db.transaction() as tx:
        assert len(await drop_partitions(tx, "labels", START - 10 * 86_400)) == 1
    assert [row[0] for row in await kept(lab)] == ["r5", "r0"]


async def test_labels_written_by_any_program_are_looked_at_over_http(
    settings: Settings, kafka: str, telemetry: Telemetry, etcd: EtcdClient
) -> None:
    secret = await key(etcd, Scope.INFER, Scope.READ)
    async with serving(settings, KafkaBus(kafka, "monitor", telemetry)), client(settings, secret) as caller:
        producer = Producer({"bootstrap.servers": kafka})
        for number in (1, 2):
            data = orjson.dumps({"request": f"r{number}", "label": number, "model": "digits"})
            for _ in range(2):
                headers: list[tuple[str, str | bytes | None]] = [
                    ("authorization", f"Bearer {secret}"),
                    ("id", f"l{number}"),
                ]
                producer.produce("lepton.labels", data, key="digits", headers=headers)
        producer.flush(30)
        while len(labels := await looked_at(caller)) < 2:
            pass
        assert sorted((each["request"], each["label"]) for each in labels) == [("r1", 1), ("r2", 2)]


async def looked_at(caller: httpx.AsyncClient) -> list[dict[str, Any]]:
    answer = await caller.get("/v1/labels", params={"model": "digits"})
    labels: list[dict[str, Any]] = answer.raise_for_status().json()
    return labels
