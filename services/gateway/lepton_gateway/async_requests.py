"""Inference asked for over Kafka: what a message means, and how its outcome is written. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from hashlib import sha1
from typing import Any
from uuid import UUID

import orjson
from lepton_common.errors import Invalid
from lepton_common.foreign import Message
from lepton_common.kafka_client import Record
from lepton_common.kafka_intake import Asked
from lepton_common.topics import RESULTS

from lepton_gateway.answers import Answer
from lepton_gateway.rpc_codec import infer_target

_IDS = UUID("6f2f9f0e-3b7b-4c56-9d0c-2a4e0f5f7a11").bytes
_BINARY = "application/octet-stream"
_LENGTH = "inference-header-content-length"
_PREFIX = "lepton-"
MAX_KEY_BYTES = 64 * 1024
_MAX_TIMEOUT_MS = 7 * 24 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class AsyncRequest:
    """One inference that somebody wants. `deadline` is Unix time in seconds; `key` is set where order matters."""

    id: str
    tenant: str
    outcome_id: str
    target: bytes
    headers: Mapping[bytes, bytes]
    body: bytes
    reply_topic: str
    deadline: float
    key: bytes | None


def request_of(
    message: Message, asked: Asked, tenant: str, timeout_s: float, reply_topics: Sequence[str]
) -> AsyncRequest:
    """The request in a tenant's message. Raises Invalid naming what is wrong.

    `model`, `version`, `reply_topic`, `timeout_ms` and `ordered` stand in the JSON beside OIP's own fields, or in
    headers `lepton-model` …, which go before. `timeout_s` holds where the message has none, from when it was written.
    """
    if len(asked.key or b"") > MAX_KEY_BYTES:
        raise Invalid(f"key: {len(asked.key or b'')} bytes, at most {MAX_KEY_BYTES} are taken, for outcomes repeat it")
    options = _options(message)
    model = options.get("model")
    if not isinstance(model, str) or not model:
        raise Invalid("model is missing: name it in the request or in the header lepton-model")
    if message.authorization is None:
        raise Invalid("authorization: the header is missing, send Bearer lp_…")
    identity = message.id or f"{asked.topic}/{asked.partition}/{asked.offset}"
    headers = {
        b"authorization": message.authorization,
        b"content-type": message.content_type.encode(),
        b"x-request-id": identity.encode(),
        b"x-request-start": b"t=%.3f" % (asked.at_ms / 1e3),
    }
    if message.traceparent:
        headers[b"traceparent"] = message.traceparent.encode()
    if _is_binary(message):
        headers[_LENGTH.encode()] = b"%d" % _header_length(message)
    reply_topic = options.get("reply_topic", RESULTS.name)
    if not isinstance(reply_topic, str) or not _is_allowed(reply_topic, reply_topics):
        raise Invalid(f"reply_topic {str(reply_topic)[:80]!r} is not allowed here: the operator lists those that are")
    ordered = options.get("ordered", False)
    if not isinstance(ordered, bool):
        raise Invalid("ordered must be true or false")
    return AsyncRequest(
        identity,
        tenant,
        _outcome_id(f"{tenant}\n{message.source}\n{identity}"),
        infer_target(model, _version(options.get("version"))),
        headers,
        message.data,
        reply_topic,
        asked.at_ms / 1e3 + _timeout_ms(options.get("timeout_ms"), timeout_s) / 1e3,
        asked.key if ordered else None,
    )


def outcome_of(request: AsyncRequest, asked: Asked, answer: Answer, began: float, now: float) -> Record:
    """The answer as a CloudEvent, in the partition that the request was in. `began` and `now` are Unix times in
    seconds."""
    told = [
        ("ce_specversion", b"1.0"),
        ("ce_id", request.outcome_id.encode()),
        ("ce_source", b"/gateway"),
        ("ce_type", b"InferenceAnswered" if answer.status == 200 else b"InferenceFailed"),
        ("ce_time", datetime.fromtimestamp(now, UTC).isoformat().encode()),
        ("ce_correlationid", request.id.encode()),
        ("ce_tenant", request.tenant.encode()),
        ("content-type", answer.headers.get(b"content-type", b"application/json")),
        (_LENGTH, answer.headers.get(_LENGTH.encode(), b"")),
        ("lepton-status", b"%d" % answer.status),
        ("lepton-version", answer.headers.get(b"x-lepton-version", b"")),
        ("lepton-waited-ms", b"%d" % max(0, round(began * 1e3) - asked.at_ms)),
        ("lepton-took-ms", b"%d" % round((now - began) * 1e3)),
        ("traceparent", answer.headers.get(b"traceparent") or request.headers.get(b"traceparent", b"")),
    ]
    headers = [each for each in told if each[1]]
    return Record(request.reply_topic, asked.key or request.id.encode(), answer.body, headers, asked.partition)


def _outcome_id(name: str) -> str:
    """`str(uuid.uuid5(_IDS, name))` (RFC 9562 §5.5), which takes five times as long."""
    found = sha1(_IDS + name.encode(), usedforsecurity=False).hexdigest()
    variant = "89ab"[int(found[16], 16) & 3]
    return f"{found[:8]}-{found[8:12]}-5{found[13:16]}-{variant}{found[17:20]}-{found[20:32]}"


def _options(message: Message) -> Mapping[str, Any]:
    """What the message says beside the inference itself."""
    own: dict[str, Any] = {
        name.removeprefix(_PREFIX).replace("-", "_"): value.decode("latin-1")
        for name, value in message.headers.items()
        if name.startswith(_PREFIX)
    }
    if "ordered" in own:
        own["ordered"] = {"true": True, "false": False}.get(own["ordered"].lower(), own["ordered"])
    if "model" in own:
        return own
    head = message.data[: _header_length(message)] if _is_binary(message) else message.data
    try:
        document = orjson.loads(head)
    except orjson.JSONDecodeError as error:
        raise Invalid(f"the request is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise Invalid("the request must be a JSON object")
    return {**document, **own}


def _is_binary(message: Message) -> bool:
    return _LENGTH in message.headers or message.content_type.startswith(_BINARY)


def _header_length(message: Message) -> int:
    length = message.headers.get(_LENGTH, b"")
    if not length.isdigit() or len(length) > 9 or int(length) > len(message.data):
        raise Invalid(f"header {_LENGTH}: the length of the JSON in front of the tensors is missing or wrong")
    return int(length)


def _is_allowed(topic: str, patterns: Sequence[str]) -> bool:
    return topic == RESULTS.name or any(fnmatchcase(topic, each) for each in patterns)


def _version(value: Any) -> str:
    if value is None:
        return ""
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdigit() and len(text) < 10):
        raise Invalid(f"version {text[:80]!r} is not a version's number")
    return text


def _timeout_ms(value: Any, default_s: float) -> int:
    if value is None:
        return round(default_s * 1e3)
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdigit() and len(text) < 12):
        raise Invalid("timeout_ms must be a whole number of milliseconds")
    return min(int(text), _MAX_TIMEOUT_MS)
