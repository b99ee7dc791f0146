"""An event as a Kafka message: CloudEvents 1.0 in binary mode, that is attributes in headers and JSON in the value."""

from collections.abc import Mapping
from dataclasses import dataclass

from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from lepton_common import events
from lepton_common.errors import Invalid, TooLarge
from lepton_common.events import Event

# Larger values belong in the blob store, with their sha256 in the event.
MAX_VALUE_BYTES = 256 * 1024

_REQUIRED = ("ce_id", "ce_source", "ce_type", "ce_specversion")
_TRACE = TraceContextTextMapPropagator()


@dataclass(frozen=True, slots=True)
class Message:
    """What Kafka stores of an event. Equal keys share a partition, hence stay in order."""

    topic: str
    key: str
    headers: Mapping[str, str]
    value: bytes


def encode(event: Event, source: str) -> Message:
    """The event as `source` (a service's name) says it, with the current trace context.

    Raises TooLarge when its JSON passes MAX_VALUE_BYTES.
    """
    value = event.model_dump_json().encode()
    kind = type(event).__name__
    if len(value) > MAX_VALUE_BYTES:
        raise TooLarge(f"{kind} for {event.subject}: {len(value)} bytes of JSON, at most {MAX_VALUE_BYTES} are allowed")
    headers = {
        "ce_specversion": "1.0",
        "ce_id": str(event.id),
        "ce_source": f"/{source}",
        "ce_type": kind,
        "ce_time": event.at.isoformat(),
        "ce_subject": event.subject,
        "ce_tenant": event.tenant,
        "content-type": "application/json",
    }
    _TRACE.inject(headers)
    return Message(event.topic, event.subject, headers, value)


def type_name(headers: Mapping[str, str]) -> str:
    """The event's type. Raises Invalid when the headers are not those of a CloudEvent 1.0 in binary mode."""
    missing = [name for name in _REQUIRED if not headers.get(name)]
    if missing:
        raise Invalid(f"not a CloudEvent: no {', '.join(missing)}")
    if headers["ce_specversion"] != "1.0":
        raise Invalid(f"CloudEvents {headers['ce_specversion'][:20]!r}: expected 1.0")
    return headers["ce_type"]


def decode(headers: Mapping[str, str], value: bytes | None) -> Event:
    """The event in a message. Raises Invalid when headers, value and type do not belong together."""
    kind = type_name(headers)
    if value is None:
        raise Invalid(f"{kind}: no value")
    event = events.decode(kind, value)
    if str(event.id) != headers["ce_id"].lower():
        raise Invalid(f"{kind}: ce_id differs from the value's id")
    return event
