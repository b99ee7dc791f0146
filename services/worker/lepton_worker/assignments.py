"""Makes what this worker holds match what etcd assigns to its pool: loads, keeps, drains and unloads versions."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Protocol

import structlog
from lepton_common.errors import Invalid, LeptonError, NotFound
from lepton_common.records import Assigned, Loaded, LoadState, Serving
from lepton_common.types import ModelRef, VersionRef

from lepton_worker.cache import Cache
from lepton_worker.domain import ModelFailed, NotLoaded, Verdict, wanted
from lepton_worker.engine import Engine, trim_memory
from lepton_worker.lane import Lane
from lepton_worker.usage import Usage
from lepton_worker.warmup import warm_up

_LOADS_AT_ONCE = 2
_RETRIES_S = (0.2, 1.0, 5.0)
_REASON_CHARACTERS = 300  # all versions of a worker share one value of etcd

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Examiner(Protocol):
    async def verdict(self, path: Path) -> Verdict:
        """What is known of the artifact in `path`. Raises Invalid when it cannot be loaded."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What this worker gives to one version, and how it lets go of one."""

    instances: int
    intra_op_threads: int = 1
    unload_grace_s: float = 30.0
    linger_s: float = 2.0
    """a withdrawn version still serves for so long: the mesh sent its last requests before it heard"""


class Resident:
    """A version on this worker, from its assignment until it is gone."""

    def __init__(self, ref: VersionRef, assigned: Assigned) -> None:
        self.ref = ref
        self.assigned = assigned
        self.state = LoadState.LOADING
        self.reason = ""
        self.lane: Lane | None = None
        self.task: asyncio.Task[None] | None = None

    def view(self) -> Loaded:
        return Loaded(
            tenant=self.ref.model.tenant,
            model=self.ref.model.model,
            version=self.ref.version,
            sha256=self.assigned.sha256,
            state=self.state,
            reason=self.reason,
        )


class Assignments:
    """The versions of one pool on this worker. `records` are the serving records by `tenant/model`, kept current."""

    def __init__(
        self, records: Mapping[str, Serving], pool: str, cache: Cache, examiner: Examiner, resources: Resources
    ) -> None:
        self.on_change: Callable[[], None] = lambda: None  # called after every change of a version's state
        self._records = records
        self._pool = pool
        self._cache = cache
        self._examiner = examiner
        self._resources = resources
        self._usage = Usage()
        self._residents: dict[VersionRef, Resident] = {}
        self._lanes: dict[VersionRef, Lane] = {}
        self._due = asyncio.Event()
        self._loads = asyncio.Semaphore(_LOADS_AT_ONCE)
        self._began = False
        self._settled = False  # the versions of the first list were all tried

    def reconsider(self) -> None:
        """The records changed."""
        self._due.set()

    def views(self) -> tuple[Loaded, ...]:
        """Every version here and its state."""
        return tuple(self._residents[ref].view() for ref in sorted(self._residents))

    def lanes(self) -> tuple[Lane, ...]:
        """Every version that takes requests."""
        return tuple(self._lanes[ref] for ref in sorted(self._lanes))

    def not_ready(self) -> str | None:
        """Why this worker does not take traffic yet: versions of its first list that were not tried so far."""
        if not self._began:
            return "waiting for the first assignments"
        if self._settled:
            return None
        residents = self._residents.values()
        untried = [str(each.ref) for each in residents if each.state is LoadState.LOADING and not each.reason]
        self._settled = not untried
        return f"loading {', '.join(untried)}" if untried else None

    def lane(self, model: ModelRef, version: int | None) -> Lane:
        """What serves that version, or the stable one. Raises NotFound, or NotLoaded when it is not ready here."""
        if version is None:
            version = self._stable(model)
        ref = VersionRef(model, version)
        lane = self._lanes.get(ref)
        if lane is None:
            raise self._missing(ref)
        return lane

    def versions(self, model: ModelRef) -> list[str]:
        """Every version of the model that some pool serves, as OIP writes versions."""
        record = self._records.get(str(model))
        return [str(each) for each in sorted({each.version for each in record.versions})] if record else []

    async def run(self) -> None:
        """For ever: whatever the records say is made so. Loads and unloads go on side by side."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._due.clear()
                self._reconcile(group)
                self._began = True
                self.on_change()
                await self._due.wait()

    def _stable(self, model: ModelRef) -> int:
        record = self._records.get(str(model))
        if record is None or record.stable is None:
            raise NotFound(f"model {model.model[:80]!r} is not served")
        return record.stable

    def _missing(self, ref: VersionRef) -> LeptonError:
        name = f"model {ref.model.model[:80]!r} version {ref.version}"
        resident = self._residents.get(ref)
        if resident is not None:
            return NotLoaded(f"{name} is {resident.state}: {resident.reason or 'try again'}", retry_after_s=1)
        record = self._records.get(str(ref.model))
        if record is None or record.assigned(ref.version) is None:
            return NotFound(f"{name} is not served")
        return NotLoaded(f"{name} is not on this worker", retry_after_s=1)

    def _reconcile(self, group: asyncio.TaskGroup) -> None:
        want = wanted(self._records.values(), self._pool)
        for ref, resident in tuple(self._residents.items()):
            if ref not in want or want[ref].sha256 != resident.assigned.sha256:
                self._withdraw(resident, group)
        for ref, assigned in want.items():
            kept = self._residents.get(ref)
            if kept is None:
                kept = self._residents[ref] = Resident(ref, assigned)
                kept.task = group.create_task(self._load(kept))
            elif kept.assigned.sha256 != assigned.sha256:
                continue  # The old bytes leave first, then this is called again.
            elif kept.state is LoadState.UNLOADING and ref in self._lanes and kept.task is not None:
                kept.task.cancel()  # It lingered, and is wanted again.
                kept.state = LoadState.READY
            if kept.lane is not None:
                kept.lane.limit(assigned.batching, self._records[str(ref.model)].limits)

    def _withdraw(self, resident: Resident, group: asyncio.TaskGroup) -> None:
        match resident.state:
            case LoadState.READY:
                resident.state = LoadState.UNLOADING
                resident.task = group.create_task(self._unload(resident))
            case LoadState.LOADING | LoadState.FAILED:
                if resident.task is not None:
                    resident.task.cancel()
                del self._residents[resident.ref]

    async def _load(self, resident: Resident) -> None:
        for pause_s in chain(_RETRIES_S, repeat(_RETRIES_S[-1])):
            try:
                async with self._loads:
                    resident.lane = await self._open(resident)
            except (Invalid, ModelFailed) as error:
                self._enter(resident, LoadState.FAILED, error.message)
                return
            # The store is away, damaged or behind, or the disk is full: nothing is wrong with the model.
            except LeptonError as error:
                self._enter(resident, LoadState.LOADING, error.message)
            except OSError as error:
                self._enter(resident, LoadState.LOADING, error.strerror or type(error).__name__)
            except Exception:
                _log.exception("loading failed", version=str(resident.ref))
                self._enter(resident, LoadState.FAILED, "internal error")
                return
            else:
                self._lanes[resident.ref] = resident.lane
                self._enter(resident, LoadState.READY, "")
                self._due.set()  # It gets the records' limits there.
                return
            await asyncio.sleep(pause_s)

    async def _open(self, resident: Resident) -> Lane:
        assigned, resources = resident.assigned, self._resources
        async with self._cache.held(assigned.sha256, assigned.size_bytes) as path:
            verdict = await self._examiner.verdict(path)

            def load() -> Engine:
                engine = Engine(path, resources.intra_op_threads)
                warm_up(engine, verdict, assigned.batching.max_rows)
                return engine

            engine = await asyncio.to_thread(load)
        account = self._usage.of(resident.ref.model.tenant)
        return Lane(resident.ref, engine, verdict, assigned.batching, resources.instances, account)

    async def _unload(self, resident: Resident) -> None:
        await asyncio.sleep(self._resources.linger_s)
        lane = self._lanes.pop(resident.ref)
        await lane.batcher.close(self._resources.unload_grace_s)
        del self._residents[resident.ref], lane
        resident.lane = None
        await asyncio.to_thread(trim_memory)
        _log.info("unloaded", version=str(resident.ref))
        self._due.set()  # It may have been assigned again meanwhile.

    def _enter(self, resident: Resident, state: LoadState, reason: str) -> None:
        resident.state = state
        resident.reason = reason[:_REASON_CHARACTERS]
        _log.info("version changed", version=str(resident.ref), state=state, reason=resident.reason)
        self.on_change()
