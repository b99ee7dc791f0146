"""Carries out pushes that came by Kafka, some at a time. A crash leaves the row: after its lease somebody goes on."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta

import structlog
from lepton_common.db import Database
from lepton_common.errors import Conflict, LeptonError, Unavailable
from lepton_common.events import Batching, IngestFailed, IngestFinished
from lepton_common.telemetry import Telemetry, extract_kafka

from lepton_registry import store, store_ingests
from lepton_registry.domain import Push
from lepton_registry.pushes import Intake, register
from lepton_registry.sources import Sources
from lepton_registry.store_ingests import Waiting
from lepton_registry.uploads import Staging

# A tenant whose hosts are slow leaves room for others.
AT_ONCE, AT_ONCE_OF_A_TENANT = 4, 2
# How long a push waits when its runner is killed; with two of them, all others of the tenant wait as well.
LEASE_S = 10.0
TRIES = 6
_LONGEST_S = 1800.0
_POLL_S = 5.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Ingests:
    """The pushes that wait in the table, carried out by this replica and others beside it.

    `pause_s` is the pause before a second try; each later one is four times as long.
    """

    db: Database
    staging: Staging
    sources: Sources
    intake: Intake
    telemetry: Telemetry
    pause_s: float = 2.0
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Carries out what is due, for ever."""
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(self._work())

    async def _work(self) -> None:
        while True:
            self.wake.clear()
            # What it had at hand when PostgreSQL went away is due again when its lease is over.
            with suppress(Unavailable):
                if await self._next():
                    continue
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await self.wake.wait()

    async def _next(self) -> bool:
        """Whether there was one to carry out."""
        async with self.db.transaction() as tx:
            ingest = await store_ingests.claim_ingest(tx, LEASE_S, AT_ONCE_OF_A_TENANT)
        if ingest is None:
            return False
        context = extract_kafka([("traceparent", (ingest.traceparent or "").encode())])
        with (
            structlog.contextvars.bound_contextvars(ingest=str(ingest.id), request=ingest.request),
            self.telemetry.tracer.start_as_current_span("ingest", context),
        ):
            try:
                await self._try(ingest)
            except Conflict as error:
                _log.warning("ingest left to another", reason=error.message)
        return True

    async def _try(self, ingest: Waiting) -> None:
        try:
            async with asyncio.timeout(_LONGEST_S), self._leased(ingest):
                await self._carry_out(ingest)
        except TimeoutError:
            await self._give_up(ingest, f"it took longer than {_LONGEST_S:g} s")
        except Conflict:
            raise
        except LeptonError as error:
            await self._failed(ingest, error.message, is_passing=error.retryable)
        except Exception:  # Whatever it is, the next try may be luckier, and the last one is told.
            _log.exception("ingest failed", attempt=ingest.attempts)
            reason = f"an error inside the registry; its log tells of ingest {ingest.id}"
            await self._failed(ingest, reason, is_passing=True)

    async def _carry_out(self, ingest: Waiting) -> None:
        asked = ingest.asked
        sha256 = await self._bytes(ingest)
        push = Push(
            batching=Batching(**asked.batching.model_dump()),
            metrics=asked.metrics,
            labels=asked.labels,
            actor=ingest.actor,
            at=ingest.at,
            deploy=asked.deploy,
            rollout=asked.deploy,
            policy=asked.policy.model_dump(mode="json") if asked.policy else None,
        )
        async with self.db.transaction() as tx:
            version, is_new = await register(tx, ingest.ref, sha256, push)
            await tx.emit(
                IngestFinished(
                    tenant=ingest.tenant,
                    model=asked.model,
                    request=ingest.request,
                    source=ingest.source,
                    version=version.version,
                    sha256=sha256,
                    is_new=is_new,
                )
            )
            await store_ingests.remove_ingest(tx, ingest)

    async def _bytes(self, ingest: Waiting) -> str:
        """The digest of an artifact that the tenant has: uploaded before, or fetched now."""
        sha256, uri = ingest.asked.sha256, ingest.asked.uri
        async with self.db.transaction() as tx:
            if sha256 and uri is None:
                return (await store.get_artifact(tx, ingest.tenant, sha256)).sha256
            if sha256 and await store.find_artifact(tx, ingest.tenant, sha256):
                return sha256
        assert uri is not None
        async with self.staging.hold(ingest.tenant, f"ingest-{ingest.id}") as upload:
            async with self.sources.open(uri) as (chunks, length):
                await upload.receive(chunks, length)
            artifact, _ = await self.intake.keep(upload, ingest.tenant, sha256)
        return artifact.sha256

    async def _failed(self, ingest: Waiting, reason: str, *, is_passing: bool) -> None:
        if not is_passing:
            await self._give_up(ingest, reason)
        elif ingest.attempts >= TRIES:
            await self._give_up(ingest, f"given up after {TRIES} tries: {reason}")
        else:
            _log.warning("ingest is tried again", attempt=ingest.attempts, reason=reason)
            async with self.db.transaction() as tx:
                pause_s = self.pause_s * 4 ** (ingest.attempts - 1)
                await store_ingests.put_back(tx, ingest, timedelta(seconds=pause_s))

    async def _give_up(self, ingest: Waiting, reason: str) -> None:
        failed = IngestFailed(
            tenant=ingest.tenant,
            model=ingest.asked.model,
            request=ingest.request,
            source=ingest.source,
            reason=reason,
        )
        async with self.db.transaction() as tx:
            await tx.emit(failed)
            await store_ingests.remove_ingest(tx, ingest)

    @asynccontextmanager
    async def _leased(self, ingest: Waiting) -> AsyncIterator[None]:
        """The lease lasts as long as the block. One that was lost is noticed at the end, when nothing is written."""
        beat = asyncio.create_task(self._beat(ingest))
        try:
            yield
        finally:
            beat.cancel()
            await asyncio.wait({beat})

    async def _beat(self, ingest: Waiting) -> None:
        is_held = True
        while is_held:
            await asyncio.sleep(LEASE_S / 3)
            with suppress(Unavailable):
                async with self.db.transaction() as tx:
                    is_held = await store_ingests.renew_lease(tx, ingest, LEASE_S)
