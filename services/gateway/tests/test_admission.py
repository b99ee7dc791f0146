"""Admission before simulated workers, in simulated time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lepton_common.auth import Caller
from lepton_common.errors import LeptonError, Limited, Overloaded
from lepton_common.records import KeyLimits, Limits, Scope
from lepton_gateway.admission import Admission, Reason
from lepton_gateway.lanes import Answer, Lane, Ticket
from lepton_gateway.limits import Use

from .simulation import Simulation, Traffic

# A pool of sixteen slots: how long a request waits for one of another's to be over depends on how many there are.
SLOTS = 16
CAPACITY_PER_S = 392
POLITE = Traffic("polite", 40, timeout_s=2.0, alpha_s=0.04)
NEIGHBOUR = Traffic("neighbour", 150, timeout_s=2.0, alpha_s=0.04)


class Asked(Ticket):
    """A request that does nothing but say what became of it."""

    def __init__(self, lane: Lane, now: float, timeout_s: float) -> None:
        super().__init__("acme", lane, 10, now, now + timeout_s)
        self.started = False
        self.refusal: LeptonError | None = None

    def start(self) -> None:
        self.started = True

    def refuse(self, error: LeptonError) -> None:
        self.refusal = error


class Door:
    """One model of one tenant, asked by one key."""

    def __init__(self, key: KeyLimits | None = None, model: Limits | None = None) -> None:
        self.unix = 86_400.0 * 20_000 + 86_000
        self.admission = Admission(lambda: self.unix)
        self.use = Use("model 'm'", model or Limits(max_concurrency=10_000))
        self.lane = Lane(self.admission.pool("cpu"), "acme", self.use)
        self.caller = Caller("acme", frozenset({Scope.INFER}), "k", "", limits=key or KeyLimits())

    def ask(self, now: float = 0.0, timeout_s: float = 30.0, *, background: bool = False) -> Asked:
        asked = Asked(self.lane, now, timeout_s)
        asked.background = background
        self.admission.enter(asked, self.caller)
        return asked

    def answer(self, asked: Asked, now: float, queued_s: float = 0.0) -> None:
        assert asked.sent is not None
        self.admission.leave(self.lane, asked, now, Answer(now - asked.sent, queued_s, 1.0))

    def full(self, now: float = 0.0) -> list[Asked]:
        """Requests until one has to wait, that one included."""
        asked = [self.ask(now)]
        while asked[-1].started:
            asked.append(self.ask(now))
        return asked


def test_while_there_is_room_nobody_waits() -> None:
    told = (simulation := Simulation(SLOTS)).run(20, POLITE, NEIGHBOUR)
    assert simulation.longest_queue == 0
    assert not simulation.admission.refused
    assert told["polite"].late == 0


def test_a_flood_of_ten_times_its_share_leaves_a_polite_tenant_its_latency() -> None:
    alone = Simulation(SLOTS).run(45, POLITE)["polite"]
    flood = Traffic("flood", 1500, timeout_s=2.0, alpha_s=0.04)
    told = Simulation(SLOTS).run(25, POLITE, flood)
    beside = told["polite"]
    assert beside.refused_at_door == beside.given_up == beside.late == 0
    assert beside.quantile(0.99) <= 1.2 * alone.quantile(0.99)
    assert told["flood"].in_time > 0.95 * (CAPACITY_PER_S - 40) * 20


@pytest.mark.parametrize(
    ("slots", "traffic", "capacity_per_s"),
    [
        (4, Traffic("t", 1200, timeout_s=0.25, alpha_s=0.01), 392),
        (2, Traffic("t", 1500, timeout_s=0.5, alpha_s=0.01, beta_s=0.002, max_rows=16), 747),
        (1, Traffic("t", 1500, timeout_s=0.1, alpha_s=0.0, beta_s=0.002, max_rows=32), 490),
    ],
    ids=["one by one", "in batches", "batches that gain nothing"],
)
def test_at_three_times_the_capacity_it_is_used_and_deadlines_hold(
    slots: int, traffic: Traffic, capacity_per_s: float
) -> None:
    simulation = Simulation(slots)
    told = simulation.run(15, traffic)["t"]
    assert told.in_time >= 0.9 * capacity_per_s * 10
    assert told.quantile(0.99) <= traffic.timeout_s
    # Whoever is refused hears so at once, but for a few that the queue let down.
    assert told.given_up <= 0.03 * told.refused_at_door


def test_background_work_yields_and_still_gets_its_share() -> None:
    alone = Simulation(SLOTS).run(45, POLITE)["polite"]
    flood = Traffic("batch", 1500, timeout_s=60, alpha_s=0.04, background=True)
    told = Simulation(SLOTS).run(25, POLITE, flood)
    assert told["polite"].quantile(0.99) <= 1.2 * alone.quantile(0.99)
    assert told["batch"].in_time > 0.9 * (CAPACITY_PER_S - 40) * 20
    busy = Traffic("busy", 1000, timeout_s=1.0, alpha_s=0.04)
    told = Simulation(SLOTS).run(25, busy, flood)
    assert told["busy"].in_time > 0.85 * CAPACITY_PER_S * 20
    assert told["batch"].in_time > 0


@pytest.mark.parametrize(
    ("key", "model", "reason", "message", "retry_s"),
    [
        (KeyLimits(rate_per_s=0.5, burst=1), None, Reason.KEY_RATE, "this API key is over its rate of 0.5", 2.0),
        (KeyLimits(max_concurrency=1), None, Reason.KEY_CONCURRENCY, "this API key has 1 requests under way", 0.0),
        (KeyLimits(per_day=1), None, Reason.KEY_QUOTA, "the 1 requests of its day", 400.0),
        (None, Limits(rate_per_s=4, burst=1), Reason.MODEL_RATE, "model 'm' is over its rate of 4", 0.25),
        (None, Limits(max_concurrency=1), Reason.MODEL_CONCURRENCY, "model 'm' has 1 requests under way", 0.0),
    ],
)
def test_what_is_over_a_limit_is_told_which_and_until_when(
    key: KeyLimits | None, model: Limits | None, reason: Reason, message: str, retry_s: float
) -> None:
    door = Door(key, model)
    door.ask()
    with pytest.raises(Limited, match=message) as caught:
        door.ask()
    assert caught.value.retry_after_s == pytest.approx(retry_s)
    assert door.admission.refused == {(reason, False): 1}
    assert door.use.in_flight == 1


def test_a_refused_request_costs_no_token() -> None:
    door = Door(KeyLimits(rate_per_s=1, burst=2), Limits(max_concurrency=1))
    first = door.ask()
    with pytest.raises(Limited, match="under way"):
        door.ask()
    door.answer(first, 0.01)
    assert door.ask(0.01).started


def test_a_new_day_begins_at_midnight() -> None:
    door = Door(KeyLimits(per_day=1))
    door.ask()
    with pytest.raises(Limited):
        door.ask()
    door.unix += 400
    assert door.ask().started


def test_what_cannot_be_done_in_time_is_refused_at_the_door() -> None:
    door = Door()
    for number in range(20):
        door.answer(door.ask(number), number + 0.125)
    alone = door.ask(30.0, timeout_s=0.05)
    assert alone.started, "nobody knows better than one who tries"
    with pytest.raises(Overloaded, match=r"model 'm' would answer 75 ms after the deadline: 0 ms of work") as caught:
        door.ask(30.0, timeout_s=0.05)
    assert caught.value.retry_after_s == pytest.approx(0.075)


def test_who_waits_in_vain_hears_so_and_is_never_run() -> None:
    door = Door()
    *running, late = door.full()
    patient = door.ask()
    door.admission.expire(30.0)
    assert late.refusal is not None
    assert "no turn" in late.refusal.message
    assert not late.started
    assert patient.refusal is not None
    assert door.use.in_flight == len(running)


def test_a_caller_that_leaves_the_queue_is_never_run() -> None:
    door = Door()
    *running, gone = door.full()
    door.admission.withdraw(gone)
    door.answer(running[0], 0.01)
    assert not gone.started
    assert door.use.in_flight == len(running) - 1


def test_a_tenant_that_has_little_need_not_wait_for_what_others_have_under_way() -> None:
    door = Door()
    pool = door.admission.pool("cpu")
    for model in ("m", "n"):
        door.lane = Lane(pool, "flood", Use(model, Limits(max_concurrency=10_000)))
        door.full()
    assert pool.places.free == 0
    started = []
    for tenant in ("second", "third"):
        door.lane = Lane(pool, tenant, Use("model 'm'", Limits(max_concurrency=10_000)))
        started.append(len(door.full()) - 1)
    assert started == [256, 171], "what one model may have, and a third of the places"
    door.lane = Lane(pool, "fourth", Use("model 'm'", Limits(max_concurrency=10_000)))
    asked = Asked(door.lane, 0.0, 30.0)
    asked.background = True
    door.admission.enter(asked, door.caller)
    assert not asked.started, "work in the background waits behind callers"


def test_many_tenants_with_little_have_no_more_than_twice_the_places() -> None:
    door = Door()
    pool = door.admission.pool("cpu")
    lanes = [Lane(pool, str(tenant), Use("model 'm'", Limits(max_concurrency=10_000))) for tenant in range(1100)]
    asked = []
    for door.lane in lanes:
        asked.append(door.ask())
    assert sum(each.started for each in asked) == 1024
    for each in asked:  # Each answer lets in one that waits.
        door.lane = each.lane
        door.answer(each, 0.1)
    assert (pool.busy, pool.places.in_flight, pool.waiting) == (0, 0, 0)


def test_one_tenant_alone_cannot_fill_the_queue() -> None:
    door = Door()
    door.full()
    for _ in range(2047):
        door.ask()
    with pytest.raises(Limited, match="tenant 'acme' has 2048 requests of 20480 bytes waiting, its share of the queue"):
        door.ask()
    other = Asked(Lane(door.admission.pool("cpu"), "other", Use("model 'n'", Limits())), 0.0, 30.0)
    other.tenant = "other"
    door.admission.enter(other, door.caller)
    assert other.started


def test_large_bodies_fill_the_queue_sooner() -> None:
    door = Door()
    door.full()
    large = [Asked(door.lane, 0.0, 30.0) for _ in range(3)]
    for asked in large:
        asked.size_bytes = 100 << 20
    door.admission.enter(large[0], door.caller)
    door.admission.enter(large[1], door.caller)
    with pytest.raises(Overloaded, match="the queue is full"):
        door.admission.enter(large[2], door.caller)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["ask", "answer", "fail", "leave", "wait"]), st.booleans()), max_size=120))
def test_every_place_is_given_back(steps: list[tuple[str, bool]]) -> None:
    door, now = Door(), 0.0
    asked = [door.ask(now, 0.5) for _ in range(300)]
    for step, background in steps:
        now += 0.01
        running = [each for each in asked if each.started]
        waiting = [each for each in asked if not each.started and each.refusal is None]
        if step == "ask":
            try:
                asked.append(door.ask(now, 0.5, background=background))
            except LeptonError:
                continue
        elif step in ("answer", "fail") and running:
            asked.remove(running[0])
            if step == "answer":
                door.answer(running[0], now, queued_s=0.3)
            else:
                door.admission.leave(door.lane, running[0], now, None)
        elif step == "leave" and waiting:
            asked.remove(waiting[0])
            door.admission.withdraw(waiting[0])
        elif step == "wait":
            now += 0.1
            door.admission.expire(now)
    door.admission.expire(now + 1)
    while running := [each for each in asked if each.started]:
        asked.remove(running[0])
        door.answer(running[0], now + 1)
    pool = door.admission.pools["cpu"]
    assert pool.queue.size == pool.places.in_flight == pool.background.in_flight == 0
    assert door.use.in_flight == door.lane.places.in_flight == 0


def test_there_are_callers_until_a_second_after_the_last_one_asked() -> None:
    door = Door()
    door.admission.expire(10.0)
    door.ask(10.0, background=True)
    door.admission.expire(10.1)
    assert not door.admission.has_callers, "nobody waits for what is done in the background"
    door.ask(10.2)
    seen = []
    for now in (10.3, 11.2, 11.4):
        door.admission.expire(now)
        seen.append(door.admission.has_callers)
    assert seen == [True, True, False]


@pytest.mark.parametrize("has_callers", [True, False])
def test_background_work_gives_way_at_a_shorter_wait_where_there_are_callers(has_callers: bool) -> None:
    door = Door()
    pool = door.lane.pool
    door.ask(0.0, background=True)
    before = pool.background.value
    # Longer than a fourth of what is unnoticed, shorter than all of it.
    for step in range(60):
        door.lane.hear(0.01 * step, Answer(0.005, 0.003, 30.0), has_callers=has_callers)
    assert (pool.background.value < before) == has_callers
