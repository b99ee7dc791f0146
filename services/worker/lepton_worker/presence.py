"""Tells etcd that this worker lives and what it holds, under a lease: when the worker dies, the record goes."""

import asyncio
from collections.abc import Callable

import structlog
from lepton_common.errors import Unavailable
from lepton_common.etcd import EtcdClient, Lease
from lepton_common.etcd_cluster import LeaseLost
from lepton_common.records import WORKERS, WorkerState

_TTL_S = 10
_PAUSE_S = 1.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Presence:
    """The worker's record. `state` says what it is now; `changed` has it written."""

    def __init__(self, etcd: EtcdClient, state: Callable[[], WorkerState], ttl_s: int = _TTL_S) -> None:
        self._etcd = etcd
        self._state = state
        self._ttl_s = ttl_s
        self._changed = asyncio.Event()

    def changed(self) -> None:
        self._changed.set()

    async def run(self) -> None:
        """For ever: the record is current whenever etcd can be reached, under a new lease when the old one is lost."""
        while True:
            try:
                async with self._etcd.lease(self._ttl_s) as lease:
                    await self._keep_current(lease)
            except (Unavailable, LeaseLost) as error:
                _log.warning("not announced in etcd, serving on", reason=error.message)
            await asyncio.sleep(_PAUSE_S)

    async def _keep_current(self, lease: Lease) -> None:
        lost = asyncio.create_task(lease.lost.wait())
        try:
            while not lease.lost.is_set():
                self._changed.clear()
                state = self._state()
                await self._etcd.put(f"{WORKERS}{state.id}", state.model_dump_json().encode(), lease=lease)
                changed = asyncio.create_task(self._changed.wait())
                await asyncio.wait({changed, lost}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
        finally:
            lost.cancel()
