"""Traced requests: where the time of each went, kept for whoever asks, and told as spans where these go anywhere."""

import re
import time
from collections import OrderedDict
from datetime import UTC, datetime

from lepton import models as shapes
from lepton_common.auth import Caller
from lepton_common.errors import NotFound
from lepton_common.http11 import Request
from lepton_common.telemetry import extract
from lepton_common.types import ModelRef
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags, Tracer

from lepton_gateway.request_ids import request_id

_MOST_OF_A_TENANT = 200
_MOST_TENANTS = 100
# Envoy's front door, and whoever reads requests from Kafka, says when the request came to it.
_CAME = re.compile(rb"t=(\d{1,12}\.\d{1,9})")
_STAGE = re.compile(rb'(\w+);dur=(\d+\.\d+)(?:;desc="(\d+) rows of (\d+) requests")?')


class Traces:
    """The last traced requests of each tenant. One tenant's push out no other's."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, OrderedDict[str, shapes.Trace]] = OrderedDict()

    def add(self, tenant: str, ended: shapes.Trace) -> None:
        kept = self._tenants.setdefault(tenant, OrderedDict())
        self._tenants.move_to_end(tenant)
        kept[ended.request_id] = ended
        kept.move_to_end(ended.request_id)
        if len(kept) > _MOST_OF_A_TENANT:
            kept.popitem(last=False)
        if len(self._tenants) > _MOST_TENANTS:
            self._tenants.popitem(last=False)

    def get(self, caller: Caller, identity: str) -> shapes.Trace:
        """The last trace of a request with that id. Raises NotFound, also where the model is not the caller's."""
        kept = self._tenants.get(caller.tenant)
        found = None if kept is None else kept.get(identity)
        if found is None or not caller.sees(found.model):
            why = f"it was not traced, or answered from the cache, or {_MOST_OF_A_TENANT} others were traced since"
            raise NotFound(f"no trace of request {identity[:80]!r}: {why}, or by another gateway or before a restart")
        return found

    def newest_first(self, caller: Caller) -> list[shapes.Trace]:
        kept = self._tenants.get(caller.tenant)
        return [] if kept is None else [each for each in reversed(kept.values()) if caller.sees(each.model)]


class Trace:
    """One traced request on its way from the gateway to its answer. Times are of time.monotonic."""

    __slots__ = ("_began", "_came_s", "_mesh", "_model", "_request", "_sent", "_span", "_traces", "timing")

    def __init__(self, tracer: Tracer, traces: Traces, request: Request, model: ModelRef, began: float) -> None:
        """The request came at `began`, and leaves for the mesh now."""
        self._traces = traces
        self._request = request
        self._model = model
        self._began = began
        self._sent = time.monotonic()
        offset = time.time() - self._sent
        came = _CAME.fullmatch(request.headers.get(b"x-request-start", b""))
        self._came_s = max(0.0, began + offset - float(came[1])) if came else None
        self.timing = b""  # what the worker said
        self._span = tracer.start_span(
            "infer",
            context=_parent(request),
            kind=SpanKind.SERVER,
            attributes={"lepton.tenant": model.tenant, "lepton.model": model.model},
            start_time=int((began + offset) * 1e9),
        )
        self._mesh = tracer.start_span("mesh", trace.set_span_in_context(self._span), SpanKind.CLIENT)

    @property
    def carried(self) -> bytes:
        """The header lines by which the worker knows."""
        context = self._mesh.get_span_context()
        state = context.trace_state.to_header()
        return _traceparent(context) + (b"tracestate: %b\r\n" % state.encode("latin-1") if state else b"")

    def end(self, version: bytes, status: int, tries: int) -> bytes:
        """The request is answered, after so many tries; the answer's header lines that tell of it."""
        now = time.monotonic()
        identity = request_id(self._request)
        context = self._span.get_span_context()
        ended = self._ended(identity, context, now, version, status, tries)
        self._traces.add(self._model.tenant, ended)
        self._mesh.end()
        self._span.set_attributes(
            {
                "http.response.status_code": status,
                "lepton.version": version.decode("latin-1"),
                "lepton.request_id": ended.request_id,
                "lepton.wait_ms": (self._sent - self._began) * 1e3,
            }
        )
        if status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()
        told = ", ".join(f"{each.name};dur={each.ms}" for each in ended.stages)
        return b"x-request-id: %b\r\n%bserver-timing: %b\r\n" % (identity, _traceparent(context), told.encode())

    def _ended(
        self, identity: bytes, context: SpanContext, now: float, version: bytes, status: int, tries: int
    ) -> shapes.Trace:
        worker = _STAGE.findall(self.timing)
        spent_ms = (now - self._sent) * 1e3
        mesh_ms = spent_ms - sum(float(ms) for _, ms, _, _ in worker)
        stages = [("wait", (self._sent - self._began) * 1e3), ("mesh" if worker else "mesh+worker", max(0.0, mesh_ms))]
        if self._came_s is not None:
            stages.insert(0, ("kafka" if self._request.background else "front", self._came_s * 1e3))
        stages += [(name.decode(), float(ms)) for name, ms, _, _ in worker]
        rows, requests = next(((int(rows), int(count)) for _, _, rows, count in worker if rows), (None, None))
        return shapes.Trace(
            request_id=identity.decode("utf-8", "replace"),
            trace_id=trace.format_trace_id(context.trace_id),
            model=self._model.model,
            version=version.decode("latin-1"),
            status=status,
            at=datetime.now(UTC),
            total_ms=round(((self._came_s or 0.0) + now - self._began) * 1e3, 3),
            stages=[shapes.TraceStage(name=name, ms=round(ms, 3)) for name, ms in stages],
            batch_rows=rows,
            batch_requests=requests,
            tries=tries,
        )


def _parent(request: Request) -> Context:
    """The caller's span. That the request is traced was decided here, whatever the caller's own tracing does."""
    context = extract(request.headers.items())
    told = trace.get_current_span(context).get_span_context()
    if not told.is_valid or told.trace_flags.sampled:
        return context
    sampled = SpanContext(told.trace_id, told.span_id, True, TraceFlags(TraceFlags.SAMPLED), told.trace_state)
    return trace.set_span_in_context(NonRecordingSpan(sampled), context)


def _traceparent(context: SpanContext) -> bytes:
    # Sampled, also where no span is recorded: the worker is to follow.
    ids = trace.format_trace_id(context.trace_id), trace.format_span_id(context.span_id)
    return b"traceparent: 00-%b-%b-01\r\n" % (ids[0].encode(), ids[1].encode())
