"""Prometheus metrics of the gateway, read from plain counters when asked: a request pays next to nothing for them."""

from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate

from lepton_common.http11 import Server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from lepton_gateway.routes import BUCKETS_S, Routes

_LABELS = ("tenant", "model", "version")
_BOUNDS = (*(str(bound) for bound in BUCKETS_S), "+Inf")


class Metrics(Collector):
    def __init__(
        self, routes: Routes, refused: Mapping[int, int], server: Server, etcd_stale_s: Callable[[], float]
    ) -> None:
        """`refused` counts by status what the gateway answered itself."""
        self._routes = routes
        self._refused = refused
        self._server = server
        self._etcd_stale_s = etcd_stale_s

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "lepton_gateway_requests", "Requests for a model by status.", labels=(*_LABELS, "code")
        )
        seconds = HistogramMetricFamily(
            "lepton_gateway_request_seconds", "Time from a request to its answer.", labels=_LABELS
        )
        in_flight = GaugeMetricFamily("lepton_gateway_in_flight", "Requests under way.", labels=("tenant", "model"))
        for (tenant, model), route in self._routes.all.items():
            in_flight.add_metric((tenant, model), route.in_flight)
            for version, tally in route.tallies.items():
                labels = (tenant, model, version.decode("latin-1"))
                for status, count in tally.statuses.items():
                    requests.add_metric((*labels, str(status)), count)
                buckets = list(zip(_BOUNDS, accumulate(tally.buckets), strict=True))
                seconds.add_metric(labels, buckets, tally.seconds)
        yield from (requests, seconds, in_flight)
        refused = CounterMetricFamily(
            "lepton_gateway_refused_requests", "Requests that never went to the mesh, by status.", labels=("code",)
        )
        for status, count in self._refused.items():
            refused.add_metric((str(status),), count)
        yield refused
        yield CounterMetricFamily(
            "lepton_gateway_malformed_requests", "What was no HTTP request.", value=self._server.rejected
        )
        yield GaugeMetricFamily(
            "lepton_gateway_connections", "Open connections of callers.", value=len(self._server.connections)
        )
        yield GaugeMetricFamily(
            "lepton_gateway_etcd_stale_seconds", "Time since etcd was last heard.", value=self._etcd_stale_s()
        )
