"""Prometheus metrics of the gateway, read from plain counters when asked: a request pays next to nothing for them."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate

from lepton_common.http11 import JSON, Handler, Request, Server, error_body
from lepton_common.sketch import Sketch, milliseconds_of
from lepton_common.telemetry import METRICS_CONTENT_TYPE
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from lepton_gateway.admission import Admission
from lepton_gateway.reporter import Reporter
from lepton_gateway.routes import Routes

# Upper bounds in seconds: about a tenth of a millisecond to a minute, each 2 to 2.5 times the one before.
BUCKETS_S = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1),
    *(0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)

_LABELS = ("tenant", "model", "version")
_BOUNDS = (*(str(bound) for bound in BUCKETS_S), "+Inf")

_TEXT = b"content-type: %b\r\n" % METRICS_CONTENT_TYPE.encode()


def metrics_page(render: Callable[[], bytes]) -> Handler:
    """The handler of the admin port, which has this one page."""

    def handle(request: Request) -> None:
        if request.path != "/metrics":
            request.respond(404, JSON, error_body("Not Found: this port has /metrics"))
        elif request.method not in ("GET", "HEAD"):
            request.respond(405, JSON + b"allow: GET, HEAD\r\n", error_body("Method Not Allowed: use GET"))
        else:
            request.respond(200, _TEXT, render())

    return handle


class Metrics(Collector):
    def __init__(
        self,
        routes: Routes,
        refused: Mapping[int, int],
        server: Server,
        reporter: Reporter,
        etcd_stale_s: Callable[[], float],
        admission: Admission,
    ) -> None:
        """`refused` counts by status what the gateway answered itself."""
        self._routes = routes
        self._refused = refused
        self._server = server
        self._reporter = reporter
        self._etcd_stale_s = etcd_stale_s
        self._admission = admission

    def collect(self) -> Iterable[Metric]:
        yield from self._of_models()
        yield from self._of_pools()
        yield from self._of_caches()
        refused = CounterMetricFamily(
            "lepton_gateway_refused_requests", "Requests that never went to the mesh, by status.", labels=("code",)
        )
        for status, count in self._refused.items():
            refused.add_metric((str(status),), count)
        yield refused
        yield CounterMetricFamily(
            "lepton_gateway_malformed_requests",
            "What was no HTTP request, or was cut off.",
            value=self._server.rejected,
        )
        yield CounterMetricFamily(
            "lepton_gateway_refused_bodies", "Bodies cut off for want of room.", value=self._server.room.refused
        )
        yield GaugeMetricFamily(
            "lepton_gateway_free_body_bytes", "Memory that is left for large bodies.", value=self._server.room.free
        )
        yield GaugeMetricFamily(
            "lepton_gateway_connections", "Open connections of callers.", value=len(self._server.connections)
        )
        yield GaugeMetricFamily(
            "lepton_gateway_etcd_stale_seconds", "Time since etcd was last heard.", value=self._etcd_stale_s()
        )
        yield CounterMetricFamily(
            "lepton_gateway_windows_sent", "Windows that Kafka has stored.", value=self._reporter.sent
        )
        yield CounterMetricFamily(
            "lepton_gateway_windows_dropped",
            "Windows that were given up, for want of room while Kafka was away.",
            value=self._reporter.dropped,
        )

    def _of_models(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "lepton_gateway_requests", "Requests for a model by status.", labels=(*_LABELS, "code")
        )
        seconds = HistogramMetricFamily(
            "lepton_gateway_request_seconds", "Time from a request to its answer, within 1 %.", labels=_LABELS
        )
        in_flight = GaugeMetricFamily("lepton_gateway_in_flight", "Requests under way.", labels=("tenant", "model"))
        places = GaugeMetricFamily(
            "lepton_gateway_model_in_flight_limit",
            "Requests that may be under way.",
            labels=("tenant", "model", "pool"),
        )
        for (tenant, model), route in self._routes.all.items():
            in_flight.add_metric((tenant, model), route.counts.in_flight)
            for pool, lane in route.lanes.items():
                places.add_metric((tenant, model, pool), lane.places.value)
            for version, cell in route.counts.totals().items():
                labels = (tenant, model, version.decode("latin-1"))
                for status, count in cell.by_status().items():
                    requests.add_metric((*labels, str(status)), count)
                buckets = list(zip(_BOUNDS, accumulate(histogram(cell.latency())), strict=True))
                seconds.add_metric(labels, buckets, cell.seconds)
        yield from (requests, seconds, in_flight, places)

    def _of_pools(self) -> Iterable[Metric]:
        waiting = GaugeMetricFamily(
            "lepton_gateway_queue_length", "Requests that wait for their turn.", labels=("pool", "class")
        )
        size = GaugeMetricFamily("lepton_gateway_queue_bytes", "Bodies of requests that wait.", labels=("pool",))
        limit = GaugeMetricFamily(
            "lepton_gateway_in_flight_limit", "Requests that may be under way at once.", labels=("pool", "class")
        )
        for name, pool in self._admission.pools.items():
            waiting.add_metric((name, "interactive"), pool.queue.interactive.size)
            waiting.add_metric((name, "background"), pool.queue.background.size)
            size.add_metric((name,), pool.queue.size_bytes)
            limit.add_metric((name, "all"), pool.places.value)
            limit.add_metric((name, "background"), pool.background.value)
        shed = CounterMetricFamily(
            "lepton_gateway_shed_requests", "Requests refused by limits and admission.", labels=("reason", "class")
        )
        for (reason, background), count in self._admission.refused.items():
            shed.add_metric((reason.value, "background" if background else "interactive"), count)
        yield from (waiting, size, limit, shed)

    def _of_caches(self) -> Iterable[Metric]:
        hits = CounterMetricFamily(
            "lepton_gateway_cache_hits", "Requests answered without asking the model.", labels=_LABELS
        )
        misses = CounterMetricFamily("lepton_gateway_cache_misses", "Requests that no cache answered.", labels=_LABELS)
        size = GaugeMetricFamily(
            "lepton_gateway_cache_bytes", "Memory that kept answers take.", labels=("tenant", "model")
        )
        for (tenant, model), route in self._routes.all.items():
            if route.cache is not None:
                size.add_metric((tenant, model), route.cache.used_bytes)
            for version, lookups in route.cache_counts.by_version.items():
                hits.add_metric((tenant, model, str(version)), lookups.hits)
                misses.add_metric((tenant, model, str(version)), lookups.misses)
        yield from (hits, misses, size)


def histogram(sketch: Sketch) -> list[int]:
    """The latencies by BUCKETS_S and beyond. One within 1 % of a bound may be counted on its other side."""
    counts = [0] * (len(BUCKETS_S) + 1)
    for bucket, count in sketch.items():
        counts[bisect_left(BUCKETS_S, milliseconds_of(bucket) / 1e3)] += count
    return counts
