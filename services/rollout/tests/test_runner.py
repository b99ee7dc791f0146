import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from lepton_common.db import Database, migrate
from lepton_common.errors import Conflict, Invalid, Unavailable
from lepton_common.etcd import EtcdClient
from lepton_common.records import SERVING, Loaded, LoadState, Serving, WorkerState
from lepton_common.types import ModelRef
from lepton_rollout import store, store_facts
from lepton_rollout.domain import Rollout, State, failing, shifting, stepped
from lepton_rollout.mesh import virtual_service
from lepton_rollout.orders import aborted
from lepton_rollout.record import warmed
from lepton_rollout.runner import Runner
from lepton_rollout.serving import Raced, ServingTable
from lepton_rollout.starting import new_rollout, start_rollout
from lepton_rollout.walker import LEASE_S, Walker
from lepton_rollout.workers import Workers
from prometheus_client import CollectorRegistry

from .scripted_mesh import ScriptedMesh
from .stand_ins import assigned

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


class KnownWorkers(Workers):
    """Workers that a test names itself."""

    known: tuple[WorkerState, ...] = ()

    def states(self) -> tuple[WorkerState, ...]:
        return self.known


@pytest.fixture
async def db(postgres_dsn: str) -> AsyncIterator[Database]:
    db = Database(postgres_dsn, "rollout")
    await migrate(db, "lepton_rollout")
    yield db
    await db.close()


@pytest.fixture
def workers(etcd: EtcdClient) -> KnownWorkers:
    workers = KnownWorkers(etcd)
    workers.known = (_ready(1, 2),)
    return workers


def runner(db: Database, table: ServingTable, workers: Workers, now: datetime = NOW) -> Runner:
    holder = uuid4()
    return Runner(
        db, Walker(db, table, workers, holder, lambda: now), workers, holder, lambda: now, CollectorRegistry()
    )


async def started(db: Database, model: ModelRef, version: int) -> UUID:
    """The id of an open rollout of the version."""
    async with db.transaction() as tx:
        await store_facts.add_version(tx, model, assigned(version))
        new = new_rollout(uuid4(), model, assigned(version), "ann", NOW, load_timeout_s=60)
        return (await start_rollout(tx, new)).id


async def found(db: Database, model: ModelRef, rollout: UUID) -> Rollout:
    async with db.transaction() as tx:
        return await store.get_rollout(tx, model.tenant, rollout)


async def test_a_refusal_by_the_mesh_fails_the_rollout_and_leaves_the_record_as_it_was(
    db: Database, table: ServingTable, workers: KnownWorkers, scripted_mesh: ScriptedMesh, model: ModelRef
) -> None:
    await started(db, model, 1)
    await runner(db, table, workers).look()
    before = await table.get(model)
    rollout = await started(db, model, 2)
    scripted_mesh.error = Invalid("the mesh refused rds.json")
    await runner(db, table, workers).look()
    assert (await found(db, model, rollout)).state is State.FAILING

    scripted_mesh.error = None
    async with db.transaction() as tx:
        await tx.execute("UPDATE rollouts SET held_until = now() - interval '1 second'")
    await runner(db, table, workers).look()

    after = await found(db, model, rollout)
    assert (after.state, after.reason) == (State.FAILED, "the mesh refused rds.json")
    served = await table.get(model)
    assert (served.stable, served.split, served.versions) == (before.stable, before.split, before.versions)


async def test_workers_have_their_time_from_when_they_are_told(
    db: Database, table: ServingTable, workers: KnownWorkers, model: ModelRef
) -> None:
    rollout, ready = await started(db, model, 1), workers.known
    workers.known = ()
    # etcd was away for longer than the rollout's time.
    back_at = NOW + timedelta(hours=1)
    await runner(db, table, workers, back_at).look()
    assert (await found(db, model, rollout)).state is State.LOADING
    workers.known = ready
    await runner(db, table, workers, back_at + timedelta(seconds=59)).look()
    assert (await found(db, model, rollout)).state is State.PROMOTED


async def test_a_mesh_that_is_away_is_waited_for_and_the_record_does_not_run_ahead_of_it(
    db: Database, table: ServingTable, workers: KnownWorkers, scripted_mesh: ScriptedMesh, model: ModelRef
) -> None:
    rollout = await started(db, model, 1)
    scripted_mesh.error = Unavailable("the mesh did not acknowledge")
    look_again = runner(db, table, workers)
    await look_again.look()
    assert (await found(db, model, rollout)).state is State.SHIFTING
    assert (await table.get(model)).split == ()

    scripted_mesh.error = None
    await look_again.look()
    assert (await found(db, model, rollout)).state is State.PROMOTED


async def test_a_mesh_that_takes_its_time_with_one_model_keeps_no_other_from_loading(
    db: Database, table: ServingTable, workers: KnownWorkers, scripted_mesh: ScriptedMesh, model: ModelRef
) -> None:
    slow, quick = await started(db, model, 1), ModelRef("default", "quick")
    acknowledged = asyncio.Event()
    scripted_mesh.meanwhile = acknowledged.wait
    impatient = runner(db, table, workers)
    async with asyncio.timeout(30):
        while not scripted_mesh.applied:
            await impatient.look(0.05)
        await started(db, quick, 1)
        while not (await table.get(quick)).versions:
            await impatient.look(0.05)
        assert (await found(db, model, slow)).state is State.SHIFTING

        acknowledged.set()
        while (await found(db, model, slow)).state is State.SHIFTING:
            await impatient.look(0.05)
    assert (await found(db, model, slow)).state is State.PROMOTED


async def test_a_record_changed_in_the_middle_of_a_shift_is_never_written_over(
    db: Database, table: ServingTable, workers: KnownWorkers, scripted_mesh: ScriptedMesh, model: ModelRef
) -> None:
    rollout = await started(db, model, 1)

    async def warm_another() -> None:
        scripted_mesh.meanwhile = None
        await table.record(model, lambda serving: warmed(serving, assigned(2)))

    scripted_mesh.meanwhile = warm_another
    look_again = runner(db, table, workers)
    await look_again.look()
    assert (await found(db, model, rollout)).state is State.SHIFTING
    await look_again.look()

    assert (await found(db, model, rollout)).state is State.PROMOTED
    served = await table.get(model)
    assert {each.version for each in served.versions} == {1, 2}
    assert scripted_mesh.applied[-1] == virtual_service(served)


async def test_a_shift_that_died_between_mesh_and_record_goes_on_to_its_end(
    db: Database, table: ServingTable, workers: KnownWorkers, scripted_mesh: ScriptedMesh, model: ModelRef
) -> None:
    rollout = await started(db, model, 1)

    async def die() -> None:
        scripted_mesh.meanwhile = None
        raise Unavailable("the process is gone")

    scripted_mesh.meanwhile = die
    look_again = runner(db, table, workers)
    await look_again.look()
    assert (await table.get(model)).stable is None
    await look_again.look()

    assert (await found(db, model, rollout)).state is State.PROMOTED
    assert scripted_mesh.applied[0] == scripted_mesh.applied[1]


async def test_a_rollout_is_one_runners_until_its_claim_runs_out(db: Database, model: ModelRef) -> None:
    rollout = await started(db, model, 1)
    first, second = uuid4(), uuid4()
    async with db.transaction() as tx:
        assert await store.claim_rollout(tx, rollout, first, LEASE_S)
        assert await store.claim_rollout(tx, rollout, first, LEASE_S)
        assert await store.claim_rollout(tx, rollout, second, LEASE_S) is None
        await tx.execute("UPDATE rollouts SET held_until = now() - interval '1 second'")
        claimed = await store.claim_rollout(tx, rollout, second, LEASE_S)
        assert claimed is not None
        with pytest.raises(Conflict, match="changed or taken over"):
            await store.save_rollout(tx, claimed, shifting(claimed, "late"), first)


async def test_what_was_superseded_meanwhile_cannot_shift(db: Database, model: ModelRef) -> None:
    rollout, holder = await started(db, model, 1), uuid4()
    async with db.transaction() as tx:
        claimed = await store.claim_rollout(tx, rollout, holder, LEASE_S)
        assert claimed is not None
        await store.save_rollout(tx, claimed, aborted(claimed, "superseded by version 3"))
        with pytest.raises(Conflict, match="changed or taken over"):
            await store.save_rollout(tx, claimed, shifting(claimed, "ready"), holder)
    assert (await found(db, model, rollout)).reason == "superseded by version 3"


async def test_a_worker_that_hangs_is_waited_for_only_until_it_is_late(
    db: Database, table: ServingTable, workers: KnownWorkers, model: ModelRef
) -> None:
    rollout = await started(db, model, 1)
    workers.known = (_ready(1), _ready().model_copy(update={"id": "hanging"}))
    await runner(db, table, workers).look()
    assert (await found(db, model, rollout)).state is State.LOADING

    await runner(db, table, workers, NOW + timedelta(seconds=61)).look()
    after = await found(db, model, rollout)
    assert (after.state, after.reason) == (State.PROMOTED, "1 of 2 workers of pool 'cpu' are ready")


async def test_a_record_that_cannot_be_read_holds_up_no_other_model(
    db: Database, table: ServingTable, workers: KnownWorkers, etcd: EtcdClient, model: ModelRef
) -> None:
    other = ModelRef("default", "damaged")
    await etcd.put(f"{SERVING}{other}", b"?")
    damaged, rollout = await started(db, other, 1), await started(db, model, 1)

    with pytest.raises(ExceptionGroup):
        await runner(db, table, workers).look()

    assert (await found(db, model, rollout)).state is State.PROMOTED
    assert (await found(db, other, damaged)).state is State.LOADING


async def test_a_walk_that_a_library_cancels_ends_no_other(
    db: Database, table: ServingTable, workers: KnownWorkers, scripted_mesh: ScriptedMesh, model: ModelRef
) -> None:
    scripted_mesh.error = asyncio.CancelledError()
    cancelled = await started(db, model, 1)
    look_again = runner(db, table, workers)
    with pytest.raises(ExceptionGroup) as raised:
        await look_again.look()
    assert raised.group_contains(RuntimeError, match="cancelled from inside")

    scripted_mesh.error = None
    await look_again.look()
    assert (await found(db, model, cancelled)).state is State.PROMOTED


async def test_what_was_on_its_way_when_the_runner_closed_goes_on_from_the_table(
    db: Database, table: ServingTable, workers: KnownWorkers, scripted_mesh: ScriptedMesh, model: ModelRef
) -> None:
    rollout = await started(db, model, 1)
    scripted_mesh.meanwhile = asyncio.Event().wait
    hanging = runner(db, table, workers)
    await hanging.look(0.5)
    await hanging.close()
    assert (await found(db, model, rollout)).state is State.SHIFTING

    scripted_mesh.meanwhile = None
    await hanging.look()
    assert (await found(db, model, rollout)).state is State.PROMOTED


async def test_a_runner_that_wakes_after_its_claim_ran_out_moves_no_traffic(
    db: Database, table: ServingTable, workers: KnownWorkers, scripted_mesh: ScriptedMesh, model: ModelRef
) -> None:
    await started(db, model, 1)
    await runner(db, table, workers).look()
    rollout, sleeper = await started(db, model, 2), uuid4()
    async with db.transaction() as tx:
        claimed = await store.claim_rollout(tx, rollout, sleeper, LEASE_S)
        assert claimed is not None
        await tx.execute("UPDATE rollouts SET held_until = now() - interval '1 second'")
    # It means to promote; meanwhile another one takes over, and the rollout is given up.
    meant = stepped(shifting(claimed, "ready"), "as good")
    async with db.transaction() as tx:
        taken = await store.claim_rollout(tx, rollout, uuid4(), LEASE_S)
        assert taken is not None
        await store.save_rollout(tx, taken, aborted(taken, "worse"))
        await tx.execute("UPDATE rollouts SET held_until = now() - interval '1 second'")
    await runner(db, table, workers).look()
    before, applied = await table.get(model), len(scripted_mesh.applied)

    with pytest.raises(Raced):
        await Walker(db, table, workers, sleeper, lambda: NOW).step(meant)

    assert await table.get(model) == before
    assert len(scripted_mesh.applied) == applied
    assert before.stable == 1


async def test_failing_waits_for_nothing_but_ends_only_when_the_version_is_off_the_record(
    db: Database, table: ServingTable, workers: KnownWorkers, etcd: EtcdClient, model: ModelRef
) -> None:
    rollout, holder = await started(db, model, 1), uuid4()
    await table.record(model, lambda serving: warmed(serving, assigned(1)))
    async with db.transaction() as tx:
        claimed = await store.claim_rollout(tx, rollout, holder, LEASE_S)
        assert claimed is not None
        await store.save_rollout(tx, claimed, failing(claimed, "no memory"), holder)
        await store.release_rollout(tx, rollout, holder)
    await runner(db, table, workers).look()

    assert (await found(db, model, rollout)).state is State.FAILED
    record = await etcd.get(f"{SERVING}{model}")
    assert record is not None
    assert Serving.model_validate_json(record.value).versions == ()


def _ready(*versions: int) -> WorkerState:
    loaded = tuple(
        Loaded(
            tenant="default",
            model="digits",
            version=version,
            sha256=assigned(version).sha256,
            state=LoadState.READY,
        )
        for version in versions
    )
    return WorkerState(id="a", pool="cpu", address="127.0.0.1:1", device="cpu", versions=loaded)
