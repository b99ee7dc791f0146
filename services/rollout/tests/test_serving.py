import asyncio

import pytest
from lepton.policies import Policy
from lepton_common.errors import Conflict, Unavailable
from lepton_common.etcd import EtcdClient
from lepton_common.records import SERVING
from lepton_common.types import ModelRef
from lepton_rollout.mesh import virtual_service
from lepton_rollout.policy import Kind, Stage
from lepton_rollout.record import promoted, settled, staged, warmed
from lepton_rollout.serving import Raced, ServingTable

from .scripted_mesh import ScriptedMesh
from .stand_ins import assigned

TENTH = Stage(0, Kind.SPLIT, 10.0)


async def test_the_table_says_raced_when_two_changes_meet(
    table: ServingTable, scripted_mesh: ScriptedMesh, etcd: EtcdClient, model: ModelRef
) -> None:
    await table.record(model, lambda serving: warmed(serving, assigned(1)))

    async def another() -> None:
        await etcd.put(f"{SERVING}{model}", (await table.get(model)).model_dump_json().encode())

    scripted_mesh.meanwhile = another
    with pytest.raises(Raced):
        await table.shift(model, lambda serving: promoted(serving, 1))


async def test_an_older_record_never_reaches_the_mesh_after_a_newer_one(
    table: ServingTable, scripted_mesh: ScriptedMesh, model: ModelRef
) -> None:
    await table.record(model, lambda serving: warmed(serving, assigned(1)))
    reapplying: list[asyncio.Task[None]] = []

    async def reapply() -> None:
        if not reapplying:
            reapplying.append(asyncio.create_task(table.reapply()))
            await asyncio.sleep(0.05)  # long enough for it to read the record that is about to change

    scripted_mesh.meanwhile = reapply
    served = await table.shift(model, lambda serving: promoted(serving, 1))
    await reapplying[0]

    assert scripted_mesh.applied[-1] == virtual_service(served)


async def test_a_shift_that_died_before_etcd_knew_is_undone_by_the_next(
    table: ServingTable, scripted_mesh: ScriptedMesh, model: ModelRef
) -> None:
    await table.record(model, lambda serving: warmed(warmed(serving, assigned(1)), assigned(2)))
    before = await table.shift(model, lambda serving: promoted(serving, 1))

    async def die() -> None:
        scripted_mesh.meanwhile = None
        raise Unavailable("the process is gone")

    scripted_mesh.meanwhile = die
    with pytest.raises(Unavailable):
        await table.shift(model, lambda serving: staged(serving, 2, TENTH, Policy(), "salt"))
    assert scripted_mesh.live_services[str(model)].generation > before.generation

    after = await table.shift(model, settled)

    assert scripted_mesh.live_services[str(model)] == virtual_service(after)
    assert after.split == before.split
    assert await table.get(model) == after


async def test_reapply_brings_a_mesh_that_ran_ahead_back_to_the_record(
    table: ServingTable, scripted_mesh: ScriptedMesh, model: ModelRef
) -> None:
    await table.record(model, lambda serving: warmed(serving, assigned(1)))
    before = await table.shift(model, lambda serving: promoted(serving, 1))
    ahead = before.model_copy(update={"generation": before.generation + 5, "split": ()})
    await scripted_mesh.apply(virtual_service(ahead))

    await table.reapply()

    after = await table.get(model)
    assert after.split == before.split
    assert scripted_mesh.live_services[str(model)] == virtual_service(after)


async def test_who_loses_a_race_leaves_the_winners_routes_in_the_mesh(
    table: ServingTable, scripted_mesh: ScriptedMesh, model: ModelRef
) -> None:
    await table.record(model, lambda serving: warmed(warmed(serving, assigned(1)), assigned(2)))
    await table.shift(model, lambda serving: promoted(serving, 1))

    async def another() -> None:
        scripted_mesh.meanwhile = None
        await table.record(model, lambda serving: warmed(serving, assigned(3)))

    scripted_mesh.meanwhile = another
    with pytest.raises(Raced):
        await table.shift(model, lambda serving: staged(serving, 2, TENTH, Policy(), "salt"))

    assert scripted_mesh.live_services[str(model)] == virtual_service(await table.get(model))


async def test_what_somebody_else_changed_in_the_mesh_is_waited_for(
    table: ServingTable, scripted_mesh: ScriptedMesh, model: ModelRef
) -> None:
    await table.record(model, lambda serving: warmed(serving, assigned(1)))
    scripted_mesh.error = Conflict("spec.http was changed by kubectl")
    with pytest.raises(Unavailable, match="kubectl"):
        await table.shift(model, lambda serving: promoted(serving, 1))
    assert (await table.get(model)).split == ()
