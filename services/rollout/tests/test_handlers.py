"""How a version that was registered comes to live traffic, by what its event asks for."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
from lepton.policies import PRESETS, Strategy
from lepton_common.db import Database, migrate
from lepton_common.events import RolloutFinished, VersionRegistered, decode
from lepton_common.types import ModelRef
from lepton_rollout import store, store_facts
from lepton_rollout.domain import Rollout
from lepton_rollout.handlers import on_version_registered

from .stand_ins import assigned

NOW = datetime(2026, 11, 27, 12, tzinfo=UTC)


@pytest.fixture
async def db(postgres_dsn: str) -> AsyncIterator[Database]:
    db = Database(postgres_dsn, "rollout")
    await migrate(db, "lepton_rollout")
    yield db
    await db.close()


async def register(db: Database, model: ModelRef, version: int, **asked: Any) -> None:
    event = VersionRegistered(
        tenant=model.tenant, model=model.model, version=version, sha256=assigned(version).sha256, size_bytes=1, **asked
    )
    async with db.transaction() as tx:
        await on_version_registered(event, tx, load_timeout_s=60, now=lambda: NOW)


async def rollouts(db: Database, model: ModelRef) -> dict[int, Rollout]:
    async with db.transaction() as tx:
        return {each.version: each for each in await store.list_rollouts(tx, model.tenant, model.model, 10)}


async def test_a_first_version_goes_live_at_once_and_a_later_one_only_when_asked(db: Database, model: ModelRef) -> None:
    await register(db, model, 1)
    await register(db, model, 2)
    await register(db, model, 3, deploy=False, rollout=True)
    assert {version: each.policy.strategy for version, each in (await rollouts(db, model)).items()} == {
        1: Strategy.IMMEDIATE
    }


async def test_a_version_goes_live_by_its_own_policy_else_the_models_else_at_once(
    db: Database, model: ModelRef
) -> None:
    careful = PRESETS["careful"].model_copy(update={"pool": "canary"})
    await register(db, model, 2, rollout=True, policy=careful.model_dump(mode="json"))
    found = (await rollouts(db, model))[2]
    assert (found.policy, found.assigned.pool) == (careful, "canary")

    others = ModelRef(model.tenant, "others")
    async with db.transaction() as tx:
        await store_facts.save_policy(tx, others, PRESETS["fast"], "ann", NOW)
    await register(db, others, 2, rollout=True)
    assert (await rollouts(db, others))[2].policy == PRESETS["fast"]

    third = ModelRef(model.tenant, "third")
    await register(db, third, 2, rollout=True)
    assert (await rollouts(db, third))[2].policy == PRESETS["immediate"]


async def test_a_version_that_must_not_disturb_another_is_known_and_its_rollout_is_told_as_over(
    db: Database, model: ModelRef
) -> None:
    await register(db, model, 1)
    await register(db, model, 2, rollout=True)
    async with db.transaction() as tx:
        assert (await store_facts.get_version(tx, model, 2)).version == 2
        kind, payload = (await tx.execute("SELECT type, payload FROM outbox ORDER BY seq DESC LIMIT 1")).one()
    told = decode(kind, payload)
    assert isinstance(told, RolloutFinished)
    assert (told.version, told.outcome) == (2, "aborted")
    assert told.reason.startswith("not started: model 'digits' is on its way to version 1")
