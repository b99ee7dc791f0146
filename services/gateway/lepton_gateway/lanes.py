"""The way of one model's requests into one pool of workers: the places they take, and how long they take them. Pure."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from weakref import WeakValueDictionary

from lepton_common.errors import LeptonError

from lepton_gateway.concurrency import Concurrency, Service
from lepton_gateway.fairness import Entry, Queue
from lepton_gateway.limits import Use

# A pool has so many places, a model half of them, until they turn out too many.
_POOL_PLACES = 512
# With what goes beyond the places, see `Part`: so many connections into the mesh, or requests would wait for one.
MOST_UNDER_WAY = 2 * _POOL_PLACES
_MODEL_PLACES = 256
_BACKGROUND_PLACES = 64
_LEAST_PLACES = 2
# Nobody notices such a wait at the worker, however short the run. Background work yields at a fourth of what others may
# wait (as LEDBAT does, RFC 6817).
_UNNOTICED_S = 0.005
# Nor may it be more than this share of the time that the caller gives.
_SHARE_OF_TIMEOUT = 0.125
_YIELDING = 0.25
_LEAST_COST_S = 0.0001
_SMOOTHING = 0.1
_HEARD_ONE_IN = 32


@dataclass(frozen=True, slots=True)
class Answer:
    """How a request went that was answered `seconds` after it was sent.

    Of these it waited `queued_s` at the worker; `timeout_s` is what its caller gave it. `served`: as asked.
    """

    seconds: float
    queued_s: float
    timeout_s: float
    served: bool = True


class Ticket(Entry, ABC):
    """A request that could not be let through without a look. Subclasses say what happens at its turn."""

    __slots__ = ("arrived", "before", "key", "lane", "sent")

    def __init__(self, tenant: str, lane: "Lane", size_bytes: int, arrived: float, deadline: float) -> None:
        super().__init__(tenant, lane, size_bytes, deadline)
        self.lane = lane
        self.key: Use | None = None
        self.arrived = arrived
        self.before = 0  # how many of its lane and class had started when it began to wait
        self.sent: float | None = None

    @abstractmethod
    def start(self) -> None:
        """It is its turn. `Admission.leave` is to be called when it is over."""

    @abstractmethod
    def refuse(self, error: LeptonError) -> None:
        """It has waited in vain."""


class Pool:
    """One pool of workers, as this gateway sees it. `waiting` is how many its queue has, `busy` how many tenants have
    requests under way."""

    __slots__ = ("_parts", "background", "busy", "is_pumping", "places", "queue", "waiting")

    def __init__(self) -> None:
        self.places = Concurrency(_POOL_PLACES, _LEAST_PLACES, _POOL_PLACES)
        self.background = Concurrency(_BACKGROUND_PLACES, 1, _POOL_PLACES)
        self.queue = Queue[Ticket]()
        self.waiting = 0
        self.is_pumping = False
        self.busy = 0
        self._parts: WeakValueDictionary[str, Part] = WeakValueDictionary()

    def part(self, tenant: str) -> "Part":
        """What the tenant has of the places."""
        part = self._parts.get(tenant)
        if part is None:
            part = self._parts[tenant] = Part(self)
        return part


class Part:
    """What one tenant has of a pool's places."""

    __slots__ = ("__weakref__", "_pool", "in_flight")

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.in_flight = 0

    @property
    def is_small(self) -> bool:
        """Whether the tenant has less than its part, were the places divided between those that have some.

        Who has more need not be waited for then: their requests may take long, and come back only together. All in all
        no more than twice the places may be taken so.
        """
        pool = self._pool
        return self.in_flight * pool.busy < pool.places.value and pool.places.free > -pool.places.value

    def enter(self) -> None:
        """A request of the tenant starts."""
        self._pool.places.free -= 1
        if self.in_flight == 0:
            self._pool.busy += 1
        self.in_flight += 1

    def leave(self) -> None:
        """One is over."""
        self._pool.places.free += 1
        self.in_flight -= 1
        if self.in_flight == 0:
            self._pool.busy -= 1


class Lane:
    """One model in one pool. `waiting` are its requests in the pool's queue: interactive, background.

    `listens`: how the next answer went is wanted. While all is calm that is one in 32, and costs the others nothing;
    while requests wait, here or at the worker, it is every one.
    """

    __slots__ = (
        *("_intervals_s", "_starts", "listens", "model", "part", "places", "pool", "service", "unheard", "waiting"),
    )

    def __init__(self, pool: Pool, tenant: str, model: Use) -> None:
        self.pool = pool
        self.part = pool.part(tenant)
        self.model = model
        self.places = Concurrency(_MODEL_PLACES, _LEAST_PLACES, _POOL_PLACES)
        self.service = Service()
        self.waiting = [0, 0]
        self._starts = [0, 0]
        # Between two starts while somebody waits, measured: whatever it is that lets them wait.
        self._intervals_s = [0.0, 0.0]
        self.listens = True
        self.unheard = 0

    @property
    def expected_s(self) -> float:
        """How long a request takes once it has started.

        One that would be alone is not judged by others: else none would start, and nothing better ever be known.
        """
        return self.service.expected_s if self.places.in_flight else 0.0

    def has_room(self, ticket: Ticket) -> bool:
        """Whether the request may start. Where not, what it is short of knows."""
        pool = self.pool
        if self.places.free <= 0:
            self.places.is_short = True
        elif pool.places.free <= 0 and (ticket.background or not self.part.is_small):
            pool.places.is_short = True
        elif ticket.background and pool.background.free <= 0:
            pool.background.is_short = True
        else:
            return True
        return False

    def wait_s(self, ticket: Ticket) -> float:
        """How long the request would wait for its turn if it came now."""
        interval_s = self._intervals_s[ticket.background] or self.service.mean_s / self.places.value
        return (self.waiting[ticket.background] + 1) * interval_s

    def take(self, ticket: Ticket) -> None:
        """The request has a place."""
        self.places.free -= 1
        self.part.enter()
        self.pool.background.free -= ticket.background
        self._starts[ticket.background] += 1

    def hear(self, now: float, answer: Answer, *, has_callers: bool) -> None:
        """How a request went. Where there are callers, background work yields to them."""
        pool, service = self.pool, self.service
        if answer.served:
            service.add(answer.seconds, answer.queued_s)
        run_s = service.run_s.value
        target_s = min(max(run_s, _UNNOTICED_S), answer.timeout_s * _SHARE_OF_TIMEOUT)
        self.places.observe(now, answer.queued_s, target_s, run_s)
        pool.places.observe(now, answer.queued_s, target_s, run_s)
        if pool.background.in_flight:
            yielding_s = target_s * _YIELDING if has_callers else target_s
            pool.background.observe(now, answer.queued_s, yielding_s, run_s)
        calm = answer.queued_s == 0 and pool.waiting == 0 and pool.background.in_flight == 0
        self.listens = not (calm and service.is_known)
        self.unheard = _HEARD_ONE_IN - 1

    def enqueue(self, ticket: Ticket) -> None:
        """The request waits for its turn."""
        self.listens = True
        ticket.cost_s = max(self.service.mean_s, _LEAST_COST_S)
        self.pool.queue.add(ticket)
        self.pool.waiting += 1
        self.waiting[ticket.background] += 1
        ticket.before = self._starts[ticket.background]

    def left(self, ticket: Ticket) -> None:
        """The request does not wait any more: the queue has let it go."""
        self.pool.waiting -= 1
        self.waiting[ticket.background] -= 1

    def waited(self, ticket: Ticket, now: float) -> None:
        """As `left`, since it was its turn."""
        self.left(ticket)
        interval_s = (now - ticket.arrived) / (self._starts[ticket.background] - ticket.before + 1)
        before_s = self._intervals_s[ticket.background] or interval_s
        self._intervals_s[ticket.background] = before_s + _SMOOTHING * (interval_s - before_s)
