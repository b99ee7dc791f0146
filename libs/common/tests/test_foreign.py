"""What any producer may write, and what becomes of what none should."""

import base64
import contextlib
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st
from lepton_common.errors import Invalid, TooLarge
from lepton_common.foreign import MAX_HEADERS, Message, read, without_secrets
from pydantic import BaseModel, Field

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
REQUIRED = {"ce_id": "7", "ce_source": "/ci", "ce_type": "push", "ce_specversion": "1.0"}

# What CloudEvents allows in an attribute, and what JSON can hold of any language.
texts = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=40).filter(str.strip)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
# What else there is the package writes as Python shows it, which is no JSON.
datas = st.dictionaries(texts, values, max_size=4)
extensions = st.dictionaries(st.from_regex(r"x[a-z0-9]{1,8}", fullmatch=True), texts, max_size=3)


def headers(**given: str) -> list[tuple[str, bytes]]:
    return [(name.replace("_", "-") if name[:3] != "ce_" else name, value.encode()) for name, value in given.items()]


def sent(message: KafkaMessage, **more: str) -> Message:
    return read([*message.headers.items(), *headers(**more)], message.value)


@given(identity=texts, source=texts, kind=texts, extra=extensions, data=datas, structured=st.booleans())
def test_what_the_cloudevents_package_writes_is_read_in_both_modes(
    identity: str, source: str, kind: str, extra: dict[str, str], data: Any, structured: bool
) -> None:
    attributes = {"id": identity, "source": source, "type": kind, "datacontenttype": "application/json", **extra}
    event = CloudEvent(attributes=attributes, data=data)
    message = sent((to_structured if structured else to_binary)(event, JSONFormat()), authorization="Bearer k")
    assert (message.id, message.source, message.kind) == (identity, source, kind)
    assert extra.items() <= message.attributes.items()
    assert json.loads(message.data) == data
    assert (message.content_type, message.authorization) == ("application/json", b"Bearer k")


@given(data=st.binary(max_size=50))
def test_bytes_are_the_same_in_both_modes(data: bytes) -> None:
    event = CloudEvent(
        attributes={"id": "1", "source": "/s", "type": "t", "datacontenttype": "application/octet-stream"}, data=data
    )
    assert sent(to_binary(event, JSONFormat())).data == data
    assert sent(to_structured(event, JSONFormat())).data == data


@given(
    given=st.lists(
        st.tuples(st.text(max_size=12) | st.sampled_from([*REQUIRED, "content-type"]), st.binary()), max_size=9
    ),
    value=st.none() | st.binary(max_size=200) | datas.map(lambda data: json.dumps(data).encode()),
)
def test_whatever_is_written_is_a_message_or_invalid(given: list[tuple[str, bytes]], value: bytes | None) -> None:
    structured = [("content-type", b"application/cloudevents+json")]
    for each in (given, [pair for pair in given if pair[0].lower() != "content-type"] + structured):
        with contextlib.suppress(Invalid):
            assert read(each, value).id != ""


def test_plain_json_needs_nothing_but_a_value() -> None:
    message = read([], b'{"a": 1}')
    assert (message.id, message.kind, message.attributes, message.data) == (None, "", {}, b'{"a": 1}')
    assert read(headers(x_request_id="r1"), b"1").id == "r1"
    assert read(headers(id="r1", x_request_id="r2"), b"1").id == "r1"


def test_the_time_is_the_cloudevents() -> None:
    assert read(headers(**REQUIRED, ce_time="2026-11-27T10:00:00Z"), b"1").at == datetime(2026, 11, 27, 10, tzinfo=UTC)
    assert read(headers(**REQUIRED), b"1").at is None


def test_names_of_headers_are_read_in_any_case() -> None:
    message = read(
        [("Authorization", b"Bearer k"), ("Content-Type", b"Application/CloudEvents+JSON; charset=UTF-8")],
        json.dumps({"id": "1", "source": "/s", "type": "t", "specversion": "1.0", "data": [1]}).encode(),
    )
    assert (message.authorization, message.id, message.data) == (b"Bearer k", "1", b"[1]")


def test_other_headers_are_kept_but_for_secrets() -> None:
    message = read(headers(inference_header_content_length="12", cookie="s", x_api_key="s", authorization="s"), b"1")
    assert message.headers == {"inference-header-content-length": b"12"}


@pytest.mark.parametrize("name", ["traceparent", "ce_traceparent"])
def test_the_trace_is_found_in_either_place_and_a_broken_one_is_left_out(name: str) -> None:
    known = REQUIRED if name.startswith("ce_") else {}
    assert read(headers(**known, **{name: TRACE}), b"1").traceparent == TRACE
    assert read(headers(**known, **{name: TRACE[:-1]}), b"1").traceparent is None


STRUCTURED = {"content-type": "application/cloudevents+json"}
EVENT = {"id": "1", "source": "/s", "type": "t", "specversion": "1.0"}


@pytest.mark.parametrize(
    ("given", "value", "message"),
    [
        ({}, None, "no value: a tombstone says nothing here"),
        ({"ce_id": "1"}, b"1", "not a CloudEvent: no source, type, specversion"),
        (REQUIRED | {"ce_specversion": "0.3"}, b"1", "specversion '0.3': expected 1.0"),
        (REQUIRED | {"ce_a-b": "1"}, b"1", "attribute 'a-b': its name must be lower-case letters and digits"),
        (REQUIRED | {"ce_id": ""}, b"1", "ce_id: expected 1 to 1024 characters, none of them a control character"),
        (REQUIRED | {"ce_id": "a\0b"}, b"1", "ce_id: expected 1 to 1024 characters, none of them a control character"),
        (REQUIRED | {"ce_id": "x" * 257}, b"1", "id: 257 characters, at most 256 are allowed"),
        (REQUIRED | {"ce_time": "yesterday"}, b"1",
         "time: expected an RFC 3339 time with its offset, such as 2026-11-27T10:00:00Z"),
        (REQUIRED | {"ce_time": "2026-11-27T10:00:00"}, b"1",
         "time: expected an RFC 3339 time with its offset, such as 2026-11-27T10:00:00Z"),
        (REQUIRED | {"CE_ID": "2"}, b"1", "header 'ce_id': there are two of them"),
        ({"authorization": "a", "Authorization": "b"}, b"1", "header 'authorization': there are two of them"),
        ({"content-type": "application/cloudevents-batch+json"}, b"[]",
         "content-type 'application/cloudevents-batch+json': of CloudEvents in the value only "
         "application/cloudevents+json is read"),
        (STRUCTURED, b"{", "value: not JSON, from character 1 on"),
        (STRUCTURED, b"[]", "value: a CloudEvent is a JSON object"),
        (STRUCTURED, EVENT | {"id": None}, "not a CloudEvent: no id"),
        (STRUCTURED, EVENT | {"subject": ["a"]}, "subject: an attribute is text, a whole number, true or false"),
        (STRUCTURED, EVENT | {"data": 1, "data_base64": ""}, "data: either data or data_base64, not both"),
        (STRUCTURED, EVENT | {"data_base64": "?"}, "data_base64: not base64"),
        (STRUCTURED, EVENT | {"data_base64": 7}, "data_base64: not base64"),
    ],
)  # fmt: skip
def test_what_is_no_message_is_refused_by_name(given: dict[str, str], value: Any, message: str) -> None:
    body = json.dumps(value).encode() if isinstance(value, dict) else value
    with pytest.raises(Invalid) as refused:
        read([(name, each.encode()) for name, each in given.items()], body)
    assert refused.value.message == message


def test_what_is_too_large_is_not_parsed() -> None:
    many, long = [("a", b"")] * (MAX_HEADERS + 1), [("a", b"1" * 40_000)]
    for headed, value in (([], b"1" * 11), (many, b"1"), (long, b"1")):
        with pytest.raises(TooLarge):
            read(headed, value, max_value_bytes=10)


def test_a_header_that_is_not_text_is_refused() -> None:
    with pytest.raises(Invalid, match="'ce_type': not UTF-8"):
        read([("ce_type", b"\xff")], b"1")


class Shape(BaseModel):
    count: int = Field(ge=1)
    note: str = ""


def test_data_is_parsed_into_a_shape() -> None:
    assert read([], b'{"count": 2, "later": 1}').parse(Shape) == Shape(count=2)
    encoded = EVENT | {"data_base64": base64.b64encode(b'{"count": 3}').decode()}
    structured = [(name, value.encode()) for name, value in STRUCTURED.items()]
    assert read(structured, json.dumps(encoded).encode()).parse(Shape) == Shape(count=3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "data: not JSON, from character 0 on"),
        (b"NaN", "data: not JSON, from character 0 on"),
        (b"3", "data: Input should be a valid dictionary or instance of Shape"),
        (b"{}", "count: Field required"),
        (b'{"count": "SECRET"}', "count: Input should be a valid integer, unable to parse string as an integer"),
        (b"[" * 100_000, "data: not JSON, from character 1025 on"),
    ],
)
def test_data_that_does_not_fit_is_refused_by_name_and_not_repeated(data: bytes, message: str) -> None:
    with pytest.raises(Invalid) as refused:
        read([], data).parse(Shape)
    assert refused.value.message == message


def test_data_of_another_type_is_not_guessed_at() -> None:
    with pytest.raises(Invalid, match="content-type 'text/csv': the data must be application/json"):
        read(headers(content_type="text/csv"), b'{"count": 2}').parse(Shape)


def test_a_message_never_shows_its_secret() -> None:
    message = read(headers(authorization="Bearer SECRET"), b'"SECRET"')
    assert "SECRET" not in repr(message)
    kept = without_secrets([("Authorization", b"SECRET"), ("CE_Authorization", b"SECRET"), ("ce_id", b"1")])
    assert kept == [("ce_id", b"1")]
