import http.server
import io
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from lepton_common.settings import Settings
from lepton_common.telemetry import Telemetry, configure, extract, extract_kafka, is_sampled
from opentelemetry import trace

PARENT = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def out() -> io.BytesIO:
    return io.BytesIO()


@pytest.fixture
def telemetry(out: io.BytesIO) -> Iterator[Telemetry]:
    level = logging.getLogger().level
    telemetry = configure("worker", Settings(log_level="info"), out=out)
    yield telemetry
    telemetry.close()
    logging.getLogger().setLevel(level)
    structlog.reset_defaults()


def lines_of(telemetry: Telemetry, out: io.BytesIO) -> list[dict[str, Any]]:
    telemetry.close()
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_log_line_is_one_json_object_with_service_level_and_time(telemetry: Telemetry, out: io.BytesIO) -> None:
    structlog.get_logger().info("model ready", model="digits", version=3)
    structlog.get_logger().debug("not asked for")
    [line] = lines_of(telemetry, out)
    assert line.pop("at").endswith("Z")
    assert line == {"service": "worker", "level": "info", "event": "model ready", "model": "digits", "version": 3}


def test_the_standard_library_logs_into_the_same_stream(telemetry: Telemetry, out: io.BytesIO) -> None:
    try:
        raise ValueError("bad\nnews")
    except ValueError:
        logging.getLogger("aiokafka").exception("consumer %s died", 7)
    [line] = lines_of(telemetry, out)
    assert (line["event"], line["logger"], line["level"]) == ("consumer 7 died", "aiokafka", "error")
    assert "ValueError: bad\nnews" in line["exception"]


def test_keys_and_passwords_are_masked_wherever_they_are(telemetry: Telemetry, out: io.BytesIO) -> None:
    key = "lp_" + "k" * 43
    try:
        raise ValueError(f"no route to postgresql://lepton:hunter2@db:5432/x and {key}")
    except ValueError:
        structlog.get_logger().exception(f"failed for {key}", header={"x-api-key": key.encode()}, id="lp_" + "k" * 8)
    [line] = lines_of(telemetry, out)
    assert line["event"] == "failed for lp_***"
    assert line["id"] == "lp_" + "k" * 8
    assert "postgresql://lepton:***@db:5432/x and lp_***" in line["exception"]
    assert b"hunter2" not in out.getvalue()
    assert b"k" * 20 not in out.getvalue()


def test_values_that_json_does_not_know_are_logged_as_their_repr(telemetry: Telemetry, out: io.BytesIO) -> None:
    structlog.get_logger().warning("odd", value=object, keys={1: b"x"})
    [line] = lines_of(telemetry, out)
    assert line["value"] == "<class 'object'>"
    assert line["keys"] == {"1": "b'x'"}


def test_libraries_that_tell_of_every_request_are_heard_from_warning_on(telemetry: Telemetry, out: io.BytesIO) -> None:
    logging.getLogger("httpx").info("HTTP Request: GET /")
    logging.getLogger("aiokafka.consumer.fetcher").warning("partition lost")
    assert [line["event"] for line in lines_of(telemetry, out)] == ["partition lost"]


def test_no_value_and_no_wrong_format_makes_logging_fail(telemetry: Telemetry, out: io.BytesIO) -> None:
    structlog.get_logger().info("odd", big=2**70, key="\udcff")
    # Not through a logger: pytest's own handler would raise.
    telemetry._handler.handle(logging.LogRecord("lib", logging.WARNING, "", 1, "%d apples", ("ten",), None))
    odd, wrong = lines_of(telemetry, out)
    assert (odd["big"], odd["key"]) == (2**70, "\udcff")
    assert wrong["event"] == "%d apples"


def test_a_log_line_within_a_span_carries_its_trace_id(telemetry: Telemetry, out: io.BytesIO) -> None:
    with telemetry.tracer.start_as_current_span("load") as span:
        structlog.get_logger().info("loading")
    [line] = lines_of(telemetry, out)
    assert line["trace_id"] == trace.format_trace_id(span.get_span_context().trace_id)


def test_a_reader_who_stops_reading_costs_lines_but_never_time() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as pipe, os.fdopen(writer, "wb", buffering=0) as out:
        telemetry = configure("worker", Settings(), out=out)
        logger = structlog.get_logger()
        for _ in range(12_000):  # More than the queue and the pipe hold together.
            logger.info("x" * 100)
        dropped = telemetry.registry.get_sample_value("lepton_worker_log_lines_dropped_total")
        reading = threading.Thread(target=pipe.read)
        reading.start()
        telemetry.close()
        out.close()
        reading.join()
    structlog.reset_defaults()
    assert dropped is not None
    assert 0 < dropped < 12_000


def test_metrics_show_the_process_and_what_the_service_registered(telemetry: Telemetry) -> None:
    text = telemetry.render_metrics().decode()
    assert "process_resident_memory_bytes" in text
    assert "lepton_worker_log_lines_dropped_total 0.0" in text


def test_trace_context_is_read_from_http_headers(telemetry: Telemetry) -> None:
    received = {b"host": b"x", b"traceparent": PARENT, b"tracestate": b"a=b"}
    with telemetry.tracer.start_as_current_span("infer", context=extract(received.items())) as span:
        context = span.get_span_context()
    assert trace.format_trace_id(context.trace_id).encode() == PARENT.split(b"-")[1]
    assert trace.format_span_id(context.span_id).encode() != PARENT.split(b"-")[2]
    assert context.trace_state.to_header() == "a=b"


def test_trace_context_is_read_from_kafka_headers() -> None:
    context = trace.get_current_span(extract_kafka([("ce_id", b"1"), ("traceparent", PARENT)])).get_span_context()
    assert trace.format_trace_id(context.trace_id).encode() == PARENT.split(b"-")[1]


@pytest.mark.parametrize("value", [b"", b"00-0-0-00", b"\xff\xfe", PARENT + b"-extra"])
def test_a_malformed_traceparent_is_no_context(value: bytes) -> None:
    context = extract([(b"traceparent", value)])
    assert not trace.get_current_span(context).get_span_context().is_valid


def test_spans_are_exported_when_a_collector_is_named() -> None:
    received: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        otlp = f"http://127.0.0.1:{server.server_port}"
        telemetry = configure("worker", Settings(otlp=otlp), out=io.BytesIO())
        query = {"url.query": "model=digits&key=lp_" + "k" * 43}
        with telemetry.tracer.start_as_current_span("load the model", attributes=query):
            pass
        telemetry.close()
        server.shutdown()
    structlog.reset_defaults()
    [(path, body)] = received
    assert path == "/v1/traces"
    assert b"load the model" in body
    assert b"model=digits&key=lp_***" in body
    assert b"lepton-worker" in body


def test_a_collector_that_is_away_does_not_hold_up_the_end() -> None:
    telemetry = configure("worker", Settings(otlp="http://127.0.0.1:9"), out=io.BytesIO())
    with telemetry.tracer.start_as_current_span("load"):
        pass
    began = time.monotonic()
    telemetry.close()
    assert time.monotonic() - began < 20
    structlog.reset_defaults()


@pytest.mark.parametrize(
    ("traceparent", "sampled"),
    [
        (b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", True),
        (b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-03", True),
        (b"01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-later", True),
        (b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00", False),
        (b"00-00000000000000000000000000000000-b7ad6b7169203331-01", False),
        (b"00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01", False),
        (b"ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", False),
        (b"00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01", False),
        (b"", False),
    ],
)
def test_the_sampled_flag_of_a_valid_context_asks_for_a_trace(traceparent: bytes, sampled: bool) -> None:
    assert is_sampled(traceparent) is sampled
