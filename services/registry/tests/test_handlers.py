"""What the registry does with facts: the timeline tells each once and in order, and `production` follows rollouts."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from lepton_common.db import Database, Tx, migrate
from lepton_common.errors import NotFound
from lepton_common.events import Batching, ModelCreated, RolloutFinished, RolloutStarted, decode
from lepton_common.signature import Signature, TensorSpec
from lepton_common.types import ModelRef, VersionRef
from lepton_registry import store
from lepton_registry.domain import Artifact, Push, VersionState, next_version
from lepton_registry.handlers import on_fact, on_rollout_finished

NOW = datetime(2026, 1, 2, tzinfo=UTC)
DIGITS = ModelRef("default", "digits")
SIGNATURE = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 2)),))


@pytest.fixture
async def db(postgres_dsn: str) -> AsyncIterator[Database]:
    """A migrated database with two versions of `digits`."""
    db = Database(postgres_dsn, "registry")
    await migrate(db, "lepton_registry")
    async with db.transaction() as tx:
        await store.add_model(tx, DIGITS, NOW)
        for n in (1, 2):
            artifact = Artifact("default", f"{n}" * 64, 10, "onnx", SIGNATURE, NOW)
            await store.add_artifact(tx, artifact)
            model = await store.lock_model(tx, DIGITS)
            await store.add_version(tx, next_version(model, artifact, Push(Batching(), {}, {}, "ci", NOW)))
    yield db
    await db.close()


def finished(version: int, outcome: str = "promoted", reason: str = "all ready") -> RolloutFinished:
    return RolloutFinished(
        tenant="default", model="digits", rollout=uuid4(), version=version, outcome=outcome, reason=reason
    )


async def told(tx: Tx) -> list[tuple[str, dict[str, object]]]:
    """Type and value of every event that the transaction emitted."""
    rows = (await tx.execute("SELECT type, payload FROM outbox ORDER BY seq")).mappings()
    return [(row["type"], decode(row["type"], row["payload"]).model_dump(exclude={"id", "at"})) for row in rows]


async def test_promoted_version_becomes_production_and_is_told(db: Database) -> None:
    async with db.transaction() as tx:
        await on_rollout_finished(finished(1), tx)
        await on_rollout_finished(finished(2), tx)
        assert (await store.get_model(tx, DIGITS)).aliases == {"production": 2}
        assert (await store.get_version(tx, VersionRef(DIGITS, 2))).state is VersionState.PROMOTED
        assert await told(tx) == [
            ("VersionPromoted", {"tenant": "default", "model": "digits", "version": 1, "previous": None}),
            ("VersionPromoted", {"tenant": "default", "model": "digits", "version": 2, "previous": 1}),
        ]


async def test_failed_version_says_why_and_production_stays(db: Database) -> None:
    async with db.transaction() as tx:
        await on_rollout_finished(finished(1), tx)
        await on_rollout_finished(finished(2, "failed", "no worker could load it"), tx)
        assert (await store.get_model(tx, DIGITS)).aliases == {"production": 1}
        version = await store.get_version(tx, VersionRef(DIGITS, 2))
        assert (version.state, version.state_reason) == (VersionState.FAILED, "no worker could load it")
        assert len(await told(tx)) == 1


async def test_version_promoted_again_is_not_told_twice(db: Database) -> None:
    async with db.transaction() as tx:
        await on_rollout_finished(finished(1), tx)
        await on_rollout_finished(finished(1), tx)
        assert len(await told(tx)) == 1


async def test_version_in_production_keeps_its_state_when_a_later_rollout_of_it_comes_to_nothing(db: Database) -> None:
    async with db.transaction() as tx:
        await on_rollout_finished(finished(1), tx)
        await on_rollout_finished(finished(1, "aborted", "version 2 is newer"), tx)
        version = await store.get_version(tx, VersionRef(DIGITS, 1))
        assert (version.state, version.state_reason) == (VersionState.PROMOTED, "all ready")


@pytest.mark.parametrize("outcome", ["rolled_back", "aborted"])
async def test_version_that_was_in_production_once_says_how_its_last_rollout_ended(db: Database, outcome: str) -> None:
    async with db.transaction() as tx:
        await on_rollout_finished(finished(1), tx)
        await on_rollout_finished(finished(2), tx)
        await on_rollout_finished(finished(1, outcome, "more errors"), tx)
        assert (await store.get_model(tx, DIGITS)).aliases == {"production": 2}
        version = await store.get_version(tx, VersionRef(DIGITS, 1))
        assert (version.state, version.state_reason) == (VersionState(outcome), "more errors")


async def test_fact_is_told_whatever_its_text_and_numbers_are(db: Database) -> None:
    evidence = {"a\0b": ["x\0y", float("nan"), {"z": float("inf")}]}
    event = finished(1, "failed", "op \0 unknown").model_copy(update={"evidence": evidence})
    async with db.transaction() as tx:
        await on_rollout_finished(event, tx)
        (told,) = await store.list_entries(tx, DIGITS, after=0, limit=10)
        assert told.reason == "op \ufffd unknown"
        assert told.evidence["evidence"] == {"a\ufffdb": ["x\ufffdy", None, {"z": None}]}
        version = await store.get_version(tx, VersionRef(DIGITS, 1))
        assert version.state_reason == told.reason


async def test_rollout_of_an_unknown_version_is_an_error(db: Database) -> None:
    async with db.transaction() as tx:
        with pytest.raises(NotFound):
            await on_rollout_finished(finished(9), tx)


async def test_timeline_is_in_order_of_time_whatever_the_order_of_arrival(db: Database) -> None:
    created = ModelCreated(tenant="default", model="digits", at=NOW)
    started = RolloutStarted(
        tenant="default",
        model="digits",
        at=NOW + timedelta(seconds=1),
        rollout=uuid4(),
        version=1,
        strategy="immediate",
        actor="ci",
    )
    async with db.transaction() as tx:
        for event in (finished(1), started, created, started):
            await on_fact(event, tx)
        entries = await store.list_entries(tx, DIGITS, after=0, limit=10)
        assert [each.type for each in entries] == ["ModelCreated", "RolloutStarted", "RolloutFinished"]
        assert (entries[1].actor, entries[1].evidence["strategy"]) == ("ci", "immediate")
        following = await store.list_entries(tx, DIGITS, after=entries[0].seq, limit=1)
        assert following == [entries[1]]
