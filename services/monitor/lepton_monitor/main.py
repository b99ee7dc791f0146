"""monitor measures live traffic: it merges what the gateways saw of a second, closes it once, and keeps the history.

hears: InferenceWindow (gateway, and itself: the marker of a second's end); lepton.labels (any producer)
says:  WindowClosed
owns:  schema monitor: tables inputs, models, seconds, minutes and labels
"""

from datetime import UTC, datetime, timedelta
from functools import partial

from lepton_common.access import guard
from lepton_common.bus import Bus
from lepton_common.db import Database, migrate
from lepton_common.etcd import EtcdClient
from lepton_common.events import InferenceWindow
from lepton_common.kafka import KafkaBus
from lepton_common.kafka_client import ensure_topics
from lepton_common.records import Scope
from lepton_common.service import Service, run
from lepton_common.telemetry import Telemetry, configure
from lepton_common.topics import LABELS
from lepton_common.web import create_app

from lepton_monitor import api, api_labels
from lepton_monitor.closing import Closing
from lepton_monitor.handlers import Measures, on_inference_window, on_label
from lepton_monitor.runner import History, Marking
from lepton_monitor.settings import Settings

_KEEP_HISTORY_S = 60.0
# The pause before what runs for ever is started again after a failure.
_AGAIN_S = 1.0


def build(settings: Settings, telemetry: Telemetry, db: Database, etcd: EtcdClient, bus: Bus) -> Service:
    """The whole service. Its replicas share the work."""
    closing, measures = Closing(), Measures(telemetry.registry)
    history = History(db, closing, settings.kept_s, _now)
    kept = timedelta(days=settings.labels_kept_days)

    service = Service("monitor", settings, telemetry, db=db, bus=bus)
    service.on_close(etcd.close)
    service.background(etcd.check_version)
    keys = guard(service, etcd, db.emit)
    service.prepare(partial(migrate, db, "lepton_monitor"))
    service.prepare(history.make_partitions)
    service.prepare(keys.mirror.synced)
    service.every(_KEEP_HISTORY_S, history.keep)
    service.every(_AGAIN_S, Marking(db, bus, _now).run)
    service.decide(InferenceWindow, partial(on_inference_window, closing=closing, measures=measures, now=_now))
    service.hear(LABELS.name, keys, Scope.INFER, partial(on_label, kept=kept, now=_now))

    app = create_app(service, keys)
    app.include_router(api.router(db, _now))
    app.include_router(api_labels.router(db))
    service.web(app)
    return service


def main() -> None:
    """The process: runs until SIGTERM."""
    settings = Settings.read()
    telemetry = configure("monitor", settings)
    service = build(
        settings,
        telemetry,
        Database(settings.postgres_dsn, "monitor"),
        EtcdClient(settings.etcd),
        KafkaBus(settings.kafka, "monitor", telemetry, instance=settings.instance),
    )
    service.background(partial(ensure_topics, settings.kafka))
    run(service)


def _now() -> datetime:
    return datetime.now(UTC)


if __name__ == "__main__":
    main()
