"""What a producer that knows nothing of Lepton wrote to Kafka: a CloudEvent 1.0, binary or structured, or plain JSON.

Pure: bytes in, a Message or Invalid out. Nothing is parsed before its size is known to be allowed.
"""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID, uuid5

import orjson
from pydantic import BaseModel, ValidationError

from lepton_common.errors import Invalid, TooLarge

MAX_VALUE_BYTES = 1024 * 1024
MAX_HEADERS = 64
MAX_HEADER_BYTES = 32 * 1024

JSON = "application/json"

# Headers that carry secrets, or would if somebody put them in the wrong place. They are never written anywhere.
SECRET_HEADERS = frozenset({"authorization", "ce_authorization", "proxy-authorization", "x-api-key", "cookie"})

_STRUCTURED = "application/cloudevents"
_REQUIRED = ("id", "source", "type", "specversion")
_IDS = ("id", "x-request-id")
# Two of these contradict each other; of any other header the last one counts, as Kafka has it.
_ONCE = re.compile(r"ce_.*|content-type|authorization|id|x-request-id")
_NAME = re.compile(r"[a-z0-9]+")
# No control characters, which neither logs nor PostgreSQL should see.
_TEXT = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,1024}")
_MOST_ID_CHARS = 256
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

_NAMESPACE = UUID("5f6c3a52-8f0e-4c53-9c0e-0d9f3b1f7f0a")

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Message:
    """A foreign message. `kind` is its CloudEvents type and `attributes` are all of those; plain JSON has none.

    `id` is None when the producer gave none; the bus then names it by its place. `headers` are the other headers, by
    their names in lower case. `at` is the CloudEvents time; the bus puts the broker's where there is none.
    """

    id: str | None
    kind: str
    source: str
    attributes: Mapping[str, str]
    headers: Mapping[str, bytes] = field(repr=False)
    content_type: str
    data: bytes = field(repr=False)
    authorization: bytes | None = field(repr=False)
    traceparent: str | None
    at: datetime | None = None

    def uuid(self, tenant: str) -> UUID:
        """The same for every repeat of the message, and for no other: CloudEvents are one by source and id."""
        return uuid5(_NAMESPACE, f"{tenant}\n{self.source}\n{self.id}")

    def parse(self, shape: type[M]) -> M:
        """The data as that shape. Raises Invalid that names the field, and never repeats what was sent."""
        if not _is_json(self.content_type):
            raise Invalid(f"content-type {self.content_type[:80]!r}: the data must be {JSON}")
        # Not pydantic's own parser: it takes NaN, which is no JSON.
        value = _loaded(self.data, "data")
        try:
            return shape.model_validate(value)
        except ValidationError as error:
            first: Any = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "data"
            raise Invalid(f"{where[:80]}: {first['msg'].removeprefix('Value error, ')}") from None


def read(
    headers: Sequence[tuple[str, bytes]], value: bytes | None, *, max_value_bytes: int = MAX_VALUE_BYTES
) -> Message:
    """The message in a Kafka record. Raises Invalid saying what is wrong with it, TooLarge what is too large."""
    if value is None:
        raise Invalid("no value: a tombstone says nothing here")
    if len(value) > max_value_bytes:
        raise TooLarge(f"{len(value)} bytes, at most {max_value_bytes} are allowed")
    given = _headers(headers)
    content_type = _text("content-type", given.pop("content-type", JSON.encode()))
    authorization = given.pop("authorization", None)
    if content_type.lower().startswith(_STRUCTURED):
        attributes, content_type, data = _structured(content_type, value)
    else:
        attributes = {name[3:]: _text(name, each) for name, each in given.items() if name.startswith("ce_")}
        data = value
        if attributes:
            _check(attributes)
    identity = attributes.get("id") or next((_text(name, given[name]) for name in _IDS if name in given), None)
    if identity is not None and len(identity) > _MOST_ID_CHARS:
        raise Invalid(f"id: {len(identity)} characters, at most {_MOST_ID_CHARS} are allowed")
    return Message(
        id=identity,
        kind=attributes.get("type", ""),
        source=attributes.get("source", ""),
        attributes=attributes,
        headers={
            name: each for name, each in given.items() if not name.startswith("ce_") and name not in SECRET_HEADERS
        },
        content_type=content_type,
        data=data,
        authorization=authorization,
        traceparent=_traceparent(given.get("traceparent"), attributes),
        at=_time(attributes.get("time")),
    )


def without_secrets(headers: Sequence[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """The headers, but for those that carry secrets: what of a message may be kept."""
    return [(name, value) for name, value in headers if name.lower() not in SECRET_HEADERS]


def _headers(headers: Sequence[tuple[str, bytes]]) -> dict[str, bytes]:
    if len(headers) > MAX_HEADERS:
        raise TooLarge(f"{len(headers)} headers, at most {MAX_HEADERS} are allowed")
    size = sum(len(name) + len(value) for name, value in headers)
    if size > MAX_HEADER_BYTES:
        raise TooLarge(f"{size} bytes of headers, at most {MAX_HEADER_BYTES} are allowed")
    given: dict[str, bytes] = {}
    for name, value in headers:
        name = name.lower()
        if name in given and _ONCE.fullmatch(name):
            raise Invalid(f"header {name[:80]!r}: there are two of them")
        given[name] = value
    return given


def _structured(content_type: str, value: bytes) -> tuple[dict[str, str], str, bytes]:
    """Attributes, content type and data of a CloudEvent that is wholly in the value."""
    if content_type.partition(";")[0].strip().lower() != f"{_STRUCTURED}+json":
        raise Invalid(
            f"content-type {content_type[:80]!r}: of CloudEvents in the value only {_STRUCTURED}+json is read"
        )
    event = _loaded(value, "value")
    if not isinstance(event, dict):
        raise Invalid("value: a CloudEvent is a JSON object")
    data, encoded = event.pop("data", None), event.pop("data_base64", None)
    attributes = {name: _attribute(name, each) for name, each in event.items() if each is not None}
    _check(attributes)
    data_type = attributes.pop("datacontenttype", JSON)
    if encoded is None:
        return attributes, data_type, _dumped(data, data_type)
    if data is not None:
        raise Invalid("data: either data or data_base64, not both")
    try:
        return attributes, data_type, base64.b64decode(encoded, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise Invalid("data_base64: not base64") from None


def _dumped(data: object, content_type: str) -> bytes:
    if data is None:
        return b""
    if isinstance(data, str) and not _is_json(content_type):
        return data.encode()
    return orjson.dumps(data)


def _attribute(name: str, value: object) -> str:
    match value:
        case str():
            return _checked_text(name, value)
        case bool():
            return str(value).lower()
        case int():
            return str(value)
        case _:
            raise Invalid(f"{name[:80]}: an attribute is text, a whole number, true or false")


def _check(attributes: Mapping[str, str]) -> None:
    """Raises Invalid when these are not the attributes of a CloudEvent 1.0."""
    missing = [name for name in _REQUIRED if name not in attributes]
    if missing:
        raise Invalid(f"not a CloudEvent: no {', '.join(missing)}")
    if attributes["specversion"] != "1.0":
        raise Invalid(f"specversion {attributes['specversion'][:20]!r}: expected 1.0")
    for name in attributes:
        if not _NAME.fullmatch(name):
            raise Invalid(f"attribute {name[:80]!r}: its name must be lower-case letters and digits")


def _traceparent(header: bytes | None, attributes: Mapping[str, str]) -> str | None:
    """The W3C trace context. One that is none is no reason to refuse the message."""
    told = (header or b"").decode("latin-1") or attributes.get("traceparent", "")
    return told if _TRACEPARENT.fullmatch(told) else None


def _time(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:
        raise Invalid("time: expected an RFC 3339 time with its offset, such as 2026-11-27T10:00:00Z")
    return time


def _text(name: str, value: bytes) -> str:
    try:
        return _checked_text(name, value.decode())
    except UnicodeDecodeError:
        raise Invalid(f"header {name[:80]!r}: not UTF-8") from None


def _checked_text(name: str, text: str) -> str:
    if _TEXT.fullmatch(text):
        return text
    raise Invalid(f"{name[:80]}: expected 1 to 1024 characters, none of them a control character")


def _is_json(content_type: str) -> bool:
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type == JSON or media_type.endswith("+json")


def _loaded(value: bytes, what: str) -> Any:
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise Invalid(f"{what}: not JSON, from character {error.pos} on") from None
