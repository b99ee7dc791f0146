"""What a user lives through with Lepton, told through the front door with its own client."""

import hashlib
import json
import time
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import cast
from uuid import UUID

import numpy as np
import onnx
import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary
from cloudevents.core.formats.json import JSONFormat
from confluent_kafka import Consumer
from lepton import AsyncClient, Client
from lepton.errors import Conflict, NotFound, RolloutFailed
from lepton.models import Version

from . import onnx_models
from .journeys import X, answers_as, told
from .load import Load
from .local_platform import Platform, until
from .onnx_models import mlp, mlp_scores

ONE_ROW = json.dumps(
    {
        "inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": X[0].tolist()}],
        "outputs": [{"name": "scores"}],
    }
).encode()


# --- a model's life ---------------------------------------------------------------------------------------------------


def test_model_lives_from_its_first_push_through_a_swap_and_back(client: Client, name: str) -> None:
    first = client.push(mlp(11), name=name, labels={"trained": "today"}, metrics={"accuracy": 0.97})
    assert (first.version, first.model, first.labels, first.metrics) == (
        1,
        name,
        {"trained": "today"},
        {"accuracy": 0.97},
    )
    assert answers_as(client, name, 11) == "1"

    second = client.push(mlp(12), name=name, deploy=False)
    assert second.version == 2
    assert answers_as(client, name, 11) == "1"
    assert client.deploy(name, 2).previous == 1
    assert answers_as(client, name, 12) == "2"
    # The one before stays warm, for an instant return and for who asks for it.
    assert answers_as(client, name, 11, version=1) == "1"

    assert client.rollback(name).version == 1
    assert answers_as(client, name, 11) == "1"
    served = client.serving(name)
    assert (served.stable, served.previous, served.versions) == (1, 2, [1, 2])
    assert {(each.worker, each.version, each.state) for each in served.workers} == {
        (worker, version, "ready") for worker in ("worker-1", "worker-2") for version in (1, 2)
    }

    deployed = ["RolloutStarted", "TrafficShifted", "RolloutFinished", "VersionPromoted"]
    entries = told(client, name, 15)
    assert [(each.type, each.version) for each in entries] == [
        ("ModelCreated", None),
        ("VersionRegistered", 1),
        *((fact, 1) for fact in deployed),
        ("VersionRegistered", 2),
        *((fact, 2) for fact in deployed),
        *((fact, 1) for fact in deployed),
    ]
    assert [each.at for each in entries] == sorted(each.at for each in entries)
    assert len({each.id for each in entries}) == len(entries)
    assert entries[1].actor
    assert [each.evidence["percent"] for each in entries if each.type == "TrafficShifted"] == [100, 100, 100]

    assert client.model(name).aliases == {"production": 1}
    assert [(each.version, each.state) for each in client.versions(name)] == [(1, "promoted"), (2, "promoted")]
    assert [(each.version, each.state) for each in client.rollouts(name)] == [
        (1, "promoted"),
        (2, "promoted"),
        (1, "promoted"),
    ]


def test_swap_under_load_fails_no_request(platform: Platform, client: Client, name: str) -> None:
    scores = {"1": mlp_scores(X[:1], 21), "2": mlp_scores(X[:1], 22)}

    def check(body: bytes, version: str) -> str:
        answer = json.loads(body)
        if answer["model_version"] != version:
            return f"header says version {version}, body {answer['model_version']}"
        right = np.allclose(answer["outputs"][0]["data"], scores[version].ravel(), rtol=1e-4, atol=1e-4)
        return "" if right else f"version {version} answered as another one"

    client.push(mlp(21), name=name)
    client.push(mlp(22), name=name, deploy=False)
    with Load(platform.port, f"/v2/models/{name}/infer", ONE_ROW, callers=4, check=check) as load:
        load.wait_for(50)
        client.deploy(name, 2)
        load.wait_for_version(2, 50)
        client.rollback(name)
        load.wait_for_version(1, 50)
        client.deploy(name, 2)
        load.wait_for_version(2, 50)
    assert not load.failures, load.report()
    assert set(load.versions) == {"1", "2"}


def test_same_bytes_are_the_same_version_and_tell_nothing_new(client: Client, name: str) -> None:
    client.push(mlp(31), name=name)
    client.push(mlp(32), name=name)
    before = told(client, name, 11)
    again = client.push(mlp(31), name=name, deploy=False)
    assert again.version == 1
    assert [each.version for each in client.versions(name)] == [1, 2]
    assert answers_as(client, name, 32) == "2"
    # A fact of later goes the same way as one of the second push would have gone.
    client.push(mlp(33), name=name, deploy=False)
    after = told(client, name, len(before) + 1)
    assert [each.type for each in after[len(before) :]] == ["VersionRegistered"]
    # Pushed to be deployed, bytes of an earlier version take the traffic back.
    assert client.push(mlp(31), name=name).version == 1
    assert answers_as(client, name, 31) == "1"


def test_version_that_cannot_be_loaded_fails_with_its_reason_and_the_stable_one_serves_on(
    platform: Platform, client: Client, name: str
) -> None:
    client.push(mlp(41), name=name)
    broken = {
        2: (onnx_models.refused_at_load(), "Could not find an implementation for Pow"),
        3: (onnx_models.crashing_at_load(), "crashed the runtime while it loaded: SIGFPE"),
        4: (onnx_models.hanging_at_load(), "did not load within"),
    }
    with Load(platform.port, f"/v2/models/{name}/infer", ONE_ROW, callers=2) as load:
        for version, (model, reason) in broken.items():
            with pytest.raises(RolloutFailed, match=reason):
                client.push(model, name=name, timeout=60)
            failed = until(partial(_failed, client, name, version))
            assert reason in failed.state_reason
            load.wait_for(20)
    assert not load.failures, load.report()
    assert set(load.versions) == {"1"}
    assert answers_as(client, name, 41) == "1"
    assert client.serving(name).versions == [1]
    assert client.model(name).aliases == {"production": 1}
    [entry] = [each for each in client.timeline(name) if each.type == "RolloutFinished" and each.version == 3]
    assert (entry.evidence["outcome"], entry.reason) == ("failed", f"the model {broken[3][1]}")
    # What failed once is no obstacle to the next.
    client.push(mlp(42), name=name)
    assert answers_as(client, name, 42) == "5"


def _failed(client: Client, model: str, version: int) -> Version | None:
    found = client.version(model, version)
    return found if found.state == "failed" else None


def test_first_version_that_fails_leaves_a_model_that_is_not_served(client: Client, name: str) -> None:
    with pytest.raises(RolloutFailed, match="Pow"):
        client.push(onnx_models.refused_at_load(), name=name)
    with pytest.raises((NotFound, Conflict)):
        client.rollback(name)
    client.push(mlp(51), name=name)
    assert answers_as(client, name, 51) == "2"


def test_pushed_without_deploying_it_waits(client: Client, name: str) -> None:
    client.push(mlp(61), name=name, deploy=False)
    assert [each.type for each in told(client, name, 2)] == ["ModelCreated", "VersionRegistered"]
    with pytest.raises(NotFound):
        client.infer(name, {"x": X})
    client.deploy(name, 1)
    assert answers_as(client, name, 61) == "1"


def test_models_of_every_kind_are_refused_or_packed_at_push(
    platform: Platform, client: Client, name: str, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match="not an ONNX file"):
        client.push(_file(tmp_path / "not.onnx", b"no model at all"), name=name)
    # Weights in a side file, as torch writes them, are packed in.
    path = tmp_path / "external.onnx"
    onnx.save(mlp(62), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    client.push(path, name=name)
    assert answers_as(client, name, 62) == "1"
    # Sent as it is, it is refused: nothing outside the file is ever opened.
    digest = _sha256(path)
    with platform.http() as http:
        answer = http.put(f"/v1/artifacts/{digest}", content=path.read_bytes())
        assert answer.status_code == 400
        assert "another file" in answer.json()["detail"]
        assert http.head(f"/v1/artifacts/{digest}").status_code == 404


async def test_async_client_does_the_same(platform: Platform, name: str) -> None:
    async with AsyncClient(platform.url, platform.key) as client:
        version = await client.push(mlp(63), name=name)
        outputs = await client.infer(name, {"x": X}, outputs=["label"])
        assert list(outputs) == ["label"]
        assert outputs.version == str(version.version)
        np.testing.assert_array_equal(outputs["label"], mlp_scores(X, 63).argmax(axis=1))


# --- events -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def consumer(platform: Platform, name: str) -> Iterator[Consumer]:
    """A stranger's Kafka client that reads Lepton's topics from their beginning."""
    consumer = Consumer({"bootstrap.servers": platform.layout.kafka, "group.id": name, "auto.offset.reset": "earliest"})
    consumer.subscribe(["lepton.models", "lepton.rollouts"])
    yield consumer
    consumer.close()


def test_any_kafka_client_hears_of_a_models_life_as_cloudevents(client: Client, consumer: Consumer, name: str) -> None:
    client.push(mlp(81), name=name)
    heard: dict[str, list[str]] = {}
    ids: set[str] = set()
    deadline = time.monotonic() + 30
    while len(ids) < 6:
        assert time.monotonic() < deadline, heard
        record = consumer.poll(1)
        if record is None or record.key() != f"default/{name}".encode():
            continue
        assert record.error() is None
        headers, value = dict(cast(list[tuple[str, bytes]], record.headers())), record.value()
        assert value is not None
        event = from_binary(KafkaMessage(headers, record.key(), value), JSONFormat())
        assert event.get_specversion() == "1.0"
        assert event.get_subject() == f"default/{name}"
        assert headers["ce_tenant"] == b"default"
        assert headers["content-type"].startswith(b"application/json")
        assert event.get_source()
        content = json.loads(value)
        assert str(UUID(event.get_id())) == content["id"]
        assert event.get_time() == datetime.fromisoformat(content["at"])
        assert (content["tenant"], content["model"]) == ("default", name)
        ids.add(event.get_id())
        heard.setdefault(str(record.topic()), []).append(event.get_type())
    assert heard == {
        "lepton.models": ["ModelCreated", "VersionRegistered", "VersionPromoted"],
        "lepton.rollouts": ["RolloutStarted", "TrafficShifted", "RolloutFinished"],
    }
    assert {str(each.id) for each in told(client, name, 6)} == ids


def _file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
