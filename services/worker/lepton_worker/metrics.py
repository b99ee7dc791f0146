"""Prometheus metrics of a worker, read from the versions' own counters when asked: a request pays nothing for them."""

from collections.abc import Callable, Iterable

from lepton_common.http11_body import Room
from lepton_common.records import Loaded
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lepton_worker.lane import Lane

_LABELS = ("tenant", "model", "version")


class Metrics(Collector):
    def __init__(
        self,
        lanes: Callable[[], Iterable[Lane]],
        views: Callable[[], Iterable[Loaded]],
        room: Room,
        etcd_stale_s: Callable[[], float],
    ) -> None:
        self._lanes = lanes
        self._views = views
        self._room = room
        self._etcd_stale_s = etcd_stale_s

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily("lepton_worker_requests", "Requests by outcome.", labels=(*_LABELS, "outcome"))
        rows = CounterMetricFamily("lepton_worker_rows", "Rows answered.", labels=_LABELS)
        runs = CounterMetricFamily("lepton_worker_runs", "Runs of the model.", labels=_LABELS)
        isolated = CounterMetricFamily(
            "lepton_worker_isolated_batches", "Batches that failed and ran again one by one.", labels=_LABELS
        )
        queue = CounterMetricFamily("lepton_worker_queue_seconds", "Time requests waited for a slot.", labels=_LABELS)
        run = CounterMetricFamily("lepton_worker_run_seconds", "Time the model ran.", labels=_LABELS)
        queued = GaugeMetricFamily("lepton_worker_queued_rows", "Rows that wait for a slot.", labels=_LABELS)
        for lane in self._lanes():
            labels = (lane.ref.model.tenant, lane.model, lane.version)
            seen = lane.batcher.statistics
            for outcome in ("succeeded", "failed", "expired", "rejected", "cancelled"):
                requests.add_metric((*labels, outcome), getattr(seen, outcome))
            rows.add_metric(labels, seen.rows)
            runs.add_metric(labels, seen.executions)
            isolated.add_metric(labels, seen.isolated)
            queue.add_metric(labels, seen.queue_s)
            run.add_metric(labels, seen.run_s)
            queued.add_metric(labels, lane.batcher.queued_rows)
        versions = GaugeMetricFamily("lepton_worker_versions", "Versions by state.", labels=(*_LABELS, "state"))
        for view in self._views():
            versions.add_metric((view.tenant, view.model, str(view.version), view.state), 1)
        stale = GaugeMetricFamily(
            "lepton_worker_etcd_stale_seconds", "Time since etcd was last heard.", value=self._etcd_stale_s()
        )
        refused = CounterMetricFamily(
            "lepton_worker_refused_bodies", "Bodies cut off for want of room.", value=self._room.refused
        )
        free = GaugeMetricFamily(
            "lepton_worker_free_body_bytes", "Memory that is left for large bodies.", value=self._room.free
        )
        return (requests, rows, runs, isolated, queue, run, queued, versions, stale, refused, free)
