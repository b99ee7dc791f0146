"""Equal requests for a model whose cache is on share one answer: from memory, or of the one that is on its way."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from lepton_common.http11_request import Request, header_block
from lepton_common.records import Serving

from lepton_gateway import answers
from lepton_gateway.answers import Answer, Handle
from lepton_gateway.cache import MAX_BODY_BYTES, Answers, Kept, Memory, key_of, sole_version
from lepton_gateway.request_ids import OF_ONE_REQUEST, id_line

_HIT, _MISS = b"x-lepton-cache: hit\r\n", b"x-lepton-cache: miss\r\n"
_TIMEOUT = b"x-request-timeout-ms"


@dataclass(slots=True)
class Lookups:
    """Of one version: how many requests were answered without asking it, how many were not, and what looking took."""

    hits: int = 0
    hit_ns: int = 0
    misses: int = 0
    miss_ns: int = 0


class CacheCounts:
    """One model's lookups by version. They outlive its cache."""

    def __init__(self) -> None:
        self.by_version: defaultdict[int, Lookups] = defaultdict(Lookups)

    def add(self, version: int, *, hit: bool, took_ns: int) -> None:
        lookups = self.by_version[version]
        if hit:
            lookups.hits += 1
            lookups.hit_ns += took_ns
        else:
            lookups.misses += 1
            lookups.miss_ns += took_ns


class ResponseCache:
    """What the gateway answers for a model without asking it, as long as its record stays as it is.

    What is answered so is in nobody's windows: it says nothing about a version's health, and takes no time. A version
    that nobody named is only kept when the record leaves no choice and the answer says that it was the one.
    """

    def __init__(self, serving: Serving, memory: Memory, counts: CacheCounts) -> None:
        """`serving.cache` is there."""
        assert serving.cache is not None
        self._answers = Answers(serving.cache, memory)
        self._sole = sole_version(serving)
        self._timeout_ms = serving.limits.timeout_ms
        self._counts = counts
        self._flights: dict[object, _Flight] = {}

    @property
    def used_bytes(self) -> int:
        return self._answers.used_bytes

    def close(self) -> None:
        """Nothing is kept any more. Who waits for an answer gets it."""
        self._answers.close()

    def answer(self, request: Request, version: int | None, ask: Handle) -> bool:
        """Whether the request is answered here, now or later; `ask`, which must not raise, then asks the model for it.

        `version` is what the caller named.
        """
        began = time.perf_counter_ns()
        version = self._sole if version is None else version
        if version is None or len(request.body) > MAX_BODY_BYTES:
            return False
        key = key_of(version, request)
        kept = self._answers.find(key)
        # Who has less time, or more, than those who wait already waits with others of their kind.
        kind = (key, request.headers.get(_TIMEOUT))
        flight = self._flights.get(kind)
        if kept is not None:
            self._counts.add(version, hit=True, took_ns=time.perf_counter_ns() - began)
            request.respond(200, kept.headers + _HIT + id_line(request), kept.body)
        elif flight is not None:
            flight.join(request, began)
        else:
            flight = self._flights[kind] = _Flight(kind, key, version, ask, self._over)
            flight.join(request, began)
            flight.start(request, request.headers)
        return True

    def _over(self, flight: "_Flight", answer: Answer | None) -> None:
        """The flight has its answer, or None when nobody waits for one any more."""
        if self._flights.get(flight.kind) is flight:
            del self._flights[flight.kind]
        if answer is None:
            return
        headers = header_block(line for line in answer.headers.items() if line[0] not in OF_ONE_REQUEST)
        is_shared = answer.status == 200 and answer.headers.get(b"x-lepton-version") == b"%d" % flight.version
        if is_shared:
            self._answers.keep(flight.key, Kept(headers, answer.body))
        (first, _), *others = flight.waiting.items()
        self._counts.add(flight.version, hit=False, took_ns=flight.looked_ns)
        # Unless who asked has left, and another one waits in their place.
        own = header_block(answer.headers.items()) if first is flight.asker else headers + id_line(first)
        _respond(first, answer.status, own + _MISS, answer.body)
        for request, began in others:
            if is_shared:
                self._counts.add(flight.version, hit=True, took_ns=time.perf_counter_ns() - began)
                _respond(request, 200, headers + _HIT + id_line(request), answer.body)
            else:
                # What failed for one caller need not for another; and each failure is counted, as without a cache.
                alone = _Flight(None, flight.key, flight.version, flight.ask, self._over)
                alone.join(request, began)
                alone.start(request, self._with_time_left(request, began))

    def _with_time_left(self, request: Request, began: int) -> dict[bytes, bytes]:
        asked = request.headers.get(_TIMEOUT)
        limit_ms = self._timeout_ms if asked is None else min(int(asked), self._timeout_ms)
        waited_ms = (time.perf_counter_ns() - began) // 10**6
        return {**request.headers, _TIMEOUT: b"%d" % max(1, limit_ms - waited_ms)}


class _Flight:
    """One question to the model, on behalf of everybody who waits for its answer."""

    __slots__ = ("_asked", "_over", "ask", "asker", "key", "kind", "looked_ns", "version", "waiting")

    def __init__(
        self, kind: object, key: bytes, version: int, ask: Handle, over: Callable[["_Flight", Answer | None], None]
    ) -> None:
        self.kind = kind
        self.key = key
        self.version = version
        self.ask = ask
        self._over = over
        self._asked: Request | None = None
        self.asker: Request | None = None
        self.looked_ns = 0
        self.waiting: dict[Request, int] = {}  # and since when, by the clock `perf_counter_ns`

    def join(self, request: Request, began: int) -> None:
        self.waiting[request] = began
        request.on_disconnect = partial(self._left, request)

    def start(self, request: Request, headers: dict[bytes, bytes]) -> None:
        """The model is asked what the request asks, which waits here."""
        self.looked_ns = time.perf_counter_ns() - self.waiting[request]
        asked = answers.request(request.method, request.target, headers, request.body, self._answered, request.peer)
        self._asked = asked
        self.asker = request
        self.ask(asked)

    def _answered(self, answer: Answer) -> None:
        if self.waiting:
            self._over(self, answer)

    def _left(self, request: Request) -> None:
        """A caller is gone; the model goes on for the others, if there are any."""
        del self.waiting[request]
        if not self.waiting and self._asked is not None:
            self._over(self, None)
            if self._asked.on_disconnect is not None:
                self._asked.on_disconnect()


def _respond(request: Request, status: int, headers: bytes, body: bytes) -> None:
    request.on_disconnect = None
    request.respond(status, headers, body)
