"""What persons may do to a rollout under way, and to the mesh itself. Each is on record with who did it, and why."""

from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

import stamina
import structlog
from lepton_common.db import Database
from lepton_common.errors import Conflict, Invalid, NotFound
from lepton_common.events import MeshReturned, MeshTaken, RolloutSteered
from lepton_common.records import Hand, LoadState, Serving
from lepton_common.types import ModelRef

from lepton_rollout import istio, store
from lepton_rollout.domain import Rollout, State, again, finished
from lepton_rollout.mesh import Mesh
from lepton_rollout.orders import aborted, advanced, approved, paused, resumed
from lepton_rollout.record import released, settled, taken, unserved
from lepton_rollout.serving import Change, Raced, ServingTable
from lepton_rollout.starting import Starter
from lepton_rollout.story import events
from lepton_rollout.workers import Workers

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Steering:
    """The commands. The runner makes the world follow."""

    def __init__(
        self, db: Database, table: ServingTable, workers: Workers, starter: Starter, now: Callable[[], datetime]
    ) -> None:
        self._db = db
        self._table = table
        self._workers = workers
        self._starter = starter
        self._now = now

    async def pause(self, tenant: str, rollout: UUID, actor: str, reason: str) -> Rollout:
        """It grows no further. Raises NotFound, and Conflict when it is over, as all of these."""
        return await self._steer(tenant, rollout, "pause", actor, reason, lambda before: paused(before, reason))

    async def resume(self, tenant: str, rollout: UUID, actor: str, reason: str) -> Rollout:
        """It goes on, after a pause or after it was held."""
        return await self._steer(tenant, rollout, "resume", actor, reason, resumed)

    async def promote(self, tenant: str, rollout: UUID, actor: str, reason: str, *, full: bool) -> Rollout:
        """It enters its next stage, or with `full` its last one, whatever stands in the way, but for a person who moves
        the traffic by hand: Conflict."""
        async with self._db.transaction() as tx:
            model = (await store.get_rollout(tx, tenant, rollout)).model
        await self._starter.check_hands([model])
        why = f"promoted by {actor}: {reason}"
        return await self._steer(
            tenant, rollout, "promote", actor, reason, lambda before: advanced(before, why, full=full)
        )

    async def approve(self, tenant: str, rollout: UUID, actor: str, reason: str) -> Rollout:
        """Its next stage has the approval that it needs."""
        return await self._steer(tenant, rollout, "approve", actor, reason, approved)

    async def abort(self, tenant: str, rollout: UUID, actor: str, reason: str) -> Rollout:
        """Its traffic goes back."""
        why = f"aborted by {actor}: {reason}"

        def change(before: Rollout) -> Rollout:
            after = aborted(before, why)
            # One that never began has nothing to take back.
            return finished(after, unserved(before.model), self._now()) if before.state is State.QUEUED else after

        return await self._steer(tenant, rollout, "abort", actor, reason, change)

    async def retry(self, tenant: str, rollout: UUID, actor: str) -> Rollout:
        """A new rollout of the same version by the same policy. Raises Conflict before the end, and as `start`."""
        async with self._db.transaction() as tx:
            before = await store.get_rollout(tx, tenant, rollout)
        if before.finished_at is None:
            raise Conflict(f"rollout {rollout} is still {before.state}")
        return await self._starter.start(before.model, before.version, actor, before.policy, force=True)

    async def _steer(
        self,
        tenant: str,
        rollout: UUID,
        command: str,
        actor: str,
        reason: str,
        change: Callable[[Rollout], Rollout],
    ) -> Rollout:
        now = self._now()
        async with self._db.transaction() as tx:
            before = await store.lock_rollout(tx, tenant, rollout)
            after = change(before)
            await store.save_rollout(tx, before, after)
            await store.add_decision(tx, after, now, command, reason, actor, before.walk.verdict)
            await tx.emit(
                RolloutSteered(
                    tenant=tenant,
                    model=before.model.model,
                    rollout=rollout,
                    version=before.version,
                    command=command,
                    actor=actor,
                    reason=reason,
                    at=now,
                )
            )
            for event in events(before, after, now):
                await tx.emit(event)
            saved = await store.get_rollout(tx, tenant, rollout)
        self._workers.changed.send()
        return saved

    # --- the mesh by hand -----------------------------------------------------------------------------------------

    async def take(self, model: ModelRef, actor: str, document: dict[str, Any], reason: str) -> Serving:
        """The person's VirtualService moves the model's traffic, as long as nobody releases it.

        Raises NotFound, and Invalid naming the field, with nothing changed.
        """
        hand = self._hand(await self._served(model), actor, document)
        await self._tell(model, hand, reason)
        after = await self._shift(model, lambda before: _taken(before, hand))
        self._workers.changed.send()
        return after

    def _hand(self, serving: Serving, actor: str, document: dict[str, Any]) -> Hand:
        spec = istio.checked(document, serving, self._ready_versions(serving))
        return Hand(by=actor, at=self._now(), spec=spec, versions=tuple(sorted(istio.versions(spec))))

    async def _tell(self, model: ModelRef, hand: Hand, reason: str) -> None:
        """It is on record before the mesh is touched: whoever wonders about the traffic finds who moved it."""
        async with self._db.transaction() as tx:
            await tx.emit(
                MeshTaken(tenant=model.tenant, model=model.model, actor=hand.by, reason=reason, spec=hand.spec)
            )
            if (rollout := await store.find_open_rollout(tx, model)) is not None:
                why = reason or "the traffic is moved by hand"
                await store.add_decision(tx, rollout, self._now(), "taken", why, hand.by)

    async def release(self, model: ModelRef, actor: str) -> Serving:
        """The model's traffic is rollout's again: as its open rollout's stage has it, else on the stable version.

        Raises NotFound, and Conflict when nobody had taken it.
        """
        if (await self._served(model)).hand is None:
            raise Conflict(f"the traffic of model {model.model!r} is not moved by hand")
        async with self._db.transaction() as tx:
            rollout = await store.find_open_rollout(tx, model)
            await tx.emit(MeshReturned(tenant=model.tenant, model=model.model, actor=actor))
            walks = rollout is not None and rollout.state is State.SHIFTING
            if rollout is not None and walks:
                await store.add_decision(tx, rollout, self._now(), "returned", "the hand is off the wheel", actor)
                await store.save_rollout(tx, rollout, again(rollout))
        # A rollout enters its stage by itself; until then the shares are what the hand had.
        after = await self._shift(model, released if walks else settled)
        self._workers.changed.send()
        return after

    @stamina.retry(on=Raced, attempts=5, wait_initial=0.01, wait_max=0.1)
    async def _shift(self, model: ModelRef, change: Change) -> Serving:
        return await self._table.shift(model, change)

    async def follow(self, mesh: Mesh) -> None:
        """For ever: what somebody changes in the mesh itself counts as taking over by hand, or is undone when it cannot
        be carried out. Ends with Unavailable when the mesh is away."""
        async for edit in mesh.edits():
            serving = await self._table.get(edit.model)
            try:
                hand = self._hand(serving, edit.by, edit.document)
            except Invalid as error:
                _log.warning("a change in the mesh is undone", model=str(edit.model), by=edit.by, reason=error.message)
            else:
                # An edit is told again as long as it is not noted, so after a crash it may be on record already.
                if serving.hand is None or serving.hand.spec != hand.spec:
                    await self._tell(edit.model, hand, "changed in the mesh")
                    await self._table.record(edit.model, partial(_taken, hand=hand))
            await mesh.note(edit)
            await self._table.settle(edit.model, lambda before: before)
            self._workers.changed.send()

    async def _served(self, model: ModelRef) -> Serving:
        serving = await self._table.get(model)
        if serving.generation == 0:
            raise NotFound(f"model {model.model!r} is not served")
        return serving

    def _ready_versions(self, serving: Serving) -> set[int]:
        """The versions that some worker has ready."""
        return {
            each.version
            for worker in self._workers.states()
            for each in worker.versions
            if (each.tenant, each.model) == (serving.tenant, serving.model) and each.state is LoadState.READY
        }


def _taken(serving: Serving, hand: Hand) -> Serving:
    return taken(serving, hand, istio.shares(hand.spec), istio.header_names(hand.spec))
