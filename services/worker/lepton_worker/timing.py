"""Where a traced request's time goes in the worker: told in its answer, and as spans where these go anywhere."""

import time
from itertools import pairwise

from lepton_common.telemetry import extract
from lepton_common.types import VersionRef
from opentelemetry import trace
from opentelemetry.trace import SpanKind, Tracer

_STAGES = ("decode", "queue", "run", "encode")


class Timing:
    """One traced request, from its arrival on. Times are of time.monotonic.

    A request runs twice when the first batch it was in failed: its queue lasts until the second one.
    """

    __slots__ = ("_batch", "_headers", "_marks", "_ref", "_tracer")

    def __init__(self, headers: dict[bytes, bytes], ref: VersionRef, tracer: Tracer | None) -> None:
        """`tracer` is None where spans go nowhere."""
        self._headers = headers
        self._ref = ref
        self._tracer = tracer
        self._marks = [time.monotonic()]
        self._batch = (0, 0)

    def queued(self) -> None:
        """The request is understood, and waits."""
        self._marks.append(time.monotonic())

    def ran(self, started: float, ended: float, rows: int, requests: int) -> None:
        """It ran together with others: so many rows and requests in all."""
        self._marks[2:] = [started, ended]
        self._batch = (rows, requests)

    def end(self) -> bytes:
        """The header line that tells of it; it is answered now."""
        self._marks.append(time.monotonic())
        stages = [(name, *marks) for name, marks in zip(_STAGES, pairwise(self._marks), strict=False)]
        if self._tracer is not None:
            self._tell(self._tracer, stages)
        told = [b"%b;dur=%.3f" % (name.encode(), (end - start) * 1e3) for name, start, end in stages]
        if self._batch[1]:
            told[2] += b';desc="%d rows of %d requests"' % self._batch
        return b"server-timing: %b\r\n" % b", ".join(told)

    def _tell(self, tracer: Tracer, stages: list[tuple[str, float, float]]) -> None:
        offset = time.time() - time.monotonic()

        def ns(monotonic: float) -> int:
            return int((monotonic + offset) * 1e9)

        attributes: dict[str, str | int] = {
            "lepton.tenant": self._ref.model.tenant,
            "lepton.model": self._ref.model.model,
            "lepton.version": self._ref.version,
        }
        rows, requests = self._batch
        span = tracer.start_span(
            "worker",
            context=extract(self._headers.items()),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=ns(self._marks[0]),
        )
        inside = trace.set_span_in_context(span)
        for name, start, end in stages:
            batch = {"lepton.batch.rows": rows, "lepton.batch.requests": requests} if name == "run" else None
            tracer.start_span(name, context=inside, attributes=batch, start_time=ns(start)).end(ns(end))
        span.end(ns(self._marks[-1]))
