"""Answers kept in memory, for models whose record says so: equal requests ask the model once. Knows no network.

A model's cache lives as long as its record stays as it is: a promotion, like any change, starts with an empty one.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

from lepton_common.http11_request import Request
from lepton_common.records import Cache as Terms
from lepton_common.records import Serving

# The headers that the answer depends on, beside the version. Those that routes are chosen by turn the cache off.
_TOLD = (b"content-type", b"content-encoding", b"accept-encoding", b"inference-header-content-length")
# What an answer takes beside its bytes, about.
_ENTRY_BYTES = 400
# Hashing more would hold up the other requests for a millisecond and longer.
MAX_BODY_BYTES = 1 << 20


def key_of(version: int, request: Request) -> bytes:
    """What two requests for one model must have in common to get one answer."""
    digest = blake2b(digest_size=32)
    for part in (b"%d" % version, *(request.headers.get(name, b"") for name in _TOLD), request.body):
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.digest()


def sole_version(serving: Serving) -> int | None:
    """The version that answers whoever names none; None while that depends on the request, on chance or a rollout."""
    moved = serving.shadow or serving.sticky or serving.matches or serving.hand or serving.forwarded
    if moved or len(serving.split) != 1 or serving.split[0].version != serving.stable:
        return None
    return serving.stable


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer with status 200, as `Request.respond` takes it."""

    headers: bytes
    body: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.headers) + len(self.body) + _ENTRY_BYTES


class Memory:
    """The bytes that the answers of all models together may take."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0


class Answers:
    """One model's answers by key; those not asked for the longest make room for new ones."""

    def __init__(self, terms: Terms, memory: Memory, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s = terms.ttl_s
        self._max_bytes = terms.max_bytes
        self._memory = memory
        self._clock = clock
        self._kept: OrderedDict[bytes, tuple[float, Kept]] = OrderedDict()
        self.used_bytes = 0

    def find(self, key: bytes) -> Kept | None:
        found = self._kept.get(key)
        if found is None:
            return None
        kept_at, kept = found
        if self._clock() - kept_at >= self._ttl_s:
            self._drop(key)
            return None
        self._kept.move_to_end(key)
        return kept

    def keep(self, key: bytes, kept: Kept) -> None:
        """It is found from now on, unless there is no room for it even without this model's other answers."""
        if key in self._kept:
            self._drop(key)
        while not self._has_room(kept.size_bytes):
            if not self._kept:
                return
            self._drop(next(iter(self._kept)))
        self._kept[key] = (self._clock(), kept)
        self._use(kept.size_bytes)

    def close(self) -> None:
        """Nothing is kept, now and later."""
        self._max_bytes = 0
        self._kept.clear()
        self._use(-self.used_bytes)

    def _has_room(self, size_bytes: int) -> bool:
        memory = self._memory
        fits = self.used_bytes + size_bytes <= self._max_bytes
        return fits and memory.used_bytes + size_bytes <= memory.max_bytes

    def _drop(self, key: bytes) -> None:
        _, kept = self._kept.pop(key)
        self._use(-kept.size_bytes)

    def _use(self, size_bytes: int) -> None:
        self.used_bytes += size_bytes
        self._memory.used_bytes += size_bytes
