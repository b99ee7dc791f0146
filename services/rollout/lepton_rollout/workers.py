"""The live workers, as etcd tells of them."""

import asyncio
import contextlib
from collections.abc import Collection

from lepton_common.etcd import EtcdClient
from lepton_common.mirror import Mirror
from lepton_common.records import WORKERS, WorkerState

from lepton_rollout.mesh import Mesh

_PLACE_AGAIN_S = 10.0


class Signal:
    """Something happened. `count` says how often so far, so that nothing between a look and a wait is missed."""

    def __init__(self) -> None:
        self.count = 0
        self._next = asyncio.Event()

    def send(self) -> None:
        self.count += 1
        self._next.set()
        self._next = asyncio.Event()

    async def wait(self, seen: int, timeout_s: float) -> None:
        """Returns once `count` is past `seen`, or when the time is over."""
        if self.count == seen:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._next.wait()


class Workers:
    """The table of workers. `changed` is sent when one of them comes, goes or says something new.

    The runner and the commands send it as well, for whoever waits for a rollout.
    """

    def __init__(self, etcd: EtcdClient) -> None:
        self.changed = Signal()
        self.mirror = Mirror(etcd, WORKERS, WorkerState.model_validate_json, lambda key, state: self.changed.send())

    def states(self) -> Collection[WorkerState]:
        return self.mirror.items.values()

    async def follow(self, mesh: Mesh) -> None:
        """For ever: the mesh's pools are the live workers. Ends with Unavailable when the mesh is away."""
        await self.mirror.synced()
        while True:
            seen = self.changed.count
            await mesh.place(self.states())
            await self.changed.wait(seen, _PLACE_AGAIN_S)
