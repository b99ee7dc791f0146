import asyncio
import signal

import httpx
import pytest
from lepton.envoy import Envoy
from lepton.processes import Process
from lepton_common.errors import Invalid, Unavailable
from lepton_common.types import ModelRef
from lepton_rollout.mesh import HTTPDirectResponse, HTTPRoute, VirtualService, virtual_service
from lepton_rollout.mesh_envoy import EnvoyMesh

from .envoy_state import healthy_workers, pools
from .stand_ins import StartWorker, Traffic, infer, serving

pytestmark = pytest.mark.usefixtures("envoy")


async def test_every_answer_names_the_version_that_the_split_chose(
    mesh: EnvoyMesh, client: httpx.AsyncClient, model: ModelRef, start_worker: StartWorker
) -> None:
    worker = await start_worker("a")
    await mesh.place([worker.state()])
    await mesh.apply(virtual_service(serving(model, 1, {1: 75, 2: 25})))

    answers = [await infer(client, model) for _ in range(200)]

    assert {answer.status_code for answer in answers} == {200}
    assert all(answer.headers["x-lepton-version"] == answer.json()["version"] for answer in answers)
    seconds = sum(answer.json()["version"] == "2" for answer in answers)
    assert 20 <= seconds <= 85


async def test_a_version_asked_for_by_header_answers_whatever_the_split(
    mesh: EnvoyMesh, client: httpx.AsyncClient, model: ModelRef, start_worker: StartWorker
) -> None:
    worker = await start_worker("a")
    await mesh.place([worker.state()])
    await mesh.apply(virtual_service(serving(model, 1, {1: 100}, 2)))

    answer = await infer(client, model, version="2")

    assert answer.json()["version"] == "2"
    assert answer.headers["x-lepton-version"] == "2"


async def test_what_the_mesh_answers_itself_is_an_oip_error(
    mesh: EnvoyMesh, client: httpx.AsyncClient, model: ModelRef, start_worker: StartWorker
) -> None:
    worker = await start_worker("a")
    await mesh.place([worker.state()])
    await mesh.apply(
        virtual_service(serving(model, 1, {1: 100})), virtual_service(serving(ModelRef("default", "gone"), 3, {}))
    )

    unknown_version = await infer(client, model, version="7")
    unserved = await infer(client, ModelRef("default", "gone"))
    unknown_model = await infer(client, ModelRef("default", "never"))
    worker.die()
    no_worker = await infer(client, model)

    assert unknown_version.json() == {"error": "this version of model 'digits' is not loaded"}
    assert unserved.json() == {"error": "model 'gone' is not being served"}
    assert unknown_model.json() == {"error": "this model is not being served"}
    assert no_worker.json()["error"]
    assert no_worker.headers["x-lepton-version"] == "1"
    for answer in (unknown_version, unserved, unknown_model, no_worker):
        assert answer.status_code == 503
        assert answer.headers["content-type"] == "application/json"


async def test_after_the_acknowledgement_every_request_goes_to_the_new_version(
    mesh: EnvoyMesh, client: httpx.AsyncClient, model: ModelRef, start_worker: StartWorker
) -> None:
    worker = await start_worker("a")
    await mesh.place([worker.state()])
    for generation in range(1, 40):
        await mesh.apply(virtual_service(serving(model, generation, {generation: 100})))
        assert (await infer(client, model)).json()["version"] == str(generation)


async def test_the_death_of_a_worker_under_load_fails_no_request(
    mesh: EnvoyMesh, client: httpx.AsyncClient, model: ModelRef, start_worker: StartWorker
) -> None:
    dying, staying = await start_worker("dying"), await start_worker("staying")
    await mesh.place([dying.state(), staying.state()])
    await mesh.apply(virtual_service(serving(model, 1, {1: 100})))

    async with Traffic(client, model) as traffic:
        assert dying.answered > 0
        dying.die()
        await traffic.more(500)

    assert set(traffic.answers) == {"200 version 1"}


async def test_a_worker_that_dies_right_after_it_came_costs_no_request(
    mesh: EnvoyMesh, envoy_recipe: Envoy, client: httpx.AsyncClient, model: ModelRef, start_worker: StartWorker
) -> None:
    staying = await start_worker("staying")
    await mesh.place([staying.state()])
    await mesh.apply(virtual_service(serving(model, 1, {1: 100})))

    async with Traffic(client, model) as traffic:
        for number in range(6):
            dying = await start_worker(f"dying-{number}")
            await mesh.place([staying.state(), dying.state()])
            while dying.answered == 0:
                await traffic.more(1)
            dying.die()
            await traffic.more(100)
            # A request is tried on three workers, so three that are dead and not yet noticed would be too many.
            while await healthy_workers(envoy_recipe, "cpu") > 1:
                await traffic.more(1)

    assert set(traffic.answers) == {"200 version 1"}


async def test_a_body_of_64_mib_is_sent_again_to_another_worker(
    mesh: EnvoyMesh, client: httpx.AsyncClient, model: ModelRef, start_worker: StartWorker
) -> None:
    cutting, whole = await start_worker("cutting"), await start_worker("whole")
    cutting.cuts_connections = True
    await mesh.place([cutting.state(), whole.state()])
    await mesh.apply(virtual_service(serving(model, 1, {1: 100})))
    body = bytes(64 * 1024 * 1024)

    answers = [await infer(client, model, body=body) for _ in range(6)]

    assert [answer.json() for answer in answers] == 6 * [{"worker": "whole", "version": "1", "size": len(body)}]


async def test_a_worker_that_has_not_loaded_the_version_is_passed_over(
    mesh: EnvoyMesh, client: httpx.AsyncClient, model: ModelRef, start_worker: StartWorker
) -> None:
    without, with_it = await start_worker("without"), await start_worker("with")
    without.refused = {"2"}
    await mesh.place([without.state(), with_it.state()])
    await mesh.apply(virtual_service(serving(model, 1, {2: 100}, 1)))

    assert {(await infer(client, model)).json()["worker"] for _ in range(40)} == {"with"}
    # Its refusals do not count against it: what it has, it serves.
    assert "without" in {(await infer(client, model, version="1")).json()["worker"] for _ in range(40)}


async def test_an_overloaded_workers_answer_is_not_retried_on_the_others(
    mesh: EnvoyMesh, client: httpx.AsyncClient, model: ModelRef, start_worker: StartWorker
) -> None:
    workers = [await start_worker("a"), await start_worker("b")]
    for worker in workers:
        worker.is_full = True
    await mesh.place([worker.state() for worker in workers])
    await mesh.apply(virtual_service(serving(model, 1, {1: 100})))

    answers = [await infer(client, model) for _ in range(10)]

    assert {answer.status_code for answer in answers} == {503}
    assert sum(worker.answered for worker in workers) == len(answers)


async def test_a_draining_worker_gets_no_new_request(
    mesh: EnvoyMesh, envoy_recipe: Envoy, client: httpx.AsyncClient, model: ModelRef, start_worker: StartWorker
) -> None:
    leaving, staying = await start_worker("leaving"), await start_worker("staying")
    await mesh.place([leaving.state(), staying.state()])
    await mesh.apply(virtual_service(serving(model, 1, {1: 100})))

    async with Traffic(client, model) as traffic:
        await mesh.place([leaving.state(draining=True), staying.state()])
        while await healthy_workers(envoy_recipe, "cpu") > 1:
            await traffic.more(1)
        before = leaving.answered
        await traffic.more(200)

    assert leaving.answered <= before + 8  # what was on its way
    assert set(traffic.answers) == {"200 version 1"}


async def test_a_worker_that_etcd_forgets_goes_on_serving_while_it_is_healthy(
    mesh: EnvoyMesh, client: httpx.AsyncClient, model: ModelRef, start_worker: StartWorker
) -> None:
    worker = await start_worker("a")
    await mesh.place([worker.state()])
    await mesh.apply(virtual_service(serving(model, 1, {1: 100})))

    async with Traffic(client, model) as traffic:
        await mesh.place([])
        await traffic.more(300)

    assert set(traffic.answers) == {"200 version 1"}


async def test_routes_survive_the_death_of_envoy(
    mesh: EnvoyMesh,
    envoy: Process,
    client: httpx.AsyncClient,
    model: ModelRef,
    start_worker: StartWorker,
) -> None:
    worker = await start_worker("a")
    await mesh.place([worker.state()])
    await mesh.apply(virtual_service(serving(model, 1, {1: 100})))

    envoy.kill()
    restarted = Process.start(envoy.recipe)
    try:
        await asyncio.to_thread(restarted.wait_ready)
        assert (await _first_success(client, model)).json()["version"] == "1"
    finally:
        restarted.stop()


async def test_a_change_made_while_envoy_is_dead_is_acknowledged_by_its_successor(
    mesh: EnvoyMesh,
    envoy: Process,
    client: httpx.AsyncClient,
    model: ModelRef,
    start_worker: StartWorker,
) -> None:
    worker = await start_worker("a")
    await mesh.place([worker.state()])
    await mesh.apply(virtual_service(serving(model, 1, {1: 100})))

    envoy.send(signal.SIGKILL)
    applying = asyncio.create_task(mesh.apply(virtual_service(serving(model, 2, {2: 100}))))
    await asyncio.to_thread(envoy.wait)
    restarted = Process.start(envoy.recipe)
    try:
        await applying
        assert (await _first_success(client, model)).json()["version"] == "2"
    finally:
        restarted.stop()


async def test_no_acknowledgement_in_time_is_unavailable_and_the_same_call_goes_on_from_there(
    envoy_recipe: Envoy, envoy: Process, model: ModelRef, start_worker: StartWorker
) -> None:
    hasty = EnvoyMesh(envoy_recipe.mesh_dir, envoy_recipe.admin, ack_timeout_s=0.5)
    worker = await start_worker("a")
    await hasty.place([worker.state()])
    await hasty.apply(virtual_service(serving(model, 1, {1: 100})))
    after = virtual_service(serving(model, 2, {2: 100}))

    envoy.freeze()
    with pytest.raises(Unavailable, match="did not acknowledge"):
        await hasty.apply(after)
    envoy.send(signal.SIGCONT)

    await hasty.apply(after)
    await hasty.close()


async def test_refused_routes_raise_and_leave_the_others_as_they_were(
    mesh: EnvoyMesh, envoy_recipe: Envoy, client: httpx.AsyncClient, model: ModelRef, start_worker: StartWorker
) -> None:
    worker = await start_worker("a")
    await mesh.place([worker.state()])
    await mesh.apply(virtual_service(serving(model, 1, {1: 100})))
    before = (envoy_recipe.mesh_dir / "rds.json").read_text()
    answer = HTTPRoute("answer", direct_response=HTTPDirectResponse(503, "no"))
    twice = VirtualService("default/twice", model.host, timeout_ms=1000, http=(answer,))

    for _ in range(2):
        with pytest.raises(Invalid, match=r"refused rds\.json"):
            await mesh.apply(twice)

    assert (envoy_recipe.mesh_dir / "rds.json").read_text() == before
    await mesh.apply(virtual_service(serving(model, 2, {2: 100})))
    assert (await infer(client, model)).json()["version"] == "2"


async def test_files_that_were_deleted_are_made_again(
    mesh: EnvoyMesh, envoy_recipe: Envoy, client: httpx.AsyncClient, model: ModelRef, start_worker: StartWorker
) -> None:
    worker = await start_worker("a")
    await mesh.place([worker.state()])
    await mesh.apply(virtual_service(serving(model, 1, {1: 100})))
    for name in ("eds/cpu.json", "cds.json", "rds.json"):
        (envoy_recipe.mesh_dir / name).unlink()

    await mesh.place([worker.state()])
    await mesh.apply(virtual_service(serving(model, 2, {2: 100})))

    assert (await infer(client, model)).json()["version"] == "2"


async def test_traffic_never_moves_to_a_pool_without_a_healthy_worker(
    envoy_recipe: Envoy, client: httpx.AsyncClient, model: ModelRef, start_worker: StartWorker
) -> None:
    hasty = EnvoyMesh(envoy_recipe.mesh_dir, envoy_recipe.admin, ack_timeout_s=0.5)
    other = ModelRef("default", "other")
    cpu, gpu = await start_worker("cpu"), await start_worker("gpu", "gpu")
    gpu.is_ready = False
    await hasty.place([cpu.state(), gpu.state()])
    await hasty.apply(virtual_service(serving(model, 1, {1: 100})))

    with pytest.raises(Unavailable, match="no healthy worker for default/digits"):
        await hasty.apply(
            virtual_service(serving(model, 2, {2: 100}, pool="gpu")), virtual_service(serving(other, 1, {1: 100}))
        )

    assert (await infer(client, model)).json() == {"worker": "cpu", "version": "1", "size": 2}
    assert (await infer(client, other)).status_code == 200
    gpu.is_ready = True
    patient = EnvoyMesh(envoy_recipe.mesh_dir, envoy_recipe.admin)
    await patient.apply(virtual_service(serving(model, 2, {2: 100}, pool="gpu")))
    assert (await infer(client, model)).json()["worker"] == "gpu"
    await hasty.close()
    await patient.close()


async def test_a_pool_that_nobody_needs_is_gone(
    mesh: EnvoyMesh, envoy_recipe: Envoy, model: ModelRef, start_worker: StartWorker
) -> None:
    cpu, gpu = await start_worker("cpu"), await start_worker("gpu", "gpu")
    await mesh.place([cpu.state(), gpu.state()])
    await mesh.apply(virtual_service(serving(model, 1, {1: 100}, pool="gpu")))
    await mesh.place([cpu.state()])
    assert pools(envoy_recipe.mesh_dir) == {"cpu", "gpu"}

    await mesh.apply(virtual_service(serving(model, 2, {})))
    await mesh.place([cpu.state()])

    assert pools(envoy_recipe.mesh_dir) == {"cpu"}


async def test_two_writers_of_one_folder_lose_none_of_each_others_routes(
    mesh: EnvoyMesh, envoy_recipe: Envoy, client: httpx.AsyncClient, start_worker: StartWorker
) -> None:
    second = EnvoyMesh(envoy_recipe.mesh_dir, envoy_recipe.admin)
    worker = await start_worker("a")
    await mesh.place([worker.state()])
    models = [ModelRef("default", f"model-{number}") for number in range(20)]

    await asyncio.gather(
        *(
            (mesh, second)[number % 2].apply(virtual_service(serving(each, 1, {1: 100})))
            for number, each in enumerate(models)
        )
    )

    assert {(await infer(client, each)).status_code for each in models} == {200}
    await second.close()


async def _first_success(client: httpx.AsyncClient, model: ModelRef) -> httpx.Response:
    """The first answer of a worker once a restarted Envoy has checked that one is healthy."""
    while True:
        try:
            answer = await infer(client, model)
        except httpx.TransportError:
            continue
        if answer.status_code == 200:
            return answer
