"""Logs, traces and metrics of one process: JSON lines on stdout, OTLP when asked for, one Prometheus registry.

Metrics are named `lepton_<service>_<what>_<unit>`. Logging never blocks and never fails: lines that stdout does not
take in time are dropped and counted. API keys and the passwords of URLs are masked, wherever a caller or a library put
them.
"""

import json
import logging
import queue
import re
import sys
import threading
from collections.abc import Collection, Iterable, MutableMapping, Sequence
from typing import IO, Any

import orjson
import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagators.textmap import Getter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import CollectorRegistry, Counter, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from lepton_common.settings import Settings

METRICS_CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_QUEUED_LINES = 10_000
# At info these write a line a request, or a page a consumer group, which nobody operates by.
_TALKATIVE = ("aiokafka", "httpx")
_CLOSE_S = 2.0
# A key, a token, and what stands between user and host of a URL.
_SECRET = re.compile(rb"(?<=lp_)[A-Za-z0-9_-]{43}|eyJ[\w-]+\.[\w-]+\.[\w-]+|(?<=://)([^\s/:@\"]*:)[^\s/@\"]+(?=@)")


class Telemetry:
    """What `configure` set up. Metrics go to `registry`, spans come from `tracer`."""

    def __init__(self, registry: CollectorRegistry, provider: TracerProvider, handler: "_Handler") -> None:
        self.registry = registry
        self.provider = provider
        self.tracer = provider.get_tracer("lepton")
        self._handler = handler

    def render_metrics(self) -> bytes:
        """Every metric of this process in Prometheus' text format (`METRICS_CONTENT_TYPE`)."""
        return generate_latest(self.registry)

    def close(self) -> None:
        """Spans and log lines still queued are out, or given up after two seconds for each of the two."""
        exporting = threading.Thread(target=self.provider.shutdown, daemon=True)
        exporting.start()
        exporting.join(_CLOSE_S)
        logging.getLogger().removeHandler(self._handler)
        self._handler.lines.close()


def configure(
    service: str, settings: Settings, registry: CollectorRegistry | None = None, out: IO[bytes] | None = None
) -> Telemetry:
    """Logging of this process, structlog's and the standard library's, is JSON lines on `out` (stdout) from here on.

    Without a `registry` a fresh one is made; it also gets the metrics of the process itself. Spans always carry ids,
    so that logs and messages can be joined; they are recorded and exported only when LEPTON_OTLP names a collector.
    """
    registry = registry or CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    dropped = Counter(f"lepton_{service}_log_lines_dropped", "Log lines that stdout did not take.", registry=registry)
    lines = LineWriter(out or sys.stdout.buffer, dropped)
    handler = _configure_logs(service, settings.log_level, lines)
    return Telemetry(registry, _tracer_provider(service, settings.otlp), handler)


class LineWriter:
    """Writes lines from its own thread, so that a reader who stops reading (a full pipe) never stops the service."""

    def __init__(self, out: IO[bytes], dropped: Counter) -> None:
        self._out = out
        self._dropped = dropped
        self._queue: queue.Queue[bytes | None] = queue.Queue(_QUEUED_LINES)
        self._thread = threading.Thread(target=self._write, name="log-lines", daemon=True)
        self._thread.start()

    def put(self, line: bytes) -> None:
        """The line is queued, or dropped and counted when the queue is full. Never blocks."""
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self._dropped.inc()

    def close(self) -> None:
        """Everything queued is written, unless the reader takes longer than two seconds."""
        try:
            self._queue.put(None, timeout=_CLOSE_S)
        except queue.Full:
            return
        self._thread.join(_CLOSE_S)

    def _write(self) -> None:
        while (line := self._queue.get()) is not None:
            try:
                self._out.write(line)
                if self._queue.empty():
                    self._out.flush()
            except (OSError, ValueError):  # The reader left, the disk is full, or the stream was closed under us.
                self._dropped.inc()


class _Logger:
    """structlog's last step: a line to the writer."""

    def __init__(self, lines: LineWriter) -> None:
        self._lines = lines

    def msg(self, line: bytes) -> None:
        self._lines.put(line)

    debug = info = warning = error = critical = exception = msg


class _Handler(logging.Handler):
    """Brings the standard library's records (uvicorn, aiokafka, asyncio) into the same stream in the same form."""

    def __init__(self, processors: Sequence[structlog.typing.Processor], lines: LineWriter) -> None:
        super().__init__()
        self._processors = processors
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        level = record.levelname.lower()
        try:
            event: Any = {"event": record.getMessage(), "logger": record.name, "level": level}
        except (TypeError, ValueError):  # Arguments that do not fit their format are no reason to lose the line.
            event = {"event": str(record.msg), "logger": record.name, "level": level}
        if record.exc_info:
            event["exc_info"] = record.exc_info
        for processor in self._processors:
            event = processor(None, level, event)
        self.lines.put(event)


def _configure_logs(service: str, level: str, lines: LineWriter) -> _Handler:
    threshold = logging.getLevelNamesMapping()[level.upper()]

    def add_service(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        return {"service": service, **event}

    processors: tuple[structlog.typing.Processor, ...] = (
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
        add_service,
        _add_trace_ids,
        structlog.processors.format_exc_info,
        _render,
    )
    structlog.configure(
        processors=list(processors),
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=lambda *_: _Logger(lines),
        cache_logger_on_first_use=False,
    )
    handler = _Handler(processors, lines)
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(threshold)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(max(threshold, logging.WARNING))
    return handler


def _add_trace_ids(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = trace.format_trace_id(context.trace_id)
        event["span_id"] = trace.format_span_id(context.span_id)
    return event


def _render(_: Any, __: str, event: MutableMapping[str, Any]) -> bytes:
    try:
        line = orjson.dumps(event, default=repr, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS)
    except TypeError:  # What orjson refuses: integers over 64 bits, half a surrogate pair.
        line = json.dumps(event, default=repr, skipkeys=True).encode() + b"\n"
    return masked(line)


def masked(text: bytes) -> bytes:
    """The text with *** in the place of every API key and of every password in a URL."""
    return _SECRET.sub(lambda found: (found[1] or b"") + b"***", text)


class _Masking(SpanProcessor):
    """Spans carry the URLs that callers sent; some write their keys into them."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        for name, value in (span.attributes or {}).items():
            if isinstance(value, str) and (safe := masked(value.encode("utf-8", "replace")).decode()) != value:
                span.set_attribute(name, safe)


def _tracer_provider(service: str, otlp: str) -> TracerProvider:
    provider = TracerProvider(
        sampler=ParentBased(ALWAYS_ON if otlp else ALWAYS_OFF),
        resource=Resource.create({SERVICE_NAME: f"lepton-{service}"}),
        shutdown_on_exit=False,  # It would wait 30 s for a collector that is away; `Telemetry.close` waits two.
    )
    if otlp:
        exporter = OTLPSpanExporter(endpoint=f"{otlp.rstrip('/')}/v1/traces", timeout=3)
        provider.add_span_processor(_Masking())
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


# --- W3C trace context in header lists ------------------------------------------------------------------------------

_PROPAGATOR = TraceContextTextMapPropagator()
_SAMPLED = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f][13579bdf](-.*)?")


class _FromPairs(Getter[Collection[tuple[bytes, bytes]]]):
    def get(self, carrier: Collection[tuple[bytes, bytes]], key: str) -> list[str] | None:
        name = key.encode()
        return [value.decode("latin-1") for each, value in carrier if each == name] or None

    def keys(self, carrier: Collection[tuple[bytes, bytes]]) -> list[str]:
        return [name.decode("latin-1") for name, _ in carrier]


_FROM_PAIRS = _FromPairs()


def extract(headers: Collection[tuple[bytes, bytes]]) -> Context:
    """The trace context in HTTP's headers (names in lower case), to start a span in; empty when absent or malformed."""
    return _PROPAGATOR.extract(headers, context=Context(), getter=_FROM_PAIRS)


def is_sampled(traceparent: bytes) -> bool:
    """Whether the header's value asks for the request to be traced."""
    return _SAMPLED.fullmatch(traceparent) is not None


def extract_kafka(headers: Iterable[tuple[str, bytes]]) -> Context:
    """As `extract`, for a Kafka record's headers."""
    return extract([(name.lower().encode(), value) for name, value in headers])
