"""monitor's rules and tables on a real database, without the service around them: time passes as a test says."""

from functools import partial

from lepton_common.db import Database
from lepton_common.events import InferenceWindow, WindowClosed, decode
from lepton_monitor.closing import Closing
from lepton_monitor.handlers import Measures, on_inference_window
from lepton_monitor.runner import History, Marking
from prometheus_client import CollectorRegistry

from .stand_ins import Clock, LoopBus


class Lab:
    """One replica, or another on the same database: nothing but the database is shared."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self.db = db
        self.clock = clock
        self.bus = LoopBus()
        self.registry = CollectorRegistry()
        closing = Closing()
        self.history = History(db, closing, {"seconds": 3600, "minutes": 30 * 86_400, "labels": 90 * 86_400}, clock)
        self.marking = Marking(db, self.bus, clock)
        self._handle = partial(on_inference_window, closing=closing, measures=Measures(self.registry), now=clock)

    async def hear(self, *events: InferenceWindow) -> None:
        """As `Service.decide` does it."""
        for event in events:
            async with self.db.transaction() as tx:
                if await tx.first_time("monitor", event.id):
                    await self._handle(event, tx)

    async def mark(self) -> list[int]:
        """What is due at this time is marked, and the markers have come back; returns their seconds."""
        before = len(self.bus.events)
        await self.marking.mark()
        markers = [event for event in self.bus.events[before:] if isinstance(event, InferenceWindow)]
        await self.hear(*markers)
        return [marker.second for marker in markers]

    async def closed(self) -> list[WindowClosed]:
        """What the outbox holds, in order."""
        async with self.db.transaction() as tx:
            rows = (await tx.execute("SELECT type, payload FROM outbox ORDER BY seq")).all()
        events = [decode(kind, payload) for kind, payload in rows]
        assert all(isinstance(event, WindowClosed) for event in events)
        return [event for event in events if isinstance(event, WindowClosed)]

    async def rows(self, statement: str) -> list[tuple[object, ...]]:
        async with self.db.transaction() as tx:
            return [tuple(row) for row in await tx.execute(statement)]

    def counted(self, name: str) -> float:
        return self.registry.get_sample_value(f"lepton_monitor_{name}") or 0
