"""gateway is the front door of inference: it knows keys, models and limits, and passes requests to the mesh.

hears: etcd /lepton/keys (registry), /lepton/serving (rollout), /lepton/workers (worker);
       lepton.inference.requests, of anyone
says:  lepton.inference.results; past the outbox, where what Kafka cannot take is dropped: InferenceWindow, every second
       and model, KeysUsed, AccessRefused
owns:  etcd /lepton/quotas, with the other gateways: a restart loses the last second's window and count at most
"""

import random
import time
from functools import partial

import httpx
from lepton_common import http2
from lepton_common.access import guard
from lepton_common.auth import Keys
from lepton_common.etcd import EtcdClient
from lepton_common.http11 import Server, ServerLimits
from lepton_common.http11_client import Upstream, UpstreamLimits
from lepton_common.kafka_client import Bootstrap, Producer, ensure_topics
from lepton_common.kafka_intake import Intake
from lepton_common.kafka_sender import Sender
from lepton_common.mirror import Mirror
from lepton_common.records import SERVING, WORKERS, Serving, WorkerState
from lepton_common.service import Service, run
from lepton_common.telemetry import Telemetry, configure
from lepton_common.topics import REQUESTS

from lepton_gateway.admission import Admission
from lepton_gateway.api import Api
from lepton_gateway.async_inference import GROUP, AsyncInference
from lepton_gateway.async_room import Room, yield_to_callers
from lepton_gateway.callers import Callers
from lepton_gateway.lanes import MOST_UNDER_WAY
from lepton_gateway.logs import LogSettings
from lepton_gateway.metrics import Metrics, metrics_page
from lepton_gateway.proxy import Proxy
from lepton_gateway.quotas import SHARE_EVERY_S, SWEEP_EVERY_S, Quotas, watch_over
from lepton_gateway.reporter import Reporter
from lepton_gateway.repository import Repository
from lepton_gateway.routes import Routes
from lepton_gateway.rpc_api import RpcApi
from lepton_gateway.settings import Settings
from lepton_gateway.shadows import MAX_COPIES, Shadows
from lepton_gateway.tracing import Tracing
from lepton_gateway.windows import Windows


def build(settings: Settings, telemetry: Telemetry, etcd: EtcdClient, windows: Windows) -> Service:
    """The whole service."""
    service = Service("gateway", settings, telemetry)
    workers = Mirror(etcd, WORKERS, WorkerState.model_validate_json)
    routes = Routes(workers.items, windows, settings.cache_bytes)
    serving = Mirror(etcd, SERVING, Serving.model_validate_json, routes.changed)
    upstream, shadow_upstream = upstreams(settings)
    shadows = Shadows(shadow_upstream, random.random)
    reporter = Reporter(windows, Producer(Bootstrap.parse(settings.kafka), "gateway"), settings.gateway_id)
    keys = guard(service, etcd, reporter.tell)
    callers = Callers(keys, keyless_loopback=settings.keyless_loopback)
    # Rollout and the workers are near: a proxy for the world outside must not see their callers' keys.
    http = httpx.AsyncClient(trust_env=False)
    logs = LogSettings(settings.log_level)
    logs.install()
    admission = Admission(windows.clock)
    quotas = Quotas(etcd, admission)
    proxy = Proxy(upstream, Tracing(telemetry.tracer, on=bool(settings.otlp)), logs, shadows, admission)
    repository = Repository(http, settings.rollout_url, routes)
    api = Api(routes, callers, proxy, repository, service.readiness)
    limits = ServerLimits(max_body_bytes=settings.max_body_bytes, max_buffered_bytes=settings.max_buffered_bytes)
    server = Server(api.handle, limits, screen=api.screen)
    mirrors = (keys.mirror, serving, workers)

    def etcd_stale_s() -> float:
        return max(mirror.stale_s(time.monotonic()) for mirror in mirrors)

    telemetry.registry.register(Metrics(routes, api.refused, server, reporter, etcd_stale_s, admission))
    service.on_close(etcd.close)
    service.background(etcd.check_version)
    service.on_close(quotas.share)
    service.on_close(reporter.close)
    service.on_close(shadow_upstream.close)
    service.on_close(upstream.close)
    service.on_close(http.aclose)
    service.background(serving.run)
    service.background(workers.run)
    for mirror in mirrors:
        service.prepare(mirror.synced)
    service.background(reporter.run)
    service.background(partial(watch_over, admission))
    service.every(SHARE_EVERY_S, quotas.share)
    service.every(SWEEP_EVERY_S, quotas.sweep)
    hear_requests(service, settings, api, callers, keys, admission)
    listen(service, settings, server, RpcApi(api.handle, callers, service.readiness, settings.max_body_bytes))
    return service


def upstreams(settings: Settings) -> tuple[Upstream, Upstream]:
    """The mesh for requests, and for copies."""
    host, _, port = settings.mesh.rpartition(":")
    limits, of_copies = (UpstreamLimits(max_connections=most) for most in (MOST_UNDER_WAY, MAX_COPIES))
    return Upstream(host, int(port), limits), Upstream(host, int(port), of_copies)


def listen(service: Service, settings: Settings, server: Server, rpc: RpcApi) -> None:
    """HTTP and gRPC are answered, and apart from them whoever looks at the metrics."""
    service.serve(server)
    service.serve(http2.Server(rpc.handle), port=settings.grpc_port)
    admin = Server(metrics_page(service.telemetry.render_metrics))
    service.serve(admin, host=settings.admin_host, port=settings.admin_port)


def hear_requests(
    service: Service, settings: Settings, api: Api, callers: Callers, keys: Keys, admission: Admission
) -> None:
    """What is asked for over Kafka is answered there."""
    bootstrap = Bootstrap.parse(settings.kafka)
    results, elsewhere = (Sender(Producer(bootstrap, f"gateway-{name}")) for name in ("results", "replies"))
    room = Room(settings.async_concurrency, time.monotonic)
    inference = AsyncInference(
        api.handle,
        results.send,
        elsewhere.send,
        room,
        service.telemetry.registry,
        tenant_of=callers.tenant_of,
        timeout_s=settings.async_timeout_s,
        reply_topics=[each for each in settings.reply_topics.split(",") if each],
    )
    intake = Intake(bootstrap, REQUESTS.name, GROUP, inference.handle, room.size, instance=settings.instance)

    async def hear() -> None:
        await keys.mirror.synced()  # Whose a message is decides about the id of its outcome.
        await intake.run()

    service.on_close(results.close)
    service.on_close(elsewhere.close)
    service.background(hear)
    service.background(partial(yield_to_callers, room, lambda: admission.has_callers))


def main() -> None:
    """The process: runs until SIGTERM."""
    settings = Settings.read()
    telemetry = configure("gateway", settings)
    service = build(settings, telemetry, EtcdClient(settings.etcd), Windows(time.time))
    # Beside all else: inference goes on without Kafka.
    service.background(partial(ensure_topics, settings.kafka))
    run(service)


if __name__ == "__main__":
    main()
