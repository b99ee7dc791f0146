"""Requests that wait for their turn: fair between tenants, interactive before background. Pure: times are arguments."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

# Of the time of a pool that both want: what waits for nobody leaves background a twentieth.
_BACKGROUND_SHARE = 0.05


class Entry:
    """A request that may wait. `group` is what can be short of room by itself, such as its model."""

    __slots__ = ("background", "cost_s", "deadline", "group", "size_bytes", "tenant")

    def __init__(self, tenant: str, group: Hashable, size_bytes: int, deadline: float) -> None:
        self.tenant = tenant
        self.group = group
        self.size_bytes = size_bytes
        self.deadline = deadline
        self.background = False
        self.cost_s = 0.0  # how long it will take a place, as far as anyone knows


E = TypeVar("E", bound=Entry)


class _Flow(Generic[E]):
    """What waits of one tenant, in the order of arrival within each group. `start` is the virtual time of its turn."""

    __slots__ = ("groups", "size", "size_bytes", "start")

    def __init__(self, start: float) -> None:
        self.start = start
        self.groups: OrderedDict[Hashable, OrderedDict[E, None]] = OrderedDict()
        self.size = 0
        self.size_bytes = 0

    def first(self, has_room: Callable[[E], bool]) -> E | None:
        """The oldest of the first group that has room. Groups take turns."""
        for group, entries in self.groups.items():
            entry = next(iter(entries))
            if has_room(entry):
                self.groups.move_to_end(group)
                return entry
        return None

    def add(self, entry: E) -> None:
        self.groups.setdefault(entry.group, OrderedDict())[entry] = None
        self._count(entry, 1)

    def forget(self, entry: E) -> None:
        entries = self.groups[entry.group]
        del entries[entry]
        if not entries:
            del self.groups[entry.group]
        self._count(entry, -1)

    def _count(self, entry: E, sign: int) -> None:
        self.size += sign
        self.size_bytes += sign * entry.size_bytes


class FairQueue(Generic[E]):
    """Start-time fair queueing (Goyal, Vin and Cheng 1996) of tenants, by the seconds that their requests take.

    A tenant that asks for less than its share is served at once, whatever waits of the others.
    """

    def __init__(self) -> None:
        self.size = 0
        self.size_bytes = 0
        self.turn = 0.0  # the virtual time of the class, see `Queue`
        self._virtual = 0.0
        self._flows: dict[str, _Flow[E]] = {}
        self._waiting: dict[str, _Flow[E]] = {}

    def add(self, entry: E) -> None:
        flow = self._flows.get(entry.tenant)
        if flow is None:
            flow = self._flows[entry.tenant] = _Flow(self._virtual)
        if flow.size == 0:
            flow.start = max(flow.start, self._virtual)
            self._waiting[entry.tenant] = flow
        flow.add(entry)
        self._count(entry, 1)

    def take(self, has_room: Callable[[E], bool]) -> E | None:
        """The next entry that has room, taken out."""
        for flow in sorted(self._waiting.values(), key=lambda each: each.start):
            entry = flow.first(has_room)
            if entry is not None:
                self._virtual = flow.start
                flow.start += entry.cost_s
                self.forget(entry)
                return entry
        return None

    def forget(self, entry: E) -> None:
        """The entry no longer waits."""
        flow = self._flows[entry.tenant]
        flow.forget(entry)
        self._count(entry, -1)
        if flow.size == 0:
            del self._waiting[entry.tenant]
            if not self._waiting:
                # Nobody waits, so nobody is ahead of the others.
                self._flows.clear()
                self._virtual = 0.0

    def late(self, now: float) -> list[E]:
        """Those whose time is up, taken out."""
        entries = [
            entry
            for flow in self._waiting.values()
            for group in flow.groups.values()
            for entry in group
            if entry.deadline <= now
        ]
        for entry in entries:
            self.forget(entry)
        return entries

    def of(self, tenant: str) -> tuple[int, int]:
        """How many wait of the tenant, and their bytes."""
        flow = self._waiting.get(tenant)
        return (0, 0) if flow is None else (flow.size, flow.size_bytes)

    def _count(self, entry: E, sign: int) -> None:
        self.size += sign
        self.size_bytes += sign * entry.size_bytes


class Queue(Generic[E]):
    """Two classes of entries before one pool. Where both wait, background gets a small share of the pool's time."""

    def __init__(self) -> None:
        self.interactive = FairQueue[E]()
        self.background = FairQueue[E]()

    @property
    def size(self) -> int:
        return self.interactive.size + self.background.size

    @property
    def size_bytes(self) -> int:
        return self.interactive.size_bytes + self.background.size_bytes

    def of(self, entry: E) -> FairQueue[E]:
        return self.background if entry.background else self.interactive

    def add(self, entry: E) -> None:
        queue = self.of(entry)
        if queue.size == 0:
            # Whoever comes back has saved nothing up.
            queue.turn = max(queue.turn, self._other(queue).turn)
        queue.add(entry)

    def take(self, has_room: Callable[[E], bool]) -> E | None:
        """The next entry that has room, taken out; None when none has any."""
        first = self.background if self.background.turn < self.interactive.turn else self.interactive
        for queue in (first, self._other(first)):
            entry = queue.take(has_room) if queue.size else None
            if entry is not None:
                share = _BACKGROUND_SHARE if entry.background else 1 - _BACKGROUND_SHARE
                queue.turn += entry.cost_s / share
                return entry
        return None

    def forget(self, entry: E) -> None:
        """The entry no longer waits."""
        self.of(entry).forget(entry)

    def late(self, now: float) -> list[E]:
        """Those whose time is up, taken out."""
        return [*self.interactive.late(now), *self.background.late(now)]

    def _other(self, queue: FairQueue[E]) -> FairQueue[E]:
        return self.background if queue is self.interactive else self.interactive
