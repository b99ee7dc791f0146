"""The serving records in etcd and the mesh's routes, kept together: etcd is the truth, the mesh follows."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from lepton_common.errors import Conflict, Unavailable
from lepton_common.etcd import EtcdClient
from lepton_common.records import SERVING, Serving
from lepton_common.types import ModelRef

from lepton_rollout.mesh import Mesh, Stale, virtual_service
from lepton_rollout.record import unserved

Change = Callable[[Serving], Serving]
# Raises when the writer has lost its right to write.
Fence = Callable[[], Awaitable[None]]

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Raced(Unavailable):
    """The record was changed by someone else between reading and writing. Nothing of this change was written."""


async def _unfenced() -> None:
    """For who needs no right of their own, such as a person's command."""


class ServingTable:
    """Every model's record. Only rollout writes here, each write only over the record it was computed from.

    A replica moves traffic for one model at a time, so that no older record can reach the mesh after a newer one.
    """

    def __init__(self, etcd: EtcdClient, mesh: Mesh) -> None:
        self._etcd = etcd
        self._mesh = mesh
        self._one_at_a_time = asyncio.Lock()

    async def get(self, model: ModelRef) -> Serving:
        """The model's record as it is now; one of generation 0 when nothing of it was ever served."""
        serving, _ = await self._read(model)
        return serving

    async def list(self, tenant: str = "") -> list[Serving]:
        """Every record of the tenant, or of all, by name."""
        found, _ = await self._etcd.list(f"{SERVING}{tenant}/" if tenant else SERVING)
        return [Serving.model_validate_json(each.value) for each in found]

    async def record(self, model: ModelRef, change: Change, fence: Fence = _unfenced) -> Serving:
        """The record is changed: workers load and unload by it. The mesh is as it was. Raises Raced."""
        before, revision = await self._read(model)
        await fence()
        return await self._write(before, change(before), revision)

    async def live(self, model: ModelRef) -> tuple[Serving, dict[str, Any], dict[str, Any]]:
        """The model's record, VirtualService and DestinationRule. Raises as Mesh.live."""
        serving, _ = await self._read(model)
        return serving, *await self._mesh.live(serving)

    async def shift(self, model: ModelRef, change: Change, fence: Fence = _unfenced) -> Serving:
        """The mesh has acknowledged the changed record's routes, and then the record is changed.

        For a change that moves traffic to another version: no worker lets the old one go before the mesh has left it.
        Raises as Mesh.apply, and Raced; the same call again goes on from there. Until then, `reapply` goes back.
        """
        async with self._one_at_a_time:
            before, revision = await self._read(model)
            after = change(before)
            # After the read, so that whoever takes over from here on changes what was read, and this write fails.
            await fence()
            try:
                await self._apply(after)
            except Stale as stale:
                # A shift that died after the mesh had it and before etcd did: this one goes before it.
                after = after.model_copy(update={"generation": await self._past(stale, model)})
                await self._apply(after)
            try:
                return await self._write(before, after, revision)
            except Raced:
                # The mesh must not keep what never became true.
                await self._reapply_one(model)
                raise

    async def settle(self, model: ModelRef, change: Change, fence: Fence = _unfenced) -> Serving:
        """The record is changed, and then the mesh has acknowledged its routes.

        For a change that only takes traffic, or a warm version, away or leaves both alone. Raises Raced with nothing
        done, and as Mesh.apply: then `reapply` catches up.
        """
        async with self._one_at_a_time:
            await self.record(model, change, fence)
            return await self._reapply_one(model)

    async def reapply(self) -> None:
        """The mesh's routes are what the records say. Raises as Mesh.apply."""
        async with self._one_at_a_time:
            try:
                await self._mesh.apply(*(virtual_service(serving) for serving in await self.list()))
            except Stale as stale:
                for name in stale.newer:
                    await self._reapply_one(ModelRef.parse(name))

    async def _reapply_one(self, model: ModelRef) -> Serving:
        serving, revision = await self._read(model)
        try:
            await self._apply(serving)
        except Stale as stale:
            after = serving.model_copy(update={"generation": await self._past(stale, model)})
            await self._write(serving, after, revision)
            await self._apply(after)
            return after
        return serving

    async def _past(self, stale: Stale, model: ModelRef) -> int:
        """The generation that goes before the mesh's. Raises Raced when etcd has that one too: ours was the old one."""
        ahead = stale.newer[str(model)]
        now, _ = await self._read(model)
        if now.generation >= ahead:
            raise Raced(f"model {model.model!r} was changed by another call meanwhile") from stale
        return ahead + 1

    async def _apply(self, serving: Serving) -> None:
        """Raises as Mesh.apply, but for what somebody else changed there: that is waited for until it is on record."""
        try:
            await self._mesh.apply(virtual_service(serving))
        except Stale:
            raise
        except Conflict as error:
            raise Unavailable(error.message, retry_after_s=1) from error

    async def _read(self, model: ModelRef) -> tuple[Serving, int]:
        nothing = unserved(model)
        found = await self._etcd.get(nothing.key)
        return (Serving.model_validate_json(found.value), found.mod_revision) if found else (nothing, 0)

    async def _write(self, before: Serving, after: Serving, revision: int) -> Serving:
        if after != before:
            try:
                await self._etcd.put_if_unchanged(after.key, after.model_dump_json().encode(), revision)
            except Conflict as error:
                raise Raced(f"model {after.model!r} was changed by another call meanwhile") from error
            _log.info("serving changed", model=str(after.ref), generation=after.generation, stable=after.stable)
        return after
