"""Copies of answered requests to a version that is to be tried: its answers are compared and thrown away.

A copy costs the caller nothing: it leaves after the answer, on connections of its own, and where too many are under way
it does not leave at all.
"""

import time
from collections.abc import Callable

from lepton_common.errors import Invalid, TooLarge
from lepton_common.http11 import Request
from lepton_common.http11_client import Call, Failure, Upstream, UpstreamError
from lepton_common.sketch import bucket_of

from lepton_gateway import comparison
from lepton_gateway.routes import Route
from lepton_gateway.windows import Outcome, Shadowing, outcome_of

MAX_COPIES = 64
MAX_BYTES = 16 << 20

_LABEL = b"x-lepton-label"
_MARK = b"x-lepton-shadow: 1\r\n"
# The copy has the model's own time, and what it does is no part of the caller's trace.
_NOT_COPIED = frozenset({b"x-request-timeout-ms", b"traceparent", b"tracestate"})


class Shadows:
    """Sends copies. `upstream` leads into the mesh and is used for nothing else; `chance` is uniform from 0 to 1."""

    def __init__(
        self,
        upstream: Upstream,
        chance: Callable[[], float],
        *,
        max_copies: int = MAX_COPIES,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._upstream = upstream
        self._chance = chance
        self._max_copies = max_copies
        self._max_bytes = max_bytes
        self.copies = 0
        self.bytes = 0

    def copy(self, request: Request, route: Route, headers: dict[bytes, bytes], answer: bytes) -> None:
        """The stable version answered so, with 200: maybe the shadow gets the same request."""
        shadow = route.shadow
        if shadow is None or not route.has(shadow.version) or headers.get(b"x-lepton-version") != route.stable:
            return
        if shadow.version == route.serving.stable or self._chance() * 100 >= shadow.percent:
            return
        size = len(request.body) + len(answer)
        if self.copies >= self._max_copies or self.bytes + size > self._max_bytes or len(answer) > comparison.MAX_BYTES:
            route.counts.shadowing(shadow.version).dropped += 1
            return
        forwarded = [
            b"%b: %b\r\n" % (name, request.headers[name])
            for name in route.forwarded
            if name in request.headers and name not in _NOT_COPIED
        ]
        head = b"".join([route.head("POST /infer", shadow.version), *forwarded, _MARK])
        self.copies += 1
        self.bytes += size
        self._upstream.send(_Copy(self, request, route, shadow.version, head, headers, answer))

    def done(self, size: int) -> None:
        self.copies -= 1
        self.bytes -= size


class _Copy(Call):
    """One copy, and the stable's answer that it is compared with."""

    __slots__ = ("_answer", "_began", "_headers", "_label", "_route", "_shadows", "_size", "_version")

    def __init__(
        self,
        shadows: Shadows,
        request: Request,
        route: Route,
        version: int,
        head: bytes,
        headers: dict[bytes, bytes],
        answer: bytes,
    ) -> None:
        self._began = time.monotonic()
        super().__init__(head, request.body, self._began + route.timeout_s)
        self._shadows = shadows
        self._route = route
        self._version = version
        self._headers = headers
        self._answer = answer
        self._label = request.headers.get(_LABEL)
        self._size = len(request.body) + len(answer)

    def answered(self, status: int, headers: dict[bytes, bytes], body: bytes) -> None:
        seen = self._end()
        if seen is None:
            return
        bucket = bucket_of(time.monotonic() - self._began)
        seen.latency[bucket] = seen.latency.get(bucket, 0) + 1
        if status != 200:
            overloaded = outcome_of(status) is Outcome.SHED or b"x-envoy-ratelimited" in headers
            # Having no room speaks of load, not of the version.
            seen.dropped += overloaded
            seen.failed += not overloaded
        else:
            self._compare(seen, headers, body)

    def failed(self, error: UpstreamError) -> None:
        """Not sent again: a mesh that restarts has live requests to see to."""
        seen = self._end()
        if seen is not None:
            is_its_own = error.failure in (Failure.TIMEOUT, Failure.INVALID, Failure.TOO_LARGE)
            seen.failed += is_its_own
            seen.dropped += not is_its_own

    def _end(self) -> Shadowing | None:
        """The second that this counts in; None when the version is no shadow any more."""
        self._shadows.done(self._size)
        shadow = self._route.shadow
        if shadow is None or shadow.version != self._version:
            return None
        return self._route.counts.shadowing(self._version)

    def _compare(self, seen: Shadowing, headers: dict[bytes, bytes], body: bytes) -> None:
        try:
            stable = comparison.decode(self._headers, self._answer)
        except Invalid:
            seen.dropped += 1
            return
        try:
            found = comparison.compare(stable, comparison.decode(headers, body), self._label)
        except TooLarge:
            seen.dropped += 1
        except Invalid:
            seen.failed += 1
        else:
            _count(seen, found)


def _count(seen: Shadowing, found: comparison.Comparison) -> None:
    seen.agreed += found.agrees
    seen.disagreed += not found.agrees
    match found.stable_right, found.shadow_right:
        case True, True:
            seen.both_right += 1
        case False, False:
            seen.both_wrong += 1
        case True, False:
            seen.only_stable_right += 1
        case False, True:
            seen.only_shadow_right += 1
