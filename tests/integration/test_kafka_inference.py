"""Inference by producers that know nothing of Lepton: confluent-kafka and aiokafka write, plain consumers read."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from aiokafka import AIOKafkaProducer
from cloudevents.core.bindings.kafka import to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from confluent_kafka import Consumer, Message, Producer

from .local_platform import Platform
from .oip_requests import ROW
from .onnx_models import mlp_scores

REQUESTS, RESULTS, DEAD = "lepton.inference.requests", "lepton.inference.results", "lepton.inference.requests.dlq"
SCORES = mlp_scores(np.array([ROW], np.float32)).ravel()


class Topic:
    """Reads what comes to a topic from now on."""

    def __init__(self, servers: str, *topics: str) -> None:
        group = {"group.id": str(uuid4()), "auto.offset.reset": "latest"}
        self._consumer = Consumer({"bootstrap.servers": servers, **group})
        self._consumer.subscribe(list(topics))
        self._seen: list[Message] = []
        end = time.monotonic() + 30
        while not self._consumer.assignment():
            self._poll()
            assert time.monotonic() < end
        # Where "latest" is gets settled by the first fetch.
        for each in self._consumer.assignment():
            self._consumer.get_watermark_offsets(each, timeout=10)
        for each in self._consumer.position(self._consumer.assignment()):
            assert each.error is None
        self._poll(1.0)

    def close(self) -> None:
        self._consumer.close()

    def wait_for(self, wanted: Callable[[Message], bool], count: int = 1, within_s: float = 40) -> list[Message]:
        end = time.monotonic() + within_s
        while len(found := [each for each in self._seen if wanted(each)]) < count:
            assert time.monotonic() < end, f"{len(found)} of {count} came"
            self._poll()
        return found

    def take(self) -> list[Message]:
        """What has come since it was asked last."""
        self._poll()
        taken, self._seen = self._seen, []
        return taken

    def _poll(self, timeout_s: float = 0.2) -> None:
        self._seen.extend(each for each in self._consumer.consume(500, timeout_s) if each.error() is None)


def headers(message: Message) -> dict[str, str]:
    return {name: (value or b"").decode() for name, value in pairs(message)}


def pairs(message: Message) -> list[tuple[str, bytes | None]]:
    found: Any = message.headers()  # whose type is that of what may be written
    return list(found or [])


def answers_to(request_id: str) -> Callable[[Message], bool]:
    return lambda message: headers(message).get("ce_correlationid") == request_id


def value(message: Message) -> Any:
    return json.loads(message.value() or b"")


@pytest.fixture(scope="module")
def results(platform: Platform) -> Iterator[Topic]:
    topic = Topic(platform.layout.kafka, RESULTS)
    yield topic
    topic.close()


@pytest.fixture(scope="module")
def dead(platform: Platform) -> Iterator[Topic]:
    topic = Topic(platform.layout.kafka, DEAD)
    yield topic
    topic.close()


@pytest.fixture(scope="module")
def producer(platform: Platform) -> Iterator[Producer]:
    producer = Producer({"bootstrap.servers": platform.layout.kafka})
    yield producer
    producer.flush(10)


@pytest.fixture(scope="module")
def secret(make_key: Callable[..., str]) -> str:
    return make_key("infer")


def infer(model: str, **own: Any) -> dict[str, Any]:
    return {"model": model, "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": ROW}], **own}


def write(producer: Producer, secret: str, body: Any, key: str | None = None, **own: str) -> str:
    """A plain message is written; the id of its request is returned."""
    request_id = own.pop("id", str(uuid4()))
    told = {"id": request_id, "authorization": f"Bearer {secret}", **{n.replace("_", "-"): v for n, v in own.items()}}
    data = body if isinstance(body, bytes) else json.dumps(body)
    producer.produce(REQUESTS, data, key, headers={name: text for name, text in told.items() if text})
    producer.poll(0)
    return request_id


def test_plain_json_is_answered_with_the_oip_response(
    producer: Producer, results: Topic, secret: str, mlp: str
) -> None:
    request_id = write(producer, secret, infer(mlp), key="customer-7")
    (answer,) = results.wait_for(answers_to(request_id))
    assert value(answer)["model_name"] == mlp
    np.testing.assert_allclose(value(answer)["outputs"][0]["data"], SCORES, rtol=1e-4)
    told = headers(answer)
    assert (told["ce_type"], told["lepton-status"], told["lepton-version"]) == ("InferenceAnswered", "200", "1")
    assert int(told["lepton-waited-ms"]) >= 0
    assert int(told["lepton-took-ms"]) >= 0
    assert answer.key() == b"customer-7"


@pytest.mark.parametrize("mode", [to_binary, to_structured])
def test_cloud_events_are_answered(
    producer: Producer, results: Topic, secret: str, mlp: str, mode: Callable[..., Any]
) -> None:
    event = CloudEvent(
        {"id": str(uuid4()), "source": "/shop", "type": "score", "datacontenttype": "application/json"}, infer(mlp)
    )
    message = mode(event, JSONFormat())
    own = {**message.headers, "authorization": f"Bearer {secret}".encode()}
    producer.produce(REQUESTS, message.value, headers=list(own.items()))
    (answer,) = results.wait_for(answers_to(event.get_id()))
    np.testing.assert_allclose(value(answer)["outputs"][0]["data"], SCORES, rtol=1e-4)


async def test_aiokafka_sends_tensors_in_binary(platform: Platform, results: Topic, secret: str, mlp: str) -> None:
    tensor = np.array([ROW], np.float32).tobytes()
    head = json.dumps(
        {
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16}}],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    request_id = str(uuid4())
    told = {
        "id": request_id,
        "authorization": f"Bearer {secret}",
        "content-type": "application/octet-stream",
        "inference-header-content-length": str(len(head)),
        "lepton-model": mlp,
        "lepton-version": "1",
    }
    async with AIOKafkaProducer(bootstrap_servers=platform.layout.kafka) as producer:
        await producer.send_and_wait(REQUESTS, head + tensor, headers=[(n, v.encode()) for n, v in told.items()])
    (answer,) = results.wait_for(answers_to(request_id))
    length = int(headers(answer)["inference-header-content-length"])
    np.testing.assert_allclose(np.frombuffer((answer.value() or b"")[length:][:12], np.float32), SCORES, rtol=1e-4)


def test_the_same_request_twice_has_answers_of_one_id(
    producer: Producer, results: Topic, secret: str, mlp: str
) -> None:
    request_id = write(producer, secret, infer(mlp))
    write(producer, secret, infer(mlp), id=request_id)
    first, second = results.wait_for(answers_to(request_id), 2)
    assert headers(first)["ce_id"] == headers(second)["ce_id"]


def test_order_is_kept_by_key_when_asked_for(producer: Producer, results: Topic, secret: str, slow: str) -> None:
    ids = []
    for rounds in (20_000, 1, 10_000, 1, 1):
        tensor = {"name": "rounds", "datatype": "INT64", "shape": [1], "data": [rounds]}
        body = {"model": slow, "inputs": [tensor], "ordered": True}
        ids.append(write(producer, secret, body, key="in-order"))
    wanted = set(ids)
    answers = results.wait_for(lambda message: headers(message).get("ce_correlationid") in wanted, len(ids))
    assert [headers(each)["ce_correlationid"] for each in answers] == ids


@pytest.mark.parametrize(
    ("own", "status", "told"),
    [
        ({"model": "nothing"}, "404", "'nothing'"),
        ({"version": 9}, "404", "version 9"),
        ({"inputs": []}, "400", "'x' is missing"),
        ({"timeout_ms": 0}, "504", "deadline"),
    ],
)
def test_wrong_requests_get_an_error_as_their_outcome(
    producer: Producer, results: Topic, secret: str, mlp: str, own: dict[str, Any], status: str, told: str
) -> None:
    request_id = write(producer, secret, {**infer(mlp), **own})
    (answer,) = results.wait_for(answers_to(request_id))
    assert headers(answer)["ce_type"] == "InferenceFailed"
    assert headers(answer)["lepton-status"] == status
    assert told in value(answer)["error"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ({"inputs": []}, "model is missing"),
        ({"model": "m", "reply_topic": "lepton.models"}, "not allowed"),
    ],
)
def test_unreadable_messages_are_dead_letters_with_the_reason(
    producer: Producer, dead: Topic, secret: str, body: Any, told: str
) -> None:
    request_id = write(producer, secret, body)
    (letter,) = dead.wait_for(lambda message: headers(message).get("id") == request_id)
    assert told in headers(letter)["lepton-dlq-error"]
    assert letter.value() == (body if isinstance(body, bytes) else json.dumps(body).encode())
    assert secret not in str(letter.headers())


def test_who_has_no_key_is_a_dead_letter_and_no_caller(
    producer: Producer, dead: Topic, mlp: str, make_key: Callable[..., str]
) -> None:
    for secret in ("lp_" + "x" * 43, make_key("read")):
        request_id = write(producer, secret, infer(mlp))
        (letter,) = dead.wait_for(lambda message, own=request_id: headers(message).get("id") == own)  # type: ignore[misc]  # a bound default
        assert "key" in headers(letter)["lepton-dlq-error"]
        assert secret not in str(letter.headers())


def test_a_foreign_tenants_model_does_not_exist(
    producer: Producer, results: Topic, mlp: str, make_key: Callable[..., str]
) -> None:
    request_id = write(producer, make_key("infer", tenant="kafka-guests"), infer(mlp))
    (answer,) = results.wait_for(answers_to(request_id))
    assert headers(answer)["lepton-status"] == "404"
