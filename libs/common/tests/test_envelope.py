"""Events as CloudEvents: what others can read of ours, and what we still read of yesterday's."""

import json
from pathlib import Path
from typing import Any

import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary
from cloudevents.core.formats.json import JSONFormat
from lepton_common import envelope
from lepton_common.errors import Invalid
from lepton_common.events import Event, VersionPromoted, types
from opentelemetry.sdk.trace import TracerProvider

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.json"))


def read(path: Path) -> tuple[dict[str, str], dict[str, Any], Event]:
    golden = json.loads(path.read_text())
    return golden["headers"], golden["value"], envelope.decode(golden["headers"], json.dumps(golden["value"]).encode())


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_events_are_read_by_todays_code(path: Path) -> None:
    headers, value, event = read(path)
    assert (type(event).__name__, str(event.id)) == (headers["ce_type"], headers["ce_id"])
    assert (event.subject, event.tenant) == (headers["ce_subject"], headers["ce_tenant"])
    assert_kept(value, event.model_dump(mode="json"))


def assert_kept(value: dict[str, Any], today: dict[str, Any]) -> None:
    """What today's code knows of the value is as it was written."""
    for name in value.keys() & today.keys():
        if isinstance(value[name], dict):
            assert_kept(value[name], today[name])
        else:
            assert today[name] == value[name]


def test_golden_events_are_of_every_type() -> None:
    assert {type(read(path)[2]) for path in GOLDEN} == set(types())


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_what_we_say_the_cloudevents_package_reads(path: Path) -> None:
    _, _, event = read(path)
    message = envelope.encode(event, "registry")
    headers = {name: value.encode() for name, value in message.headers.items()}
    theirs = from_binary(KafkaMessage(headers, message.key, message.value), JSONFormat())
    assert (theirs.get_id(), theirs.get_type(), theirs.get_source()) == (
        str(event.id),
        type(event).__name__,
        "/registry",
    )
    assert (theirs.get_subject(), theirs.get_time()) == (event.subject, event.at)
    assert theirs.get_data() == event.model_dump(mode="json")


def test_an_event_carries_the_trace_it_was_said_in() -> None:
    event = VersionPromoted(tenant="acme", model="m", version=1)
    assert "traceparent" not in envelope.encode(event, "tests").headers
    with TracerProvider(shutdown_on_exit=False).get_tracer("tests").start_as_current_span("push") as span:
        headers = envelope.encode(event, "tests").headers
    assert f"{span.get_span_context().trace_id:032x}" in headers["traceparent"]


@pytest.mark.parametrize("missing", ["ce_id", "ce_source", "ce_type", "ce_specversion"])
def test_a_message_without_a_required_attribute_is_no_event(missing: str) -> None:
    message = envelope.encode(VersionPromoted(tenant="acme", model="m", version=1), "tests")
    headers = {name: value for name, value in message.headers.items() if name != missing}
    with pytest.raises(Invalid, match=missing):
        envelope.decode(headers, message.value)


def test_an_id_that_differs_from_the_values_is_refused() -> None:
    message = envelope.encode(VersionPromoted(tenant="acme", model="m", version=1), "tests")
    with pytest.raises(Invalid, match="ce_id"):
        envelope.decode({**message.headers, "ce_id": "another"}, message.value)
