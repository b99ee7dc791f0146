"""A service as a list of what it does; `run` starts it, keeps it going and ends it in order."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import stamina
import structlog
import uvloop
from prometheus_client import Counter, Gauge

from lepton_common.auth import Caller, Keys, secret_of
from lepton_common.bus import Bus
from lepton_common.errors import Denied, Unauthenticated, Unavailable
from lepton_common.events import Event
from lepton_common.foreign import Message
from lepton_common.health import Check, Readiness
from lepton_common.outbox import Relay
from lepton_common.records import Scope
from lepton_common.settings import Settings
from lepton_common.telemetry import Telemetry

if TYPE_CHECKING:  # Gateway and worker have no database and no app, and never load what those need.
    from starlette.types import ASGIApp

    from lepton_common.db import Database, Tx

E = TypeVar("E", bound=Event)
Work = Callable[[], Awaitable[object]]

# Longer than any event is kept, so that a replay of a whole topic still finds what was handled.
_REMEMBER_HANDLED_DAYS = 35
_FORGET_EVERY_S = 3600.0
_FIRST_BACKOFF_S = 0.1
_LAST_BACKOFF_S = 10.0
_HEALTHY_AFTER_S = 30.0
_CLOSE_S = 5.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Server(Protocol):
    """An HTTP server: `http11.Server`, or a FastAPI app on uvicorn."""

    @property
    def address(self) -> tuple[str, int]: ...

    async def start(self, host: str, port: int) -> None: ...

    async def drain(self, grace_s: float) -> None: ...


class Service:
    """What a service hears, does and serves. Nothing starts before `run`."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        telemetry: Telemetry,
        *,
        db: "Database | None" = None,
        bus: Bus | None = None,
    ) -> None:
        self.name = name
        self.settings = settings
        self.telemetry = telemetry
        self.readiness = Readiness()
        self._db = db
        self._bus = bus
        self._hears = False
        self._servers: list[tuple[Server, str, int]] = []
        self._prepares: list[Work] = []
        self._background: list[Work] = []
        self._periodic: list[tuple[float, Work]] = []
        self._closes: list[Work] = []
        tasks = Gauge(f"lepton_{name}_tasks", "Tasks of the event loop.", registry=telemetry.registry)
        tasks.set_function(lambda: len(asyncio.all_tasks()))
        self._failures = Counter(
            f"lepton_{name}_task_failures",
            "Failures of background and periodic work, which goes on.",
            ["task"],
            registry=telemetry.registry,
        )

    def decide(
        self,
        kind: type[E],
        handler: "Callable[[E, Tx], Awaitable[None]]",
        *,
        keyed: bool = False,
        after: Callable[[], None] | None = None,
    ) -> None:
        """Each event of that kind takes effect once: `handler` and the note that it ran are one transaction.

        `keyed`: the handler writes rows that are keyed by what the event is about, so that a repeat changes nothing and
        no note is kept: for events by the second. `after` is called once the transaction is committed.
        """
        if self._db is None or self._bus is None:
            raise ValueError(f"{self.name} cannot hear {kind.__name__}: it has no database or no bus")
        db, consumer = self._db, self.name

        async def handle(event: E) -> None:
            async with db.transaction() as tx:
                if keyed or await tx.first_time(consumer, event.id):
                    await handler(event, tx)
            if after:
                after()

        self._bus.subscribe(kind, handle)
        self._hears = True

    def hear(
        self,
        topic: str,
        keys: Keys,
        scope: Scope,
        handler: "Callable[[Message, Caller, Tx], Awaitable[None]]",
        *,
        after: Callable[[], None] | None = None,
    ) -> None:
        """Each message that foreign producers write to the topic takes effect once, if its key has the scope.

        As `decide`; what the handler raises for good, and a key that does not allow it, makes a dead letter of it.
        """
        if self._db is None or self._bus is None:
            raise ValueError(f"{self.name} cannot hear {topic}: it has no database or no bus")
        # Its notes are of their own: who repeats a message may do so late.
        db, consumer = self._db, f"{self.name} {topic}"

        async def handle(message: Message) -> None:
            try:
                secret = secret_of(message.authorization, None)
                if not secret:
                    raise Unauthenticated("no key: send the header authorization: Bearer lp_…")
                caller = keys.check(secret, scope, datetime.now(UTC))
                async with db.transaction() as tx:
                    if await tx.first_time(consumer, message.uuid(caller.tenant)):
                        await handler(message, caller, tx)
            except Denied as error:
                keys.journal.refused(error, "kafka", topic)
                raise
            if after:
                after()

        self._bus.hear(topic, handle)
        self._hears = True

    def prepare(self, work: Work) -> None:
        """`work` is done before the service is ready, in the order given, and again while it raises Unavailable."""
        self._prepares.append(work)

    def every(self, seconds: float, work: Work) -> None:
        """`work` runs once the service is prepared, then `seconds` after each end. A failure is logged and counted."""
        self._periodic.append((seconds, work))

    def background(self, work: Work) -> None:
        """`work` runs from the start, beside `prepare`. When it fails it is started again, after a growing pause."""
        self._background.append(work)

    def web(self, app: "ASGIApp") -> None:
        """The app is served on uvicorn. It must answer 503 until `readiness.started` (`web.create_app` sees to it)."""
        from lepton_common.app_server import AppServer  # Gateway and worker never load uvicorn.

        self.serve(AppServer(app))

    def serve(self, server: Server, *, host: str | None = None, port: int | None = None) -> None:
        """The server is started first of all, so that the service is live at once, and drained first of all. `host` and
        `port` are for a service's further ones."""
        own = self.settings
        self._servers.append((server, own.host if host is None else host, own.port if port is None else port))

    def on_close(self, work: Work) -> None:
        """`work` is done at the end, after all that was registered later."""
        self._closes.append(work)

    def ready(self, name: str, check: Check) -> None:
        """The service is ready only while `check` returns None; otherwise it returns the reason."""
        self.readiness.add(name, check)

    async def run(self, stop: asyncio.Event) -> None:
        """Serves until `stop` is set, then ends in order. Raises what ended it early, after ending in order too."""
        working = asyncio.create_task(self._work())
        stopping = asyncio.create_task(stop.wait())
        try:
            for server, host, port in self._servers:
                await server.start(host, port)
                _log.info("listening", address="{}:{}".format(*server.address))
            await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.readiness.draining = True
            stopping.cancel()
            await self._close(working)
        # What does not end although it was cancelled is left behind: the process ends anyway.
        if working.done() and not working.cancelled() and (error := working.exception()):
            raise error
        if not stop.is_set():
            raise RuntimeError("its work was cancelled from inside")

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            for work in self._background:
                group.create_task(self._keep_going(work))
            for work in self._prepares:
                await self._until_available(work)
            if self._db and self._bus:
                relay = Relay(self._db, self._bus, self.name, self.telemetry.registry)
                group.create_task(self._keep_going(relay.run))
            if self._bus and self._hears:
                group.create_task(self._keep_going(self._bus.run))
                group.create_task(self._repeat(_FORGET_EVERY_S, self._forget_handled))
            for seconds, work in self._periodic:
                group.create_task(self._repeat(seconds, work))
            self.readiness.started = True
            _log.info("ready")
            await asyncio.Event().wait()

    async def _until_available(self, work: Work) -> None:
        reason: str | None = None
        self.readiness.add(_name(work), lambda: reason)
        async for attempt in stamina.retry_context(
            on=Unavailable, attempts=None, timeout=None, wait_initial=0.1, wait_max=2.0
        ):
            with attempt:
                try:
                    await work()
                except Unavailable as error:
                    reason = error.message
                    raise
        reason = None

    async def _keep_going(self, work: Work) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while True:
            began = time.monotonic()
            if await self._attempted(work):
                return
            if time.monotonic() - began > _HEALTHY_AFTER_S:
                backoff_s = _FIRST_BACKOFF_S
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)

    async def _repeat(self, seconds: float, work: Work) -> None:
        while True:
            await self._attempted(work)
            await asyncio.sleep(seconds)

    async def _attempted(self, work: Work, timeout_s: float | None = None) -> bool:
        """Whether the work came to its end in time. What it fails with, whatever it is, is logged and counted."""
        try:
            async with asyncio.timeout(timeout_s):
                await work()
            return True
        except asyncio.CancelledError:
            # Unless we are told to end, a library let it out of a future that it gave up itself, as aiokafka does when
            # its coordinator goes away: a task group would take that for an end and say nothing.
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            self._failed(work)
        except Exception:  # It is started again, or others go on without it.
            self._failed(work)
        return False

    def _failed(self, work: Work) -> None:
        self._failures.labels(_name(work)).inc()
        _log.exception("task failed", task=_name(work))

    async def _forget_handled(self) -> None:
        assert self._db is not None
        async with self._db.transaction() as tx:
            await tx.execute(
                "DELETE FROM handled WHERE at < now() - make_interval(days => :days)", {"days": _REMEMBER_HANDLED_DAYS}
            )

    async def _close(self, working: asyncio.Task[None]) -> None:
        grace_s = self.settings.drain_s
        drains = (partial(server.drain, grace_s) for server, _, _ in self._servers)
        await asyncio.gather(*(self._attempted(drain, grace_s + _CLOSE_S) for drain in drains))
        working.cancel()
        await asyncio.wait({working}, timeout=_CLOSE_S)
        resources = [self._bus.close] if self._bus else []
        if self._db:
            resources.append(self._db.close)
        for work in (*reversed(self._closes), *resources):
            await self._attempted(work, _CLOSE_S)


def run(service: Service) -> None:
    """The process is this service until SIGTERM or SIGINT. Then it drains and closes; exit status 1 after an error."""

    async def until_signal() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, stop.set)
        await service.run(stop)

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(until_signal())
    except Exception:  # The last one to hear of it: told as the logs are, not as a traceback.
        _log.exception("ended by an error")
        raise SystemExit(1) from None
    finally:
        service.telemetry.close()


def _name(work: Work) -> str:
    inner = getattr(work, "func", work)  # what functools.partial wraps
    return str(getattr(inner, "__qualname__", inner))
