"""Whether and when a request may go to the workers: the limits of its key and model, its deadline, its turn. Pure.

A request that finds room goes at once. Else it waits in its pool's queue (`fairness.py`), if it can be answered within
its deadline: the work ahead of it, over the number of places, plus what its model takes. What cannot is refused at the
door, with the time after which it could. A refusal is a 429 where caller, model or tenant is over a limit, else a 503.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from enum import StrEnum

from lepton_common.auth import NO_LIMITS, Caller
from lepton_common.errors import DeadlineExceeded, LeptonError, Limited, Overloaded

from lepton_gateway.lanes import Answer, Lane, Pool, Ticket
from lepton_gateway.limits import SECONDS_A_DAY, Use

# What may wait for a pool. A tenant may have as much as is still free beside it: one alone half, two a third each.
_MAX_WAITING = 4096
_MAX_WAITING_BYTES = 256 << 20
# How much longer the work ahead may take than it usually does.
_CAUTION = 1.25
# Who called within this time may call again.
_CALLED_LATELY_S = 1.0


class Reason(StrEnum):
    """Why a request was refused."""

    KEY_RATE = "key_rate"
    KEY_CONCURRENCY = "key_concurrency"
    KEY_QUOTA = "key_quota"
    MODEL_RATE = "model_rate"
    MODEL_CONCURRENCY = "model_concurrency"
    QUEUE_SHARE = "queue_share"
    QUEUE_FULL = "queue_full"
    DEADLINE = "deadline"
    EXPIRED = "expired"


class Admission:
    """Every request passes `enter`, and `leave` if it started. `clock` says Unix time, `now` is a monotonic one."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._keys: dict[str, Use] = {}
        self._pools: dict[str, Pool] = {}
        self.keys: Mapping[str, Use] = self._keys
        self.pools: Mapping[str, Pool] = self._pools
        self._asked = self._asked_before = 0  # requests that callers wait for, or waited
        self._called_at = -math.inf
        self.has_callers = False  # or had a moment ago: background work yields
        # By reason, and whether it was background work.
        self.refused: Counter[tuple[Reason, bool]] = Counter()

    def pool(self, name: str) -> Pool:
        pool = self._pools.get(name)
        if pool is None:
            pool = self._pools[name] = Pool()
        return pool

    def today(self) -> int:
        """In days since 1970, UTC."""
        return int(self._clock() // SECONDS_A_DAY)

    def passes(self, lane: Lane, caller: Caller, timeout_s: float) -> bool:
        """Whether a request starts at once, as nothing speaks against it: the calm state. Else `enter` is to decide."""
        places, all_places, model = lane.places, lane.pool.places, lane.model
        if (
            places.free > 0
            and all_places.free > 0
            and model.in_flight < model.most
            and model.is_plain
            and caller.limits is NO_LIMITS
            and timeout_s > lane.service.expected_s
        ):
            places.free -= 1
            lane.part.enter()
            model.in_flight += 1
            self._asked += 1
            return True
        return False

    def enter(self, ticket: Ticket, caller: Caller) -> None:
        """The request has started, or waits for its turn. Raises Limited or Overloaded when it is refused."""
        self._asked += not ticket.background
        key = self._keys.get(caller.key_id)
        if key is None:
            key = self._keys[caller.key_id] = Use("this API key", caller.limits)
        else:
            key.change(caller.limits)
        ticket.key = key
        lane, now = ticket.lane, ticket.arrived
        self._check_limits(ticket, key)
        has_room = lane.has_room(ticket)
        if has_room:
            wait_s = 0.0
        else:
            self._check_queue(ticket)
            wait_s = lane.wait_s(ticket) * _CAUTION
        if (late_s := wait_s + lane.expected_s - (ticket.deadline - now)) > 0:
            lane.listens = True  # It may be over sooner than a few answers would tell.
            rest = f"{_ms(wait_s)} ms of work are ahead of it"
            text = f"{lane.model.name} would answer {_ms(late_s)} ms after the deadline: {rest}"
            raise self._refused(ticket, Reason.DEADLINE, Overloaded(text, retry_after_s=max(wait_s, late_s)))
        key.take(now)
        lane.model.take(now)
        if has_room:
            self._start(ticket, now)
        else:
            lane.enqueue(ticket)

    def leave(self, lane: Lane, ticket: Ticket | None, now: float, answer: Answer | None) -> None:
        """A request that had started is over; `ticket` is None where it had passed.

        `answer` is how it went. None when nobody knows, or its lane does not listen.
        """
        pool = lane.pool
        lane.places.free += 1
        lane.part.leave()
        lane.model.in_flight -= 1
        if ticket is not None:
            pool.background.free += ticket.background
            if ticket.key is not None:
                ticket.key.in_flight -= 1
        if answer is not None:
            lane.hear(now, answer, has_callers=self.has_callers)
        elif not lane.listens:
            lane.unheard -= 1
            lane.listens = lane.unheard <= 0
        if pool.waiting:
            self._pump(pool, now)

    def withdraw(self, ticket: Ticket) -> None:
        """A caller that waited has left."""
        ticket.lane.pool.queue.forget(ticket)
        ticket.lane.left(ticket)
        self._forget(ticket)

    def expire(self, now: float) -> None:
        """Requests that wait and whose time is up hear so. To be called often."""
        if self._asked != self._asked_before:
            self._asked_before, self._called_at = self._asked, now
        self.has_callers = now - self._called_at < _CALLED_LATELY_S
        for pool in self._pools.values():
            for ticket in pool.queue.late(now):
                ticket.lane.left(ticket)
                self._give_up(ticket, now)
            self._pump(pool, now)

    def tidy(self, now: float) -> None:
        """What need not be remembered is forgotten. To be called now and then."""
        for key_id, key in list(self._keys.items()):
            if key.is_idle(now):
                del self._keys[key_id]

    def _check_limits(self, ticket: Ticket, key: Use) -> None:
        """Raises Limited when the key or the model is over one of its limits. Nothing is taken yet."""
        for use, busy, fast in (
            (key, Reason.KEY_CONCURRENCY, Reason.KEY_RATE),
            (ticket.lane.model, Reason.MODEL_CONCURRENCY, Reason.MODEL_RATE),
        ):
            if use.in_flight >= use.most:
                text = f"{use.name} has {use.most} requests under way, its limit"
                raise self._refused(ticket, busy, Limited(text, retry_after_s=ticket.lane.service.mean_s))
            if wait_s := use.wait_s(ticket.arrived):
                text = f"{use.name} is over its rate of {use.rate_per_s:g} requests/s"
                raise self._refused(ticket, fast, Limited(text, retry_after_s=wait_s))
        if key.day is not None and key.day.on(self.today()) >= (key.per_day or 0):
            text = f"{key.name} has used the {key.per_day} requests of its day, which ends at midnight UTC"
            left_s = SECONDS_A_DAY - self._clock() % SECONDS_A_DAY
            raise self._refused(ticket, Reason.KEY_QUOTA, Limited(text, retry_after_s=left_s))

    def _check_queue(self, ticket: Ticket) -> None:
        """Raises when the queue has no room for the request, or its tenant has more than its share of it."""
        queue = ticket.lane.pool.queue
        free, free_bytes = _MAX_WAITING - queue.size, _MAX_WAITING_BYTES - queue.size_bytes
        wait_s = ticket.lane.wait_s(ticket)
        if free <= 0 or ticket.size_bytes > free_bytes:
            text = f"the queue is full: {queue.size} requests of {queue.size_bytes} bytes wait"
            raise self._refused(ticket, Reason.QUEUE_FULL, Overloaded(text, retry_after_s=wait_s))
        own, own_bytes = queue.of(ticket).of(ticket.tenant)
        if own >= free or own_bytes >= free_bytes:
            text = f"tenant {ticket.tenant!r} has {own} requests of {own_bytes} bytes waiting, its share of the queue"
            raise self._refused(ticket, Reason.QUEUE_SHARE, Limited(text, retry_after_s=wait_s))

    def _start(self, ticket: Ticket, now: float) -> None:
        ticket.lane.take(ticket)
        ticket.sent = now
        ticket.start()

    def _pump(self, pool: Pool, now: float) -> None:
        """Whoever waits and has room starts. Where a start is over at once, the outermost call goes on with it."""
        if pool.is_pumping or not pool.waiting:
            return
        pool.is_pumping = True
        try:
            while (ticket := pool.queue.take(_has_room)) is not None:
                ticket.lane.waited(ticket, now)
                if now + ticket.lane.expected_s >= ticket.deadline:
                    self._give_up(ticket, now)
                else:
                    self._start(ticket, now)
        finally:
            pool.is_pumping = False

    def _give_up(self, ticket: Ticket, now: float) -> None:
        self._forget(ticket)
        waited_ms, left_ms = _ms(now - ticket.arrived), _ms(max(0.0, ticket.deadline - now))
        text = f"{ticket.lane.model.name} had no turn for the request within {waited_ms} ms, and {left_ms} ms are left"
        error = DeadlineExceeded(text, retry_after_s=ticket.lane.wait_s(ticket))
        ticket.refuse(self._refused(ticket, Reason.EXPIRED, error))

    def _forget(self, ticket: Ticket) -> None:
        """It is not under way any more, and had not started."""
        ticket.lane.model.in_flight -= 1
        if ticket.key is not None:
            ticket.key.in_flight -= 1

    def _refused(self, ticket: Ticket, reason: Reason, error: LeptonError) -> LeptonError:
        self.refused[reason, ticket.background] += 1
        return error


def _has_room(ticket: Ticket) -> bool:
    return ticket.lane.has_room(ticket)


def _ms(seconds: float) -> int:
    return round(seconds * 1e3)
