"""rollout brings a model's version to live traffic, or traffic back to the version before.

hears: VersionRegistered (registry), WindowClosed (monitor)
says:  PolicySet, RolloutStarted, TrafficShifted, RolloutHeld, RolloutSteered, RolloutFinished, MeshTaken, MeshReturned
owns:  tables versions, policies, rollouts, decisions and windows, etcd /lepton/serving, the mesh's routes
"""

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from uuid import NAMESPACE_URL, UUID, uuid4, uuid5

from lepton_common.access import guard
from lepton_common.bus import Bus
from lepton_common.db import Database, migrate
from lepton_common.etcd import EtcdClient
from lepton_common.events import VersionRegistered, WindowClosed
from lepton_common.kafka import KafkaBus
from lepton_common.kafka_client import ensure_topics
from lepton_common.service import Service, run
from lepton_common.telemetry import Telemetry, configure
from lepton_common.web import create_app

from lepton_rollout import api, api_rollouts, store_facts
from lepton_rollout.commands import Commands
from lepton_rollout.handlers import on_version_registered, on_window_closed
from lepton_rollout.judge import BASELINE_S
from lepton_rollout.kubernetes import Cluster, Kubernetes
from lepton_rollout.mesh import Mesh
from lepton_rollout.mesh_envoy import EnvoyMesh
from lepton_rollout.mesh_istio import IstioMesh
from lepton_rollout.runner import Runner
from lepton_rollout.serving import ServingTable
from lepton_rollout.settings import Settings
from lepton_rollout.starting import Starter
from lepton_rollout.steering import Steering
from lepton_rollout.walker import Walker
from lepton_rollout.workers import Workers

# A route that the mesh missed is there after this time at the latest.
_REAPPLY_S = 10.0
# The pause before what runs for ever is started again after a failure.
_AGAIN_S = 1.0
# Windows that belong to no rollout are kept for so long: the next one takes its baseline from them.
_KEEP_WINDOWS_S = BASELINE_S + 60
_TIDY_EVERY_S = 60.0
# A worker gives one load the same time: what it says of it comes before the rollout ends without a reason.
_WORD_OF_WORKERS_S = 5.0


def build(
    settings: Settings,
    telemetry: Telemetry,
    db: Database,
    etcd: EtcdClient,
    bus: Bus,
    mesh: Mesh,
    now: Callable[[], datetime],
) -> Service:
    """The whole service. Its replicas share the work; `mesh` is this replica's way to the mesh, `now` its clock."""
    workers, table = Workers(etcd), ServingTable(etcd, mesh)
    load_timeout_s = settings.load_timeout_s + _WORD_OF_WORKERS_S
    starter = Starter(db, table, workers, load_timeout_s, now)
    steering = Steering(db, table, workers, starter, now)
    commands = Commands(db, table, workers, starter, load_timeout_s, now)
    holder = _holder(settings.instance)
    runner = Runner(db, Walker(db, table, workers, holder, now), workers, holder, now, telemetry.registry)

    service = Service("rollout", settings, telemetry, db=db, bus=bus)
    service.on_close(etcd.close)
    service.background(etcd.check_version)
    keys = guard(service, etcd, db.emit)
    service.on_close(mesh.close)
    service.on_close(runner.close)
    service.background(workers.mirror.run)
    service.prepare(partial(migrate, db, "lepton_rollout"))
    service.prepare(keys.mirror.synced)
    service.prepare(workers.mirror.synced)
    service.every(_AGAIN_S, partial(workers.follow, mesh))
    service.every(_AGAIN_S, partial(steering.follow, mesh))
    service.every(_AGAIN_S, runner.run)
    service.every(_REAPPLY_S, table.reapply)
    service.every(_TIDY_EVERY_S, partial(_tidy, db, now))
    service.decide(VersionRegistered, partial(on_version_registered, load_timeout_s=load_timeout_s, now=now))
    service.decide(WindowClosed, on_window_closed, keyed=True, after=workers.changed.send)

    app = create_app(service, keys)
    app.include_router(api.router(db, table, workers, commands, steering))
    app.include_router(api_rollouts.router(db, table, starter, steering))
    service.web(app)
    return service


def main() -> None:
    """The process: runs until SIGTERM."""
    settings = Settings.read()
    telemetry = configure("rollout", settings)
    # It would tell of every look at Envoy's statistics.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    mesh = _mesh(settings)
    service = build(
        settings,
        telemetry,
        Database(settings.postgres_dsn, "rollout"),
        EtcdClient(settings.etcd),
        KafkaBus(settings.kafka, "rollout", telemetry, instance=settings.instance),
        mesh,
        _now,
    )
    # Beside all else: rollouts go on without Kafka, and tell of themselves when it is back.
    service.background(partial(ensure_topics, settings.kafka))
    run(service)


async def _tidy(db: Database, now: Callable[[], datetime]) -> None:
    """Old windows are gone."""
    async with db.transaction() as tx:
        await store_facts.remove_windows(tx, int(now().timestamp()) - _KEEP_WINDOWS_S, BASELINE_S)


def _mesh(settings: Settings) -> EnvoyMesh | IstioMesh:
    """The mesh that the settings name."""
    if settings.mesh == "envoy":
        return EnvoyMesh(settings.mesh_dir, settings.envoy_admin)
    ca = settings.kubernetes_ca if settings.kubernetes_url.startswith("https:") else None
    cluster = Cluster(settings.kubernetes_url, settings.kubernetes_namespace, settings.kubernetes_token, ca)
    return IstioMesh(Kubernetes(cluster))


def _holder(instance: str) -> UUID:
    """Who claims rollouts. The same after a restart of a named replica, so that it goes on with them at once."""
    return uuid5(NAMESPACE_URL, f"lepton:rollout:{instance}") if instance else uuid4()


def _now() -> datetime:
    return datetime.now(UTC)


if __name__ == "__main__":
    main()
