"""A prefix of etcd, decoded and kept in memory: read without I/O, and still there while etcd is away."""

import asyncio
import math
import random
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from types import MappingProxyType
from typing import Generic, TypeVar

import structlog

from lepton_common.errors import LeptonError, Unavailable
from lepton_common.etcd import EtcdClient, Position, Versioned
from lepton_common.etcd_cluster import HistoryLost

T = TypeVar("T")

_MAX_WAIT_S = 2.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Mirror(Generic[T]):
    """One prefix. `items` maps each key, without the prefix, to its decoded value.

    `items` only ever changes by whole revisions, between two awaits. A value that `decode` refuses is logged and leaves
    the last good one in place, so one bad record harms nothing else.
    """

    def __init__(
        self,
        etcd: EtcdClient,
        prefix: str,
        decode: Callable[[bytes], T],
        on_change: Callable[[str, T | None], None] | None = None,
    ) -> None:
        """`on_change(key, value)` is called after every change of `items`, None when the key is gone."""
        self._etcd = etcd
        self._prefix = prefix
        self._decode = decode
        self._on_change = on_change or (lambda key, value: None)
        self._items: dict[str, T] = {}
        self._seen: dict[str, Versioned] = {}
        self._position: Position | None = None
        self._connected = False
        self._heard_at = -math.inf
        self._synced = asyncio.Event()
        self.items: Mapping[str, T] = MappingProxyType(self._items)

    async def synced(self) -> None:
        """Returns once `items` has held the whole prefix; from then on it is the last known state."""
        await self._synced.wait()

    @property
    def is_synced(self) -> bool:
        return self._synced.is_set()

    def stale_s(self, now: float) -> float:
        """Seconds at `now` (time.monotonic) since etcd was last heard: 0 while connected, infinite before the first.

        A silent death of etcd is noticed after up to 9 s.
        """
        return 0.0 if self._connected else now - self._heard_at

    async def run(self) -> None:
        """Keeps `items` as etcd has it, for ever; through etcd's absence, compaction, and restore from a backup."""
        failures = 0
        while True:
            try:
                await self._follow(self._position or await self._list())
            except HistoryLost as lost:
                _log.warning("etcd lost our place, listing again", prefix=self._prefix, reason=lost.message)
                self._position = None
            except Unavailable as error:
                if self._connected:
                    failures = 0
                if failures == 0:
                    _log.warning("etcd is away, going on with what is known", prefix=self._prefix, reason=error.message)
                failures += 1
            finally:
                if self._connected:
                    self._connected, self._heard_at = False, time.monotonic()
            # Spread, so that not everyone comes back in the same moment.
            spread = random.uniform(0.5, 1)  # noqa: S311 - guards nothing
            await asyncio.sleep(min(_MAX_WAIT_S, 0.05 * 2 ** min(failures, 10)) * spread)

    async def _list(self) -> Position:
        found, revision = await self._etcd.list(self._prefix)
        present = {each.key for each in found}
        for key in [key for key in self._seen if key not in present]:
            self._apply(key, None)
        for each in found:
            if self._seen.get(each.key) != each:
                self._apply(each.key, each)
        self._heard_at = time.monotonic()
        self._position = Position(revision)
        self._synced.set()
        return self._position

    async def _follow(self, position: Position) -> None:
        async with aclosing(self._etcd.watch(self._prefix, position)) as stream:
            async for heard in stream:
                self._connected = True
                for key, value in heard.changes:
                    self._apply(key, value)
                # Moved last: when on_change fails, the next run hears of the same changes again.
                self._position = heard.position

    def _apply(self, key: str, value: Versioned | None) -> None:
        name = key.removeprefix(self._prefix)
        if value is None:
            self._items.pop(name, None)
            self._on_change(name, None)
            self._seen.pop(key, None)
            return
        try:
            decoded = self._decode(value.value)
        except (ValueError, LeptonError) as error:
            _log.error("a record in etcd is not readable", key=key, reason=str(error)[:500])
        else:
            self._items[name] = decoded
            self._on_change(name, decoded)
        self._seen[key] = value
