"""A model's requests through the mesh: one call each, repeated while the mesh restarts, its answer passed back."""

import asyncio
import time
from http import HTTPStatus

import orjson
import structlog
from lepton_common.errors import Invalid
from lepton_common.http11 import JSON, Request, error_body
from lepton_common.http11_client import Call, Failure, Upstream, UpstreamError
from opentelemetry.trace import Span

from lepton_gateway import tracing
from lepton_gateway.logs import LogSettings
from lepton_gateway.routes import Route
from lepton_gateway.shadows import Shadows
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
# Envoy's own words: the worker had not answered in time.
_MESH_GAVE_UP = b"upstream request timeout"
_RETRY_AFTER = b"retry-after: 1\r\n"
_RETRYABLE = frozenset({429, 503, 504})

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Proxy:
    """Sends requests to the mesh."""

    def __init__(self, upstream: Upstream, tracing: Tracing, logs: LogSettings, shadows: Shadows) -> None:
        self.upstream = upstream
        self.tracing = tracing
        self.logs = logs
        self.shadows = shadows

    def send(
        self, request: Request, route: Route, line: str, version: int | None, body: bytes, user: int | None = None
    ) -> None:
        """The request is answered when the mesh has, or within its deadline. `line` is as `Route.head` wants it.

        Without a version the mesh chooses one by the split, and for one `user`, a hash, the same until the split grows.
        """
        began = time.monotonic()
        headers = request.headers
        timeout_s = route.timeout_s
        asked = b""
        if b"x-request-timeout-ms" in headers:
            timeout_s = min(timeout_s, _asked_timeout_s(headers[b"x-request-timeout-ms"]))
            # The mesh knows which version let the caller wait, and says so in its 504; we would not.
            asked = b"x-envoy-upstream-rq-timeout-ms: %d\r\n" % max(1, round(timeout_s * 1e3))
        started = self.tracing.start(request, route.serving.ref) if self.tracing.active else None
        forwarded = [
            b"%b: %b\r\n" % (name, headers[name])
            for name in (route.forwarded if started is None else route.forwarded_traced)
            if name in headers
        ]
        head = route.head(line, version) + asked + b"".join(forwarded)
        if user is not None:
            head += b"x-lepton-bucket: %d\r\n" % (user % _USER_BUCKETS)
        span = None
        if started is not None:
            span, carried = started
            head += carried
        kind = ASKED if line != INFER else SPLIT if version is None else FORCED
        exchange = Exchange(self, request, route, head, body, began, timeout_s, span, kind, user)
        counts = route.counts
        counts.in_flight += 1
        if not counts.is_awake:
            counts.wake()
        request.on_disconnect = exchange.cancel
        self.upstream.send(exchange)


class Exchange(Call):
    """A request, its way through the mesh, and its answer."""

    __slots__ = (
        *("_kind", "_lost", "_over", "_proxy", "_timeout_s", "_tries", "_user"),
        *("began", "request", "route", "span", "version"),
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
        span: Span | None,
        kind: int,
        user: int | None,
    ) -> None:
        """`began` is the monotonic time of the request's arrival; `head` is as `Call` wants it."""
        super().__init__(head, body, began + timeout_s + _GRACE_S)
        self._proxy = proxy
        self._timeout_s = timeout_s
        self._kind = kind
        self._user = user
        self._tries = 0
        self._lost = 0
        self._over = False
        self.request = request
        self.route = route
        self.began = began
        self.version = b""
        self.span = span

    def answered(self, status: int, headers: dict[bytes, bytes], body: bytes) -> None:
        self.version = headers.get(b"x-lepton-version", b"")
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
        seconds = time.monotonic() - self.began
        if counted == LEFT:
            counts.left(self._kind, seconds)
        else:
            counts.add(self._kind, self.version, counted, seconds, self._user)
        counts.in_flight -= 1  # After the answer was counted: until then its second belongs to somebody.
        if self.span is not None:
            tracing.end(self.span, self.version, status)
        if self._proxy.logs.verbose_level:
            self._log(status)
        if counted != LEFT:
            self.request.respond(status, headers, body)

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


def _asked_timeout_s(value: bytes) -> float:
    if not value.isdigit() or len(value) > 12:
        raise Invalid("header x-request-timeout-ms must be a non-negative integer")
    return int(value) / 1e3
