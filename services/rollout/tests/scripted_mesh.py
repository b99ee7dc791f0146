"""A mesh that a test can make refuse, or be away, or do something in between; it keeps the newest generation."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

from lepton_common.records import Serving, WorkerState
from lepton_common.types import ModelRef
from lepton_rollout.istio import documents
from lepton_rollout.mesh import Edit, Stale, VirtualService, virtual_service


class ScriptedMesh:
    def __init__(self) -> None:
        self.applied: list[VirtualService] = []
        self.live_services: dict[str, VirtualService] = {}
        self.error: BaseException | None = None
        self.meanwhile: Callable[[], Awaitable[object]] | None = None

    async def apply(self, *services: VirtualService) -> None:
        if self.error:
            raise self.error
        newer = {
            each.name: known.generation
            for each in services
            if (known := self.live_services.get(each.name)) and known.generation > each.generation
        }
        for each in services:
            if each.name not in newer:
                self.live_services[each.name] = each
                self.applied.append(each)
        if newer:
            raise Stale(newer)
        if self.meanwhile:
            await self.meanwhile()

    async def place(self, workers: Iterable[WorkerState]) -> None: ...

    async def live(self, serving: Serving) -> tuple[dict[str, Any], dict[str, Any]]:
        return documents(virtual_service(serving))

    async def edits(self) -> AsyncIterator[Edit]:
        await asyncio.Event().wait()
        yield Edit(ModelRef("default", "digits"), "nobody", {}, "")

    async def note(self, edit: Edit) -> None: ...

    async def close(self) -> None: ...
