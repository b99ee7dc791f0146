"""rollout brings a model's version to live traffic, or traffic back to the version before.

hears: VersionRegistered (registry)
says:  RolloutStarted, TrafficShifted, RolloutFinished
owns:  tables versions and rollouts, etcd /lepton/serving, the mesh's routes
"""

import logging
from datetime import UTC, datetime
from functools import partial
from uuid import uuid4

from lepton_common.auth import Keys
from lepton_common.bus import Bus
from lepton_common.db import Database, migrate
from lepton_common.etcd import EtcdClient
from lepton_common.events import VersionRegistered
from lepton_common.kafka import KafkaBus
from lepton_common.kafka_client import ensure_topics
from lepton_common.service import Service, run
from lepton_common.telemetry import Telemetry, configure
from lepton_common.web import create_app

from lepton_rollout import api
from lepton_rollout.commands import Commands
from lepton_rollout.envoy import EnvoyMesh
from lepton_rollout.handlers import on_version_registered
from lepton_rollout.mesh import Mesh
from lepton_rollout.runner import Runner
from lepton_rollout.serving import ServingTable
from lepton_rollout.settings import Settings
from lepton_rollout.workers import Workers

# A route that the mesh missed is there after this time at the latest.
_REAPPLY_S = 10.0
# The pause before what runs for ever is started again after a failure.
_AGAIN_S = 1.0


def build(settings: Settings, telemetry: Telemetry, db: Database, etcd: EtcdClient, bus: Bus, mesh: Mesh) -> Service:
    """The whole service. Its replicas share the work; `mesh` is this replica's way to the mesh."""
    keys, workers, table = Keys(etcd), Workers(etcd), ServingTable(etcd, mesh)
    commands = Commands(db, table, workers, settings.load_timeout_s, _now)
    runner = Runner(db, table, workers, uuid4(), _now, telemetry.registry)

    service = Service("rollout", settings, telemetry, db=db, bus=bus)
    service.on_close(etcd.close)
    service.background(keys.mirror.run)
    service.background(workers.mirror.run)
    service.prepare(partial(migrate, db, "lepton_rollout"))
    service.prepare(keys.mirror.synced)
    service.prepare(workers.mirror.synced)
    service.every(_AGAIN_S, partial(workers.follow, mesh))
    service.every(_AGAIN_S, runner.run)
    service.every(_REAPPLY_S, table.reapply)
    service.decide(VersionRegistered, partial(on_version_registered, load_timeout_s=settings.load_timeout_s, now=_now))

    app = create_app(service, keys)
    app.include_router(api.router(db, table, workers, commands))
    service.web(app)
    return service


def main() -> None:
    """The process: runs until SIGTERM."""
    settings = Settings.read()
    telemetry = configure("rollout", settings)
    # It would tell of every look at Envoy's statistics.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    mesh = EnvoyMesh(settings.mesh_dir, settings.envoy_admin)
    service = build(
        settings,
        telemetry,
        Database(settings.postgres_dsn, "rollout"),
        EtcdClient(settings.etcd),
        KafkaBus(settings.kafka, "rollout", telemetry),
        mesh,
    )
    service.on_close(mesh.close)
    # Beside all else: rollouts go on without Kafka, and tell of themselves when it is back.
    service.background(partial(ensure_topics, settings.kafka))
    run(service)


def _now() -> datetime:
    return datetime.now(UTC)


if __name__ == "__main__":
    main()
