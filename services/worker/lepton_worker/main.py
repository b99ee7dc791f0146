"""worker runs model versions: those that etcd assigns to its pool, on CPU or GPU.

hears: etcd /lepton/serving (rollout)
says:  etcd /lepton/workers/{id}, under a lease
owns:  its lease, a folder of cached artifacts
"""

import asyncio
import gc
import time
from collections.abc import Callable

from lepton_common.blobs import Blobs
from lepton_common.etcd import EtcdClient
from lepton_common.http11 import Server, ServerLimits
from lepton_common.mirror import Mirror
from lepton_common.records import SERVING, Serving, WorkerState
from lepton_common.service import Service, run
from lepton_common.telemetry import Telemetry, configure

from lepton_worker import engine
from lepton_worker.api import OVERLOADED, Api
from lepton_worker.assignments import Assignments, Resources
from lepton_worker.cache import Cache
from lepton_worker.metrics import Metrics
from lepton_worker.presence import Presence
from lepton_worker.settings import Settings, available_cores
from lepton_worker.trial import Trial

# One copies its inputs while the other computes.
_GPU_INSTANCES = 2
# Of the time for draining: how long the mesh gets to hear of it before connections are closed.
_NOTICE_SHARE = 0.2


class Front:
    """The worker's server. Draining, it first lets the mesh take this worker out, answering all the while."""

    def __init__(self, server: Server) -> None:
        self.listening = asyncio.Event()
        self.on_drain: Callable[[], None] = lambda: None
        self._server = server

    @property
    def address(self) -> tuple[str, int]:
        return self._server.address

    async def start(self, host: str, port: int) -> None:
        await self._server.start(host, port)
        self.listening.set()

    async def drain(self, grace_s: float) -> None:
        self.on_drain()
        await asyncio.sleep(grace_s * _NOTICE_SHARE)
        await self._server.drain(grace_s * (1 - _NOTICE_SHARE))


def build(settings: Settings, telemetry: Telemetry, etcd: EtcdClient) -> Service:
    """The whole service."""
    service = Service("worker", settings, telemetry)
    device = engine.device()
    mirror = Mirror(etcd, SERVING, Serving.model_validate_json, lambda key, record: assignments.reconsider())
    assignments = Assignments(
        mirror.items,
        settings.pool,
        Cache(settings.cache, settings.cache_bytes, Blobs(settings.blobs)),
        Trial(settings.intra_op_threads, settings.load_timeout_s),
        Resources(
            settings.instances or (_GPU_INSTANCES if device == "cuda" else available_cores()),
            settings.intra_op_threads,
        ),
    )
    tracer = telemetry.tracer if settings.otlp else None
    api = Api(assignments, service.readiness, telemetry.render_metrics, device, settings.max_body_bytes, tracer)
    limits = ServerLimits(max_body_bytes=settings.max_body_bytes, max_buffered_bytes=settings.max_buffered_bytes)
    server = Server(api.handle, limits, no_room_headers=OVERLOADED)
    front = Front(server)

    def state() -> WorkerState:
        host, port = front.address
        return WorkerState(
            id=settings.worker_id,
            pool=settings.pool,
            address=f"{settings.advertise_host or host}:{port}",
            device=device,
            draining=service.readiness.draining,
            versions=assignments.views(),
        )

    presence = Presence(etcd, state)
    assignments.on_change = presence.changed

    front.on_drain = presence.changed

    async def assign() -> None:
        await mirror.synced()
        await assignments.run()

    async def announce() -> None:
        await front.listening.wait()
        await presence.run()

    telemetry.registry.register(
        Metrics(assignments.lanes, assignments.views, server.room, lambda: mirror.stale_s(time.monotonic()))
    )
    service.on_close(etcd.close)
    service.background(etcd.check_version)
    service.background(mirror.run)
    service.background(assign)
    service.background(announce)
    service.prepare(mirror.synced)
    service.serve(front)
    service.ready("versions", assignments.not_ready)
    return service


def main() -> None:
    """The process: runs until SIGTERM."""
    settings = Settings.read()
    telemetry = configure("worker", settings)
    # Requests leave no cycles behind: the collector has little to do, and less when it skips what is here already.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    run(build(settings, telemetry, EtcdClient(settings.etcd)))


if __name__ == "__main__":
    main()
