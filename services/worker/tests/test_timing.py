"""A traced request's stages, as the gateway hears of them and as spans."""

import re
import time

import pytest
from lepton_common.types import ModelRef, VersionRef
from lepton_worker.timing import Timing
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {b"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01".encode()}
REF = VersionRef(ModelRef("acme", "m"), 3)


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(spans: InMemorySpanExporter) -> TracerProvider:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return provider


def test_stages_are_spans_below_the_meshs_with_their_times(
    spans: InMemorySpanExporter, provider: TracerProvider
) -> None:
    timing = Timing(HEADERS, REF, provider.get_tracer("test"))
    timing.queued()
    queued = time.monotonic()
    timing.ran(queued + 0.25, queued + 1, rows=8, requests=3)
    assert b';dur=750.000;desc="8 rows of 3 requests"' in timing.end()
    *stages, worker = spans.get_finished_spans()
    assert [each.name for each in stages] == ["decode", "queue", "run", "encode"]
    assert worker.parent is not None
    assert format(worker.parent.span_id, "016x") == PARENT_ID
    assert {format(each.context.trace_id, "032x") for each in (*stages, worker)} == {TRACE_ID}
    assert all(each.parent == worker.context for each in stages)
    run = stages[2]
    assert run.end_time is not None
    assert run.start_time is not None
    assert (run.end_time - run.start_time) / 1e9 == pytest.approx(0.75, abs=1e-4)
    assert dict(run.attributes or {}) == {"lepton.batch.rows": 8, "lepton.batch.requests": 3}
    assert dict(worker.attributes or {})["lepton.version"] == 3


def test_a_request_that_ran_twice_waited_for_the_second_time() -> None:
    timing = Timing(HEADERS, REF, None)
    timing.queued()
    queued = time.monotonic()
    timing.ran(queued + 1, queued + 2, rows=8, requests=3)
    timing.ran(queued + 2, queued + 2.5, rows=1, requests=1)
    told = timing.end()
    queue_ms = re.search(rb"queue;dur=([0-9.]+), run;dur=500.000;", told)
    assert queue_ms is not None
    assert float(queue_ms[1]) == pytest.approx(2000, abs=100)
    assert b'"1 rows of 1 requests"' in told
