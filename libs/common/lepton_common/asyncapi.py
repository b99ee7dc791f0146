"""Every event of Lepton, and every topic that others may write to, as an AsyncAPI 3 document.

`python -m lepton_common.asyncapi > docs/asyncapi.json` publishes it; a test says when that is to be done again.
"""

import inspect
import json
import sys
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from lepton_common import events
from lepton_common.asked import InferenceAnswered, InferenceFailed, InferenceRequest, Ingest, Label
from lepton_common.events import Event
from lepton_common.topics import INGEST, LABELS, REQUESTS, RESULTS, TOPICS, Topic

# What is asked for on a topic, by its name; and what is answered.
ASKED: dict[str, type[BaseModel]] = {REQUESTS.name: InferenceRequest, INGEST.name: Ingest, LABELS.name: Label}
ANSWERED: tuple[type[BaseModel], ...] = (InferenceAnswered, InferenceFailed)

_TEXT = {"type": "string", "minLength": 1}
_TRACE = {"type": "string", "description": "W3C trace context"}
_EVENT_HEADERS = {
    "type": "object",
    "required": ["ce_specversion", "ce_id", "ce_source", "ce_type", "ce_time", "ce_subject", "ce_tenant"],
    "properties": {
        "ce_specversion": {"const": "1.0"},
        "ce_id": {"type": "string", "format": "uuid", "description": "the same for a repeat"},
        "ce_source": {**_TEXT, "description": "/ and the service that says it"},
        "ce_type": {**_TEXT, "description": "the message's name"},
        "ce_time": {"type": "string", "format": "date-time"},
        "ce_subject": {**_TEXT, "description": "what it is about; the key is the same, so one subject's stay in order"},
        "ce_tenant": _TEXT,
        "content-type": {"const": "application/json"},
        "traceparent": _TRACE,
    },
}
_ASKED_HEADERS = {
    "type": "object",
    "description": "CloudEvents 1.0 in binary mode (ce_…), or in structured mode (content-type "
    "application/cloudevents+json), or plain JSON, whose id may be in `id`",
    "required": ["authorization"],
    "properties": {
        "authorization": {"type": "string", "description": "Bearer and an API key; dead letters do not keep it"},
        "id": {**_TEXT, "maxLength": 256, "description": "the same for a repeat, which changes nothing"},
        "traceparent": _TRACE,
    },
}

_ANSWER_HEADERS = {
    "type": "object",
    "required": ["ce_specversion", "ce_id", "ce_source", "ce_type", "ce_time", "ce_correlationid", "lepton-status"],
    "properties": {
        "ce_specversion": {"const": "1.0"},
        "ce_id": {"type": "string", "format": "uuid", "description": "the same for a repeat, by the request's id"},
        "ce_source": {"const": "/gateway"},
        "ce_type": {**_TEXT, "description": "the message's name"},
        "ce_time": {"type": "string", "format": "date-time"},
        "ce_correlationid": {**_TEXT, "description": "the request's id"},
        "lepton-status": {"type": "string", "description": "as by HTTP"},
        "lepton-version": {"type": "string", "description": "the version that answered"},
        "lepton-waited-ms": {"type": "string"},
        "lepton-took-ms": {"type": "string"},
        "inference-header-content-length": {"type": "string", "description": "of an answer in binary form"},
        "traceparent": _TRACE,
    },
}


def document() -> dict[str, Any]:
    """The document, without anything that changes from one run to the next."""
    kinds = events.types()
    shapes: list[type[BaseModel]] = [*kinds, *ASKED.values(), *ANSWERED]
    _, definitions = models_json_schema(
        [(each, "validation") for each in shapes], ref_template="#/components/schemas/{model}"
    )
    topics = [each for each in TOPICS if _messages(each)]
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Lepton's events",
            "version": "1.0.0",
            "description": "Facts that Lepton tells, and what it may be asked for, over Kafka. An event only ever gains"
            " optional fields; a reader ignores what it does not know. Delivery is at least once. What could not be"
            " handled of a topic is on <topic>.dlq, as it came, with headers lepton-dlq-… that say why.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": {each.name: _channel(each) for each in topics},
        "operations": {_operation_id(each): _operation(each) for each in topics},
        "components": {
            "messages": {each.__name__: _message(each) for each in shapes},
            "schemas": definitions["$defs"],
        },
    }


def _messages(topic: Topic) -> list[str]:
    if topic.name in ASKED:
        return [ASKED[topic.name].__name__]
    if topic.name == RESULTS.name:
        return [each.__name__ for each in ANSWERED]
    return [each.__name__ for each in events.types() if each.topic == topic.name]


def _channel(topic: Topic) -> dict[str, Any]:
    return {
        "address": topic.name,
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in _messages(topic)},
        "bindings": {
            "kafka": {
                "topic": topic.name,
                "partitions": topic.partitions,
                "topicConfiguration": {
                    "cleanup.policy": [topic.config["cleanup.policy"]],
                    "retention.ms": int(topic.config["retention.ms"]),
                    "max.message.bytes": int(topic.config["max.message.bytes"]),
                },
                "bindingVersion": "0.5.0",
            }
        },
    }


def _operation_id(topic: Topic) -> str:
    return f"{'hear' if topic.name in ASKED else 'tell'}-{topic.name}"


def _operation(topic: Topic) -> dict[str, Any]:
    channel = f"#/channels/{topic.name}"
    return {
        "action": "receive" if topic.name in ASKED else "send",
        "channel": {"$ref": channel},
        "messages": [{"$ref": f"{channel}/messages/{name}"} for name in _messages(topic)],
    }


def _message(shape: type[BaseModel]) -> dict[str, Any]:
    headers = _EVENT_HEADERS if issubclass(shape, Event) else _ANSWER_HEADERS if shape in ANSWERED else _ASKED_HEADERS
    told = inspect.getdoc(shape) or ""
    return {
        "name": shape.__name__,
        "summary": told.split("\n\n")[0].replace("\n", " "),
        "description": told,
        "contentType": "application/json",
        "headers": headers,
        "payload": {"$ref": f"#/components/schemas/{shape.__name__}"},
        "bindings": {"kafka": {"key": {"type": "string"}, "bindingVersion": "0.5.0"}},
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(document(), indent=2, ensure_ascii=False) + "\n")
