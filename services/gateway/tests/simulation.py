"""Admission before simulated workers, in simulated time: what comes out is the same each time."""

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from random import Random

from lepton_common.auth import Caller
from lepton_common.errors import LeptonError
from lepton_common.records import Limits, Scope
from lepton_gateway.admission import Admission
from lepton_gateway.lanes import Answer, Lane, Ticket
from lepton_gateway.limits import Use

_HOP_S = 0.0003
_EXPIRE_EVERY_S = 0.02


@dataclass
class Told:
    """What became of one tenant's requests that came after the warm-up."""

    offered: int = 0
    latencies: list[float] = field(default_factory=list)  # of those answered, from the door
    late: int = 0  # of those answered, after their deadline
    refused_at_door: int = 0
    given_up: int = 0  # by the gateway or the worker, once their time was up

    @property
    def in_time(self) -> int:
        return len(self.latencies) - self.late

    def quantile(self, share: float) -> float:
        return sorted(self.latencies)[int(len(self.latencies) * share)]


@dataclass(frozen=True)
class Traffic:
    """Requests of one tenant for a model of its own: Poisson arrivals, a batch of n takes alpha + n * beta."""

    tenant: str
    per_s: float
    timeout_s: float
    alpha_s: float
    beta_s: float = 0.0
    max_rows: int = 1
    background: bool = False


class Simulation:
    """`cores` run batches, of the models in turn."""

    def __init__(self, cores: int, *, warm_up_s: float = 5.0, seed: int = 0) -> None:
        self.now = 0.0
        self.admission = Admission(lambda: self.now)
        self.told: dict[str, Told] = {}
        self.longest_queue = 0
        self._warm_up_s = warm_up_s
        self._chance = Random(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._free = cores
        self._queues: dict[Traffic, deque[_Request]] = {}

    def run(self, seconds: float, *traffic: Traffic) -> dict[str, Told]:
        for each in traffic:
            self.told[each.tenant] = Told()
            self._queues[each] = deque()
            self._arrive_from(_Source(self, each))
        self._expire()
        while self._events and self.now < seconds:
            self.now, _, action = heapq.heappop(self._events)
            action()
        return self.told

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + seconds, self._count, action))

    def _arrive_from(self, source: "_Source") -> None:
        def arrive() -> None:
            source.arrive()
            self.longest_queue = max(self.longest_queue, *(pool.queue.size for pool in self.admission.pools.values()))
            self._arrive_from(source)

        self.later(self._chance.expovariate(source.traffic.per_s), arrive)

    def _expire(self) -> None:
        self.admission.expire(self.now)
        self.later(_EXPIRE_EVERY_S, self._expire)

    # --- the workers ---

    def reached_worker(self, request: "_Request") -> None:
        request.reached = self.now
        self._queues[request.source.traffic].append(request)
        self._dispatch()

    def _dispatch(self) -> None:
        while self._free and (batch := next(self._batches(), None)):
            self._free -= 1
            traffic = batch[0].source.traffic
            noise = self._chance.lognormvariate(0, 0.2)
            self.later((traffic.alpha_s + traffic.beta_s * len(batch)) * noise, partial(self._ran, batch))
            for request in batch:
                request.queued_s = self.now - request.reached

    def _batches(self) -> Iterator[list["_Request"]]:
        for traffic, queue in list(self._queues.items()):
            while queue and queue[0].deadline <= self.now:
                queue.popleft().expired()
            batch = [queue.popleft() for _ in range(min(len(queue), traffic.max_rows))]
            if batch:
                self._queues[traffic] = self._queues.pop(traffic)  # The models take turns.
                yield batch

    def _ran(self, batch: list["_Request"]) -> None:
        self._free += 1
        self._dispatch()
        for request in batch:
            self.later(_HOP_S, request.answered)

    @property
    def is_warm(self) -> bool:
        return self.now >= self._warm_up_s


class _Source:
    def __init__(self, simulation: Simulation, traffic: Traffic) -> None:
        self.simulation = simulation
        self.traffic = traffic
        self.lane = Lane(
            simulation.admission.pool("cpu"), traffic.tenant, Use("the model", Limits(max_concurrency=100_000))
        )
        self.caller = Caller(traffic.tenant, frozenset({Scope.INFER}), f"key of {traffic.tenant}", "")

    def arrive(self) -> None:
        simulation = self.simulation
        told = self.told
        told.offered += 1
        try:
            simulation.admission.enter(_Request(self), self.caller)
        except LeptonError:
            told.refused_at_door += 1

    @property
    def told(self) -> Told:
        return self.simulation.told[self.traffic.tenant] if self.simulation.is_warm else Told()


class _Request(Ticket):
    def __init__(self, source: _Source) -> None:
        simulation, traffic = source.simulation, source.traffic
        super().__init__(traffic.tenant, source.lane, 1000, simulation.now, simulation.now + traffic.timeout_s)
        self.background = traffic.background
        self.source = source
        self.reached = self.queued_s = 0.0

    def start(self) -> None:
        self.source.simulation.later(_HOP_S, lambda: self.source.simulation.reached_worker(self))

    def refuse(self, error: LeptonError) -> None:
        self.source.told.given_up += 1

    def expired(self) -> None:
        self.source.told.given_up += 1
        self.over(self.source.simulation.now - (self.sent or 0.0) - self.lane.service.run_s.value, served=False)

    def answered(self) -> None:
        now = self.source.simulation.now
        told = self.source.told
        told.latencies.append(now - self.arrived)
        told.late += now > self.deadline
        self.over(self.queued_s if self.queued_s >= 0.001 else 0.0, served=True)

    def over(self, queued_s: float, *, served: bool) -> None:
        simulation = self.source.simulation
        assert self.sent is not None
        answer = Answer(simulation.now - self.sent, queued_s, self.source.traffic.timeout_s, served)
        simulation.admission.leave(self.lane, self, simulation.now, answer if self.lane.listens else None)
