"""The serving records in etcd and the mesh's routes, kept together: etcd is the truth, the mesh follows."""

from collections.abc import Callable

import structlog
from lepton_common.errors import Conflict, Unavailable
from lepton_common.etcd import EtcdClient
from lepton_common.records import SERVING, Serving
from lepton_common.types import ModelRef

from lepton_rollout.domain import unserved
from lepton_rollout.mesh import Mesh, virtual_service

Change = Callable[[Serving], Serving]

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Raced(Unavailable):
    """The record was changed by someone else between reading and writing. Nothing of this change was written."""


class ServingTable:
    """Every model's record. Only rollout writes here, each write only over the record it was computed from."""

    def __init__(self, etcd: EtcdClient, mesh: Mesh) -> None:
        self._etcd = etcd
        self._mesh = mesh

    async def get(self, model: ModelRef) -> Serving:
        """The model's record as it is now; one of generation 0 when nothing of it was ever served."""
        serving, _ = await self._read(model)
        return serving

    async def list(self, tenant: str = "") -> list[Serving]:
        """Every record of the tenant, or of all, by name."""
        found, _ = await self._etcd.list(f"{SERVING}{tenant}/" if tenant else SERVING)
        return [Serving.model_validate_json(each.value) for each in found]

    async def record(self, model: ModelRef, change: Change) -> Serving:
        """The record is changed: workers load and unload by it. No traffic moves. Raises Raced."""
        before, revision = await self._read(model)
        return await self._write(before, change(before), revision)

    async def shift(self, model: ModelRef, change: Change) -> Serving:
        """The mesh has acknowledged the changed record's routes, and the record is changed.

        The mesh goes first, so that it never leads to a version that workers may already let go, and the record only
        says what is true. Raises as Mesh.apply, and Raced; the same call again goes on from there.
        """
        before, revision = await self._read(model)
        after = change(before)
        await self._mesh.apply(virtual_service(after))
        return await self._write(before, after, revision)

    async def reapply(self) -> None:
        """The mesh's routes are what the records say. Raises as Mesh.apply."""
        await self._mesh.apply(*(virtual_service(serving) for serving in await self.list()))

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
