"""registry knows what there is: tenants, keys, artifacts, models, versions, and every model's timeline.

hears: every fact of a model's story (registry, rollout), KeysUsed (every service), lepton.ingest (any producer)
says:  ModelCreated, VersionRegistered, VersionPromoted, IngestFinished, IngestFailed, TenantCreated, KeyCreated,
       KeyRotated, KeyRevoked
owns:  schema registry, the blobs, etcd /lepton/keys
"""

import time
from datetime import UTC, datetime
from functools import partial

from lepton_common import events
from lepton_common.access import guard
from lepton_common.auth import Caller
from lepton_common.blobs import Blobs
from lepton_common.bus import Bus
from lepton_common.db import Database, Tx, migrate
from lepton_common.etcd import EtcdClient
from lepton_common.events import KeysUsed, RolloutFinished
from lepton_common.foreign import Message
from lepton_common.kafka import KafkaBus
from lepton_common.kafka_client import ensure_topics
from lepton_common.outbound import Outbound
from lepton_common.records import Scope
from lepton_common.service import Service, run
from lepton_common.telemetry import Telemetry, configure
from lepton_common.topics import INGEST
from lepton_common.web import create_app

from lepton_registry import api, api_artifacts, api_keys
from lepton_registry.domain import is_told
from lepton_registry.handlers import on_fact, on_ingest, on_keys_used, on_rollout_finished
from lepton_registry.inspector import ChildInspector
from lepton_registry.keys import ensure_bootstrap_key
from lepton_registry.pushes import Intake
from lepton_registry.runner import Ingests
from lepton_registry.settings import Settings
from lepton_registry.sources import Sources
from lepton_registry.uploads import Staging

_SWEEP_EVERY_S = 600.0
# The pause before what runs for ever is started again after a failure.
_AGAIN_S = 1.0


def build(settings: Settings, telemetry: Telemetry, db: Database, etcd: EtcdClient, bus: Bus) -> Service:
    """The whole service. Several may share everything but the staging folder."""
    staging, blobs = Staging(settings.staging, settings.max_artifact_bytes), Blobs(settings.blobs)
    intake = Intake(db, blobs, ChildInspector(settings.inspection_timeout_s))
    sources = Sources(settings.ingest_from.split(), Outbound(settings.ingest_private))
    ingests = Ingests(db, staging, sources, intake, telemetry)

    async def sweep() -> None:
        await staging.sweep(before_s=time.time() - settings.staging_max_age_s)

    async def note_ingest(message: Message, caller: Caller, tx: Tx) -> None:
        await on_ingest(message, caller, tx, sources=sources, at=datetime.now(UTC))

    service = Service("registry", settings, telemetry, db=db, bus=bus)
    service.on_close(etcd.close)
    service.background(etcd.check_version)
    keys = guard(service, etcd, db.emit)
    service.prepare(partial(migrate, db, "lepton_registry"))
    if digest := settings.bootstrap_key_sha256:
        service.prepare(partial(ensure_bootstrap_key, etcd, digest, datetime.now(UTC)))
    service.prepare(keys.mirror.synced)
    service.every(_SWEEP_EVERY_S, sweep)
    for kind in events.types():
        if is_told(kind) and kind is not RolloutFinished:
            service.decide(kind, on_fact)
    service.decide(RolloutFinished, on_rollout_finished)
    service.decide(KeysUsed, on_keys_used, keyed=True)
    service.hear(INGEST.name, keys, Scope.DEPLOY, note_ingest, after=ingests.wake.set)
    service.every(_AGAIN_S, ingests.run)

    app = create_app(service, keys, unlimited=[api_artifacts.PREFIX])
    app.state.parts = api.Parts(db, etcd, blobs, staging, intake)
    app.include_router(api_keys.router)
    app.include_router(api.router)
    app.include_router(api_artifacts.router)
    service.web(app)
    return service


def main() -> None:
    """The process: runs until SIGTERM."""
    settings = Settings.read()
    telemetry = configure("registry", settings)
    db = Database(settings.postgres_dsn, "registry")
    service = build(
        settings,
        telemetry,
        db,
        EtcdClient(settings.etcd),
        KafkaBus(settings.kafka, "registry", telemetry, instance=settings.instance),
    )
    # Not awaited before the start: models can be pushed while Kafka is away, their events wait in the outbox.
    service.background(partial(ensure_topics, settings.kafka))
    run(service)


if __name__ == "__main__":
    main()
