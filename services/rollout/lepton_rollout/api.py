"""rollout's HTTP API: rollouts, and what is served."""

from collections.abc import Collection
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Path, Query
from lepton.models import (
    LoadedVersion,
    Name,
    NewRollout,
    Rollout,
    RolloutState,
    ServingView,
    Strategy,
    TrafficShare,
    VersionChoice,
)
from lepton_common.auth import Caller
from lepton_common.db import Database
from lepton_common.errors import NotFound
from lepton_common.records import Scope, Serving, WorkerState
from lepton_common.types import ModelRef
from lepton_common.web import caller

from lepton_rollout import domain, store
from lepton_rollout.commands import Commands
from lepton_rollout.serving import ServingTable
from lepton_rollout.workers import Workers

Reader = Annotated[Caller, caller(Scope.READ)]
Deployer = Annotated[Caller, caller(Scope.DEPLOY)]
ModelName = Annotated[Name, Path()]
MODEL_ITSELF = VersionChoice()


def router(db: Database, table: ServingTable, workers: Workers, commands: Commands) -> APIRouter:
    """The routes under /v1/rollouts and /v1/serving."""
    routes = APIRouter(prefix="/v1")
    _add_rollout_routes(routes, db, commands)
    _add_serving_routes(routes, table, workers, commands)
    return routes


def _add_rollout_routes(routes: APIRouter, db: Database, commands: Commands) -> None:
    @routes.post("/rollouts", status_code=202)
    async def start(new: NewRollout, by: Deployer) -> Rollout:
        """Bring a version to all of its model's traffic. Repeating it returns the rollout that is on its way."""
        return _rollout(await commands.deploy(ModelRef(by.tenant, new.model), new.version, by.name))

    @routes.get("/rollouts")
    async def list_all(
        by: Reader, model: Name | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100
    ) -> list[Rollout]:
        """The newest rollouts first."""
        async with db.transaction() as tx:
            return [_rollout(each) for each in await store.list_rollouts(tx, by.tenant, model, limit)]

    @routes.get("/rollouts/{rollout}")
    async def get(rollout: UUID, by: Reader) -> Rollout:
        """One rollout."""
        async with db.transaction() as tx:
            return _rollout(await store.get_rollout(tx, by.tenant, rollout))


def _add_serving_routes(routes: APIRouter, table: ServingTable, workers: Workers, commands: Commands) -> None:
    def view(serving: Serving) -> ServingView:
        return _view(serving, workers.states())

    @routes.get("/serving")
    async def list_served(by: Reader) -> list[ServingView]:
        """What is served, by model."""
        return [view(serving) for serving in await table.list(by.tenant)]

    @routes.get("/serving/{model}")
    async def get_served(model: ModelName, by: Reader) -> ServingView:
        """What is served of one model."""
        serving = await table.get(ModelRef(by.tenant, model))
        if serving.generation == 0:
            raise NotFound(f"model {model!r} is not served")
        return view(serving)

    @routes.post("/serving/{model}/rollback", status_code=202)
    async def roll_back(model: ModelName, by: Deployer) -> Rollout:
        """Bring all traffic back to the previous version, which is warm. A rollout still loading gives way."""
        return _rollout(await commands.roll_back(ModelRef(by.tenant, model), by.name))

    @routes.post("/serving/{model}/load")
    async def load(model: ModelName, by: Deployer, choice: VersionChoice = MODEL_ITSELF) -> ServingView:
        """Warm a version, or without one serve the model. Answers when workers have it."""
        return view(await commands.load(ModelRef(by.tenant, model), choice.version, by.name))

    @routes.post("/serving/{model}/unload")
    async def unload(model: ModelName, by: Deployer, choice: VersionChoice = MODEL_ITSELF) -> ServingView:
        """Let a warm version go, or without one the whole model."""
        return view(await commands.unload(ModelRef(by.tenant, model), choice.version))


def _rollout(rollout: domain.Rollout) -> Rollout:
    return Rollout(
        id=rollout.id,
        tenant=rollout.model.tenant,
        model=rollout.model.model,
        version=rollout.version,
        previous=rollout.previous,
        strategy=Strategy(rollout.strategy),
        state=RolloutState(rollout.state),
        reason=rollout.reason,
        percent=rollout.percent,
        actor=rollout.actor,
        started_at=rollout.started_at,
        finished_at=rollout.finished_at,
    )


def _view(serving: Serving, workers: Collection[WorkerState]) -> ServingView:
    return ServingView(
        tenant=serving.tenant,
        model=serving.model,
        generation=serving.generation,
        stable=serving.stable,
        previous=serving.previous,
        split=[TrafficShare(version=share.version, percent=share.percent) for share in serving.split],
        versions=sorted(each.version for each in serving.versions),
        workers=[
            LoadedVersion(
                version=loaded.version, worker=worker.id, device=worker.device, state=loaded.state, reason=loaded.reason
            )
            for worker in sorted(workers, key=lambda worker: worker.id)
            for loaded in worker.versions
            if (loaded.tenant, loaded.model) == (serving.tenant, serving.model)
        ],
    )
