"""A model's requests through the mesh: one call each, repeated while the mesh restarts, its answer passed back."""

import asyncio
import math
import time
from collections.abc import Callable
from http import HTTPStatus

import orjson
import structlog
from lepton_common.auth import Caller
from lepton_common.errors import Invalid, LeptonError
from lepton_common.http11 import JSON, Request, error_body
from lepton_common.http11_client import Call, Failure, Upstream, UpstreamError

from lepton_gateway import windows
from lepton_gateway.admission import Admission
from lepton_gateway.inference import Inference, Ways
from lepton_gateway.lanes import Answer, Lane
from lepton_gateway.logs import LogSettings
from lepton_gateway.request_ids import id_line
from lepton_gateway.routes import Route
from lepton_gateway.shadows import Shadows
from lepton_gateway.traces import Trace
from lepton_gateway.tracing import Tracing
from lepton_gateway.windows import ASKED, CLIENT_GONE, FORCED, LEFT, QUEUE_FULL, SPLIT

# How long a request waits for a mesh that is being restarted, and how often it may meet one that breaks off.
_PATIENCE_S = 10.0
_MAX_LOST = 3
_FIRST_BACKOFF_S = 0.02
_LAST_BACKOFF_S = 0.5
# How much longer than the mesh and the worker the gateway waits: their 504 says which version took too long.
_GRACE_S = 0.1

# The line of inference, as `Route.head` wants it.
INFER = "POST /infer"
# Users are spread over so many, and the mesh gives each version a range of them.
_USER_BUCKETS = 10_000

_PASSED_BACK = (
    b"content-type",
    b"x-lepton-version",
    b"inference-header-content-length",
    b"content-encoding",
    b"retry-after",
    b"x-lepton-reason",
)
_TIMEOUT = b"x-request-timeout-ms"
_NOTABLE_WAIT_S = 0.001
# The worker's word for how long the request waited for a slot; none where that was less than a millisecond.
_QUEUED = b"x-lepton-queue-ms"
# Envoy's own words: the worker had not answered in time.
_MESH_GAVE_UP = b"upstream request timeout"
_RETRY_AFTER = b"retry-after: 1\r\n"
_RETRYABLE = frozenset({429, 503, 504})

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Proxy:
    """Sends requests to the mesh."""

    def __init__(
        self, upstream: Upstream, tracing: Tracing, logs: LogSettings, shadows: Shadows, admission: Admission
    ) -> None:
        self.upstream = upstream
        self.tracing = tracing
        self.logs = logs
        self.shadows = shadows
        self.admission = admission

    def ways(self, refuse: Callable[[Request, LeptonError], None]) -> Ways:
        """Where `infer` leads. `refuse` answers a request that has waited in vain."""
        return Ways(self.admission, self._send_admitted, refuse)

    def infer(
        self, ways: Ways, request: Request, route: Route, caller: Caller, version: int | None, user: int | None
    ) -> None:
        """The request is sent, now or at its turn. Raises Limited or Overloaded when it is refused.

        Without a version the mesh chooses one by the split, and for one `user`, a hash, the same until the split grows.
        """
        pool = route.pool if version is None else route.pool_of(version)
        lane = route.lanes.get(pool)
        if lane is None:
            lane = route.lanes[pool] = Lane(self.admission.pool(pool), route.serving.ref.tenant, route.use)
        timeout_s = route.timeout_s if _TIMEOUT not in request.headers else _timeout_s(request, route)
        if not request.background and self.admission.passes(lane, caller, timeout_s):
            self.send(request, route, INFER, version, request.body, user, lane)
            return
        ticket = Inference(ways, request, route, lane, version, user)
        ticket.arrived = time.monotonic()
        ticket.deadline = ticket.arrived + timeout_s
        try:
            self.admission.enter(ticket, caller)
        except LeptonError:
            route.counts.refused()
            raise
        if ticket.sent is None:
            request.on_disconnect = ticket.cancel

    def _send_admitted(self, ticket: Inference) -> None:
        request = ticket.request
        self.send(request, ticket.route, INFER, ticket.version, request.body, ticket.user, ticket.lane, ticket)

    def send(
        self,
        request: Request,
        route: Route,
        line: str,
        version: int | None,
        body: bytes,
        user: int | None = None,
        lane: Lane | None = None,
        ticket: Inference | None = None,
    ) -> None:
        """The request is answered when the mesh has, or within its deadline. `line` is as `Route.head` wants it.

        Its place in the `lane` is given back when it is over. A `ticket` may have waited for it.
        """
        began = time.monotonic()
        headers = request.headers
        timeout_s = route.timeout_s
        waited_s = 0.0
        asked = b""
        if ticket is not None:
            waited_s, began = began - ticket.arrived, ticket.arrived
        if _TIMEOUT in headers or waited_s > _NOTABLE_WAIT_S:
            timeout_s = _timeout_s(request, route)
            # The mesh knows which version let the caller wait, and says so in its 504; we would not.
            left_ms = max(1, round((timeout_s - waited_s) * 1e3))
            asked = b"x-envoy-upstream-rq-timeout-ms: %d\r\n" % left_ms
            if waited_s > _NOTABLE_WAIT_S:
                headers = {**headers, _TIMEOUT: b"%d" % left_ms}
        trace, carried = None, b""
        if line == INFER and (self.tracing.active or b"traceparent" in headers):
            trace, carried = self.tracing.start(request, route.serving.ref, began)
        forwarded = [
            b"%b: %b\r\n" % (name, headers[name])
            for name in (route.forwarded_traced if carried else route.forwarded)
            if name in headers
        ]
        head = route.head(line, version) + asked + b"".join(forwarded)
        if user is not None:
            head += b"x-lepton-bucket: %d\r\n" % (user % _USER_BUCKETS)
        head += carried
        kind = ASKED if line != INFER else SPLIT if version is None else FORCED
        exchange = Exchange(self, request, route, head, body, began, timeout_s, trace, kind, user)
        exchange.lane, exchange.ticket = lane, ticket
        counts = route.counts
        counts.in_flight += 1
        if not counts.is_awake:
            counts.wake()
        request.on_disconnect = exchange.cancel
        self.upstream.send(exchange)


class Exchange(Call):
    """A request, its way through the mesh, and its answer."""

    __slots__ = (
        *("_kind", "_lost", "_over", "_proxy", "_queued_s", "_timeout_s", "_tries", "_user"),
        *("began", "lane", "request", "route", "ticket", "trace", "version"),
    )

    def __init__(
        self,
        proxy: Proxy,
        request: Request,
        route: Route,
        head: bytes,
        body: bytes,
        began: float,
        timeout_s: float,
        trace: Trace | None,
        kind: int,
        user: int | None,
    ) -> None:
        """`began` is the monotonic time of the request's arrival; `head` is as `Call` wants it."""
        super().__init__(head, body, began + timeout_s + _GRACE_S)
        self._proxy = proxy
        self._timeout_s = timeout_s
        self._kind = kind
        self._user = user
        self._queued_s = 0.0  # at the worker
        self.lane: Lane | None
        self.ticket: Inference | None
        self._tries = 0
        self._lost = 0
        self._over = False
        self.request = request
        self.route = route
        self.began = began
        self.version = b""
        self.trace = trace

    def answered(self, status: int, headers: dict[bytes, bytes], body: bytes) -> None:
        self.version = headers.get(b"x-lepton-version", b"")
        if _QUEUED in headers:
            self._queued_s = int(headers[_QUEUED]) / 1e3
        if self.trace is not None:
            self.trace.timing = headers.get(b"server-timing", b"")
        block = b"".join([b"%b: %b\r\n" % (name, headers[name]) for name in _PASSED_BACK if name in headers])
        counted = status
        if status != HTTPStatus.OK:
            gave_up = status == HTTPStatus.GATEWAY_TIMEOUT and _MESH_GAVE_UP in body
            if gave_up or not _is_oip_error(body):
                block = JSON + b"".join(
                    b"%b: %b\r\n" % (name, headers[name])
                    for name in (b"x-lepton-version", b"retry-after")
                    if name in headers
                )
                body = error_body(self._too_late() if gave_up else _text_of(status, body))
            if status in _RETRYABLE and b"retry-after" not in headers:
                block += _RETRY_AFTER
            if status == HTTPStatus.SERVICE_UNAVAILABLE and b"x-envoy-ratelimited" in headers:
                counted = QUEUE_FULL
        self._finish(status, block, body, counted)
        if self.route.shadow is not None and status == HTTPStatus.OK and self._kind == SPLIT:
            self._proxy.shadows.copy(self.request, self.route, headers, body)

    def failed(self, error: UpstreamError) -> None:
        if error.failure in (Failure.CONNECT, Failure.LOST) and self._try_again(error.failure):
            return
        name = self.route.serving.model
        match error.failure:
            case Failure.TIMEOUT:
                self._finish(504, JSON + _RETRY_AFTER, error_body(self._too_late()), 504)
            case Failure.INVALID | Failure.TOO_LARGE:
                self._finish(502, JSON, error_body(f"model {name!r}: {error.message}"), 502)
            case _:
                counted = QUEUE_FULL if error.failure is Failure.FULL else 503
                message = f"model {name!r} is out of reach: {error.message}"
                self._finish(503, JSON + _RETRY_AFTER, error_body(message), counted)

    def cancel(self) -> None:
        """The caller left: the mesh and the worker hear of it."""
        super().cancel()
        self._finish(CLIENT_GONE, b"", b"", LEFT)

    def _too_late(self) -> str:
        """Whose answer did not come, and in what time: the mesh may have been told by hand to wait for less."""
        version = f" version {self.version.decode('latin-1')}" if self.version else ""
        waited_s = min(self._timeout_s, time.monotonic() - self.began)
        return f"model {self.route.serving.model!r}{version}: no answer within {round(waited_s * 1e3)} ms"

    def _try_again(self, failure: Failure) -> bool:
        """Inference may be repeated, so a mesh that restarts in the middle costs time only."""
        self._lost += failure is Failure.LOST
        backoff_s = min(_FIRST_BACKOFF_S * 2**self._tries, _LAST_BACKOFF_S)
        self._tries += 1
        if self._lost > _MAX_LOST or time.monotonic() + backoff_s >= min(self.deadline, self.began + _PATIENCE_S):
            return False
        asyncio.get_running_loop().call_later(backoff_s, self._send_again)
        return True

    def _send_again(self) -> None:
        if not self._over:
            self._proxy.upstream.send(self)

    def _finish(self, status: int, headers: bytes, body: bytes, counted: int) -> None:
        """`counted` is the status as `windows.py` tells them apart."""
        if self._over:
            return
        self._over = True
        self.request.on_disconnect = None  # It leads back to here: the request would be garbage in a cycle.
        counts = self.route.counts
        now = time.monotonic()
        seconds = now - self.began
        if counted == LEFT:
            counts.left(self._kind, seconds)
        else:
            counts.add(self._kind, self.version, counted, seconds, self._user)
        counts.in_flight -= 1  # After the answer was counted: until then its second belongs to somebody.
        if self.trace is None:
            headers += id_line(self.request)
        else:
            headers += self.trace.end(self.version, status, self._tries + 1)
        if self._proxy.logs.verbose_level:
            self._log(status)
        if counted != LEFT:
            self.request.respond(status, headers, body)
        lane = self.lane
        if lane is not None:
            told = self._told(lane, now, counted) if lane.listens else None
            self._proxy.admission.leave(lane, self.ticket, now, told)

    def _told(self, lane: Lane, now: float, counted: int) -> Answer | None:
        """How the request went, as far as that says something of the workers' load."""
        sent = self.began if self.ticket is None or self.ticket.sent is None else self.ticket.sent
        seconds = now - sent
        match counted:
            case HTTPStatus.OK:
                return Answer(seconds, self._queued_s, self._timeout_s)
            case HTTPStatus.GATEWAY_TIMEOUT:
                queued_s = max(0.0, seconds - lane.service.run_s.value)
                return Answer(seconds, queued_s, self._timeout_s, served=False)
            case windows.QUEUE_FULL:
                return Answer(seconds, math.inf, self._timeout_s, served=False)
        return None

    def _log(self, status: int) -> None:
        _log.info(
            "request",
            model=str(self.route.serving.ref),
            version=self.version.decode("latin-1"),
            status=status,
            milliseconds=round((time.monotonic() - self.began) * 1e3, 3),
            bytes_in=len(self.request.body),
            path=self.request.path[:200],
        )


def _is_oip_error(body: bytes) -> bool:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return isinstance(document, dict) and isinstance(document.get("error"), str)


def _text_of(status: int, body: bytes) -> str:
    """What a proxy said in plain text; the status' own words when it said nothing."""
    text = body[:500].decode("utf-8", "replace").strip()
    if text and not text.startswith(("<", "{")):
        return text
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return f"the model answered with status {status}"


def _timeout_s(request: Request, route: Route) -> float:
    """The shorter of the caller's and the model's. Raises Invalid."""
    asked = request.headers.get(_TIMEOUT)
    if asked is None:
        return route.timeout_s
    if not asked.isdigit() or len(asked) > 12:
        raise Invalid("header x-request-timeout-ms must be a non-negative integer")
    return min(route.timeout_s, int(asked) / 1e3)
