"""The worker's HTTP: Open Inference Protocol v2 for the versions it holds, health and metrics. Callbacks, no tasks."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import orjson
import structlog
from lepton_common import compression, http11, oip
from lepton_common.errors import Forbidden, Invalid, LeptonError, Overloaded, status_of
from lepton_common.health import Readiness
from lepton_common.http11 import Request
from lepton_common.telemetry import METRICS_CONTENT_TYPE, is_sampled
from lepton_common.tensors import Array
from opentelemetry.trace import Tracer

from lepton_worker.assignments import Assignments
from lepton_worker.domain import ModelFailed, NotLoaded, Target, Verb, target_of
from lepton_worker.lane import Lane
from lepton_worker.timing import Timing

# The mesh tries what failed on another worker. Without this that would only carry an overload from one to the next.
OVERLOADED = b"x-envoy-ratelimited: true\r\n"

_BINARY = b"content-type: application/octet-stream\r\n"
_METRICS = b"content-type: %b\r\n" % METRICS_CONTENT_TYPE.encode()
_MAX_TIMEOUT_S = 3600.0
_NOTABLE_WAIT_S = 0.001

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Api:
    """Answers requests. `handle` is the server's handler."""

    def __init__(
        self,
        assignments: Assignments,
        readiness: Readiness,
        render_metrics: Callable[[], bytes],
        device: str,
        max_body_bytes: int,
        tracer: Tracer | None = None,
    ) -> None:
        """`tracer` is None where spans go nowhere."""
        self._assignments = assignments
        self._readiness = readiness
        self._render_metrics = render_metrics
        self._device = device
        self._max_body_bytes = max_body_bytes
        self._tracer = tracer
        self._pages: dict[str, Callable[[Request], None]] = {
            "/v2": self._server,
            "/v2/": self._server,
            "/v2/health/live": lambda request: _json(request, 200, {"live": True}),
            "/v2/health/ready": self._ready,
            "/v2/models/stats": self._all_statistics,
            "/health/live": lambda request: _json(request, 200, {"status": "live"}),
            "/health/ready": self._health,
            "/metrics": lambda request: request.respond(200, _METRICS, self._render_metrics()),
        }

    def handle(self, request: Request) -> None:
        """The request is answered, now or when its batch has run."""
        try:
            if b"origin" in request.headers:
                raise Forbidden("a worker asks for no key, so it answers no page in a browser: ask the gateway")
            if request.method == "POST":
                self._post(request)
            else:
                self._get(request)
        except Exception as error:
            _refuse(request, error, _version_header(request))

    # --- infer ---

    def _post(self, request: Request) -> None:
        target = target_of(request.headers.get(b"host", b""), request.target)
        if target.verb is not Verb.INFER:
            raise _NotAllowed("GET")
        lane = self._lane(target, request.headers)
        traceparent = request.headers.get(b"traceparent")
        timing = None
        if traceparent is not None and is_sampled(traceparent):
            timing = Timing(request.headers, lane.ref, self._tracer)
        try:
            self._infer(request, lane, timing)
        except Exception as error:
            _fail(request, lane, timing, error)

    def _infer(self, request: Request, lane: Lane, timing: Timing | None) -> None:
        headers = request.headers
        body: bytes | bytearray = request.body
        if b"content-encoding" in headers:
            body = compression.decompress(body, headers[b"content-encoding"], self._max_body_bytes)
        header_length = oip.header_length_of(headers.get(b"inference-header-content-length"))
        infer = oip.decode_request(body, header_length, lane.signature)
        timeout_s = lane.timeout_s
        if infer.parameters or b"x-request-timeout-ms" in headers:
            timeout_s = min(timeout_s, _asked_timeout_s(infer.parameters, headers.get(b"x-request-timeout-ms")))
        done = partial(self._done, request, lane, infer, timing)
        work = lane.batcher.submit(infer.inputs, time.monotonic() + timeout_s, done)
        if timing is not None:
            timing.queued()
            work.timing = timing
        request.on_disconnect = partial(lane.batcher.cancel, work)

    def _done(
        self,
        request: Request,
        lane: Lane,
        infer: oip.InferRequest,
        timing: Timing | None,
        outcome: dict[str, Array] | LeptonError,
        waited_s: float,
    ) -> None:
        request.on_disconnect = None  # It leads back to here: the request would be garbage in a cycle.
        if isinstance(outcome, LeptonError):
            _fail(request, lane, timing, outcome)
            return
        try:
            length, parts = oip.encode_response(lane.model, lane.version, infer, outcome, lane.signature, lane.labels)
        except Exception as error:
            _fail(request, lane, timing, error)
            return
        headers = lane.json_headers
        if length is not None:
            headers = b"%b%binference-header-content-length: %d\r\n" % (_BINARY, lane.version_header, length)
        encoding = compression.reply_encoding(request.headers.get(b"accept-encoding"))
        if encoding is not None:
            parts = [compression.compress(parts, encoding)]
            headers += b"content-encoding: %b\r\n" % encoding
        if waited_s >= _NOTABLE_WAIT_S:
            headers += b"x-lepton-queue-ms: %d\r\n" % _few_digits(int(waited_s * 1e3))
        if timing is not None:
            headers += timing.end()
        request.respond(200, headers, parts)

    def _lane(self, target: Target, headers: dict[bytes, bytes]) -> Lane:
        """The lane of the version in the path, else of the mesh's choice, else of the stable one."""
        version = target.version
        if version is None and (chosen := headers.get(b"x-lepton-version")) is not None:
            if not chosen.isdigit() or len(chosen) > 9:
                raise Invalid("header x-lepton-version must be a version's number")
            version = int(chosen)
        return self._assignments.lane(target.ref, version)

    # --- everything else ---

    def _get(self, request: Request) -> None:
        if request.method not in ("GET", "HEAD"):
            raise _NotAllowed("GET, POST")
        page = self._pages.get(request.path)
        if page is not None:
            page(request)
            return
        target = target_of(request.headers.get(b"host", b""), request.target)
        if target.verb is Verb.INFER:
            raise _NotAllowed("POST")
        lane = self._lane(target, request.headers)
        _json(request, 200, self._view(lane, target.verb), lane.version_header)

    def _view(self, lane: Lane, verb: Verb) -> Any:
        match verb:
            case Verb.READY:
                return {"name": lane.model, "ready": True}
            case Verb.CONFIG:
                return lane.config(self._device)
            case Verb.STATS:
                return {"model_stats": [lane.statistics()]}
            case _:
                return lane.metadata(self._assignments.versions(lane.ref.model))

    def _server(self, request: Request) -> None:
        _json(request, 200, {"name": "lepton", "version": "2", "extensions": oip.EXTENSIONS})

    def _all_statistics(self, request: Request) -> None:
        _json(request, 200, {"model_stats": [lane.statistics() for lane in self._assignments.lanes()]})

    def _ready(self, request: Request) -> None:
        ready = not self._readiness.reasons()
        _json(request, 200 if ready else 503, {"ready": ready})

    def _health(self, request: Request) -> None:
        status, body = self._readiness.answer()
        request.respond(status, http11.JSON, body)


class _NotAllowed(LeptonError):
    """A method that this path does not take."""

    def __init__(self, allowed: str) -> None:
        super().__init__(f"Method Not Allowed: use {allowed}")
        self.allowed = allowed


def _json(request: Request, status: int, document: Any, headers: bytes = b"") -> None:
    request.respond(status, http11.JSON + headers, orjson.dumps(document))


def _fail(request: Request, lane: Lane, timing: Timing | None, error: Exception) -> None:
    """The error, for which the lane's version answers."""
    _refuse(request, error, lane.version_header if timing is None else lane.version_header + timing.end())


def _refuse(request: Request, error: Exception, headers: bytes) -> None:
    """The error as every OIP client reads it. Of one that was not raised on purpose it says nothing."""
    target = request.target[:200].decode("latin-1")
    if not isinstance(error, LeptonError):
        _log.error("a request failed", target=target, exc_info=error)
        error = LeptonError("internal error")
    status = status_of(error)
    if isinstance(error, _NotAllowed):
        status = 405
        headers += b"allow: %b\r\n" % error.allowed.encode()
    elif isinstance(error, ModelFailed):
        _log.warning("a model failed", target=target, reason=error.message)
    elif isinstance(error, NotLoaded):
        headers += b"x-lepton-reason: not-loaded\r\n"
    elif isinstance(error, Overloaded):
        headers += OVERLOADED
    if error.retry_after_s is not None:
        headers += b"retry-after: %d\r\n" % math.ceil(error.retry_after_s)
    request.respond(status, http11.JSON + headers, http11.error_body(error.message))


def _few_digits(number: int) -> int:
    """The number but for its small bits, at most a quarter less: heads that differ little are the same to a parser."""
    return number >> (spare := max(0, number.bit_length() - 3)) << spare


def _version_header(request: Request) -> bytes:
    """The version the mesh chose, so that a failure is counted against it."""
    chosen = request.headers.get(b"x-lepton-version", b"")
    return b"x-lepton-version: %b\r\n" % chosen if chosen.isdigit() else b""


def _asked_timeout_s(parameters: oip.Parameters, header: bytes | None) -> float:
    """The shorter of OIP's `timeout` (microseconds; 0 is none) and x-request-timeout-ms. Raises Invalid."""
    asked_s = _MAX_TIMEOUT_S
    if header is not None:
        if not header.isdigit() or len(header) > 12:
            raise Invalid("header x-request-timeout-ms must be a non-negative integer")
        asked_s = min(asked_s, int(header) / 1e3)
    timeout_us = parameters.get("timeout", 0)
    if type(timeout_us) is not int or timeout_us < 0:
        raise Invalid("parameter timeout must be a non-negative integer of microseconds")
    if not 0 < timeout_us < _MAX_TIMEOUT_S * 1e6:  # Compared as an integer: it may be one that no float holds.
        return asked_s
    return min(asked_s, timeout_us / 1e6)
