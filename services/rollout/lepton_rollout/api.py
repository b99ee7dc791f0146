"""rollout's HTTP API: what is served, and by which policy it comes to be. `api_rollouts.py` has the rollouts."""

from typing import Annotated

from fastapi import APIRouter, Path
from lepton.models import ModelLimits, Name, ResponseCache, ServingView, VersionChoice
from lepton.policies import PRESETS, Policy
from lepton.rollouts import MeshView, NewMesh, Policies, Rollout, StoredPolicy
from lepton_common.auth import Caller
from lepton_common.db import Database
from lepton_common.errors import NotFound
from lepton_common.events import PolicySet
from lepton_common.records import Cache, Limits, Scope, Serving
from lepton_common.types import ModelRef
from lepton_common.web import caller

from lepton_rollout import store_facts
from lepton_rollout.commands import Commands
from lepton_rollout.serving import ServingTable
from lepton_rollout.steering import Steering
from lepton_rollout.views import mesh_view, rollout_view, serving_view
from lepton_rollout.workers import Workers

Reader = Annotated[Caller, caller(Scope.READ)]
Deployer = Annotated[Caller, caller(Scope.DEPLOY)]
ModelName = Annotated[Name, Path()]
MODEL_ITSELF = VersionChoice()


def router(db: Database, table: ServingTable, workers: Workers, commands: Commands, steering: Steering) -> APIRouter:
    """The routes under /v1/serving, /v1/policies and /v1/mesh."""
    routes = APIRouter(prefix="/v1")
    _add_serving_routes(routes, table, workers, commands)
    _add_policy_routes(routes, db)
    _add_mesh_routes(routes, table, steering)
    return routes


def _add_serving_routes(routes: APIRouter, table: ServingTable, workers: Workers, commands: Commands) -> None:
    def view(serving: Serving) -> ServingView:
        return serving_view(serving, workers.states())

    @routes.get("/serving")
    async def list_served(by: Reader) -> list[ServingView]:
        """What is served, by model."""
        return [view(serving) for serving in await table.list(by.tenant) if by.sees(serving.model)]

    @routes.get("/serving/{model}")
    async def get_served(model: ModelName, by: Reader) -> ServingView:
        """What is served of one model."""
        return view(await _served(table, by.ref(model)))

    @routes.post("/serving/{model}/rollback", status_code=202)
    async def roll_back(model: ModelName, by: Deployer) -> Rollout:
        """Bring all traffic back to the previous version, which is warm. Rollouts under way give way."""
        return rollout_view(await commands.roll_back(by.ref(model), by.name))

    @routes.post("/serving/{model}/load")
    async def load(model: ModelName, by: Deployer, choice: VersionChoice = MODEL_ITSELF) -> ServingView:
        """Warm a version, or without one serve the model. Answers when workers have it."""
        return view(await commands.load(by.ref(model), choice.version, by.name))

    @routes.post("/serving/{model}/unload")
    async def unload(model: ModelName, by: Deployer, choice: VersionChoice = MODEL_ITSELF) -> ServingView:
        """Let a warm version go, or without one the whole model."""
        return view(await commands.unload(by.ref(model), choice.version))

    @routes.put("/serving/{model}/cache")
    async def set_cache(model: ModelName, cache: ResponseCache, by: Deployer) -> ServingView:
        """Answer requests that equal an earlier one from the gateways' memory, while one version has all traffic."""
        kept = Cache(ttl_s=cache.ttl_s, max_bytes=cache.max_bytes)
        return view(await commands.cache(by.ref(model), kept))

    @routes.delete("/serving/{model}/cache")
    async def unset_cache(model: ModelName, by: Deployer) -> ServingView:
        """Ask the model every time again."""
        return view(await commands.cache(by.ref(model), None))

    @routes.put("/serving/{model}/limits")
    async def set_limits(model: ModelName, limits: ModelLimits, by: Deployer) -> ServingView:
        """These limits of the model hold at every gateway, the defaults for what is not given."""
        return view(await commands.limit(by.ref(model), Limits(**limits.model_dump(exclude_none=True))))

    @routes.delete("/serving/{model}/limits")
    async def unset_limits(model: ModelName, by: Deployer) -> ServingView:
        """The model has the default limits again."""
        return view(await commands.limit(by.ref(model), Limits()))


def _add_policy_routes(routes: APIRouter, db: Database) -> None:
    @routes.get("/policies")
    async def list_policies(by: Reader) -> Policies:
        """The named policies, and the JSON schema of one's own."""
        return Policies(presets=dict(PRESETS), schema=Policy.model_json_schema())

    @routes.get("/policies/{model}")
    async def get_policy(model: ModelName, by: Reader) -> StoredPolicy:
        """By which policy the model's versions come to live traffic unless a rollout says otherwise."""
        async with db.transaction() as tx:
            found = await store_facts.find_policy(tx, by.ref(model))
        if found is None:
            return StoredPolicy(model=model, policy=Policy(), source="default")
        policy, actor, at = found
        return StoredPolicy(model=model, policy=policy, source=actor, at=at)

    @routes.put("/policies/{model}")
    async def set_policy(model: ModelName, policy: Policy, by: Deployer) -> StoredPolicy:
        """From now on the model has this policy; rollouts under way keep theirs."""
        ref = by.ref(model)
        said = PolicySet(tenant=ref.tenant, model=model, policy=policy.model_dump(mode="json"), actor=by.name)
        async with db.transaction() as tx:
            await store_facts.save_policy(tx, ref, policy, by.name, said.at)
            await tx.emit(said)
        return StoredPolicy(model=model, policy=policy, source=by.name, at=said.at)

    @routes.delete("/policies/{model}", status_code=204)
    async def unset_policy(model: ModelName, by: Deployer) -> None:
        """The model has the default policy again."""
        ref = by.ref(model)
        said = PolicySet(tenant=ref.tenant, model=model, policy={}, actor=by.name)
        async with db.transaction() as tx:
            if not await store_facts.remove_policy(tx, ref):
                raise NotFound(f"model {model!r} has no policy of its own")
            await tx.emit(said)


def _add_mesh_routes(routes: APIRouter, table: ServingTable, steering: Steering) -> None:
    async def view(model: ModelRef) -> MeshView:
        await _served(table, model)
        return mesh_view(*await table.live(model))

    @routes.get("/mesh/{model}")
    async def get_mesh(model: ModelName, by: Reader) -> MeshView:
        """The model's VirtualService and DestinationRule."""
        return await view(by.ref(model))

    @routes.put("/mesh/{model}")
    async def take_mesh(model: ModelName, new: NewMesh, by: Deployer) -> MeshView:
        """Move the model's traffic by hand with an Istio VirtualService; answers when the mesh has acknowledged it.

        An open rollout goes on watching, and gives advice.
        """
        ref = by.ref(model)
        await steering.take(ref, by.name, dict(new.virtual_service), new.reason or "")
        return await view(ref)

    @routes.delete("/mesh/{model}")
    async def release_mesh(model: ModelName, by: Deployer) -> MeshView:
        """Give the wheel back: to the open rollout's stage, else to the stable version."""
        ref = by.ref(model)
        await steering.release(ref, by.name)
        return await view(ref)


async def _served(table: ServingTable, model: ModelRef) -> Serving:
    serving = await table.get(model)
    if serving.generation == 0:
        raise NotFound(f"model {model.model!r} is not served")
    return serving
