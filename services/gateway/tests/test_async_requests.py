"""What a message on lepton.inference.requests means, and what its outcome looks like."""

import json
from contextlib import suppress
from typing import Any
from uuid import UUID, uuid5

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lepton_common import foreign
from lepton_common.errors import Invalid
from lepton_common.kafka_intake import Asked
from lepton_gateway import async_requests
from lepton_gateway.answers import Answer
from lepton_gateway.answers import request as ask
from lepton_gateway.async_requests import AsyncRequest, outcome_of, request_of

KEY = b"Bearer lp_" + b"x" * 43


def asked(value: Any = None, **headers: str) -> Asked:
    data = value if isinstance(value, bytes) else json.dumps({"model": "m"} if value is None else value).encode()
    told = [(name.replace("_", "-"), text.encode()) for name, text in headers.items()]
    return Asked("requests", 3, 77, 1_000_000, b"k", data, [("authorization", KEY), *told])


def understood(record: Asked, *reply_topics: str, tenant: str = "acme") -> AsyncRequest:
    return request_of(foreign.read(record.headers, record.value), record, tenant, 60.0, reply_topics)


def test_a_plain_message_names_its_model_in_the_json() -> None:
    request = understood(asked({"model": "a/b", "version": 2, "inputs": []}))
    assert request.target == b"/v2/models/a%2Fb/versions/2/infer"
    assert request.headers[b"authorization"] == KEY
    assert request.deadline == 1060.0
    assert request.key is None
    assert request.reply_topic == "lepton.inference.results"


def test_headers_go_before_the_json_which_is_then_not_read() -> None:
    request = understood(asked(b"not read", lepton_model="m", lepton_timeout_ms="500", lepton_ordered="true"))
    assert request.target == b"/v2/models/m/infer"
    assert request.deadline == 1000.5
    assert request.key == b"k"
    assert request.body == b"not read"


@given(st.text(max_size=50))
def test_the_id_of_an_outcome_is_a_uuid_of_version_5(name: str) -> None:
    namespace = UUID("6f2f9f0e-3b7b-4c56-9d0c-2a4e0f5f7a11")
    assert async_requests._outcome_id(name) == str(uuid5(namespace, name))


def test_the_id_of_the_outcome_follows_from_tenant_source_and_id_alone() -> None:
    ids = {understood(asked({"model": model}, id="7")).outcome_id for model in ("m", "n")}
    assert len(ids) == 1
    assert understood(asked(id="8")).outcome_id not in ids
    assert understood(asked(id="7"), tenant="other").outcome_id not in ids, "two tenants may use the same id"
    assert understood(asked()).id == "requests/3/77"


@pytest.mark.parametrize(
    ("value", "headers", "told"),
    [
        ({}, {}, "model is missing"),
        ({"model": 5}, {}, "model is missing"),
        ([], {}, "JSON object"),
        ({"model": "m", "version": "x"}, {}, "version 'x'"),
        ({"model": "m", "version": True}, {}, "version"),
        ({"model": "m", "timeout_ms": -1}, {}, "timeout_ms"),
        ({"model": "m", "timeout_ms": "1e3"}, {}, "timeout_ms"),
        ({"model": "m", "ordered": "yes"}, {}, "ordered"),
        ({"model": "m", "reply_topic": "lepton.models"}, {}, "reply_topic"),
        (b"{}", {"inference_header_content_length": "3"}, "inference-header-content-length"),
        (b"{}", {"content_type": "application/octet-stream"}, "inference-header-content-length"),
    ],
)
def test_what_is_wrong_is_named(value: Any, headers: dict[str, str], told: str) -> None:
    with pytest.raises(Invalid, match=told):
        understood(asked(value, **headers))


def test_a_message_without_a_key_is_refused() -> None:
    record = asked()
    bare = Asked(record.topic, record.partition, record.offset, record.at_ms, None, record.value, [])
    with pytest.raises(Invalid, match="authorization"):
        understood(bare)


def test_a_key_too_long_to_be_repeated_is_refused() -> None:
    record = asked()
    long = Asked(
        record.topic, record.partition, record.offset, record.at_ms, b"k" * 70_000, record.value, record.headers
    )
    with pytest.raises(Invalid, match="key: 70000 bytes"):
        understood(long)


def test_answers_go_to_other_topics_only_where_the_operator_allows_it() -> None:
    wanted = asked({"model": "m", "reply_topic": "team-a.answers"})
    assert understood(wanted, "team-*").reply_topic == "team-a.answers"
    with pytest.raises(Invalid, match=r"team-a\.answers"):
        understood(wanted, "other-*")


def test_the_outcome_tells_version_status_and_times() -> None:
    found: list[Answer] = []
    ask("POST", b"/", {}, b"", found.append).respond(
        200, b"content-type: application/json\r\nx-lepton-version: 4\r\n", b"{}"
    )
    record = asked(id="mine")
    outcome = outcome_of(understood(record), record, found[0], began=1000.25, now=1000.5)
    told = {name: value.decode() for name, value in outcome.headers}
    assert told["ce_type"] == "InferenceAnswered"
    assert (told["ce_correlationid"], told["lepton-version"], told["lepton-status"]) == ("mine", "4", "200")
    assert (told["lepton-waited-ms"], told["lepton-took-ms"]) == ("250", "250")
    assert (outcome.topic, outcome.key, outcome.value) == ("lepton.inference.results", b"k", b"{}")


@given(st.binary(max_size=200), st.lists(st.tuples(st.text(max_size=20), st.binary(max_size=30)), max_size=8))
def test_nothing_that_a_producer_writes_raises_but_invalid(value: bytes, headers: list[tuple[str, bytes]]) -> None:
    record = Asked("requests", 0, 0, 0, None, value, [("authorization", KEY), *headers])
    with suppress(Invalid):
        assert understood(record).target.startswith(b"/v2/models/")
