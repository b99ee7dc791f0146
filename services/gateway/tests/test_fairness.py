"""Whose turn it is."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lepton_gateway.fairness import Entry, FairQueue, Queue


def entry(tenant: str, cost_s: float = 1.0, group: str = "m", size_bytes: int = 1, deadline: float = 9.0) -> Entry:
    made = Entry(tenant, group, size_bytes, deadline)
    made.cost_s = cost_s
    return made


def anyone(entry: Entry) -> bool:
    return True


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.01, 1.0)), min_size=1, max_size=100))
def test_while_they_wait_no_tenant_gets_more_than_a_request_ahead(arrivals: list[tuple[str, float]]) -> None:
    queue: FairQueue[Entry] = FairQueue()
    left = Counter(tenant for tenant, _ in arrivals)
    for tenant, cost_s in arrivals:
        queue.add(entry(tenant, cost_s))
    served: Counter[str] = Counter()
    largest = max(cost_s for _, cost_s in arrivals)
    while min(left.values()):  # as long as all of them wait
        taken = queue.take(anyone)
        assert taken is not None
        left[taken.tenant] -= 1
        served[taken.tenant] += taken.cost_s  # type: ignore[assignment]  # a Counter of seconds
        seconds = [float(served[tenant]) for tenant in left]
        assert max(seconds) - min(seconds) <= 2 * largest + 1e-9


@given(st.data())
def test_the_queue_counts_what_waits_whatever_comes_and_goes(data: Any) -> None:
    queue: Queue[Entry] = Queue()
    waiting: list[Entry] = []
    for step in data.draw(st.lists(st.sampled_from(["add", "take", "forget", "late"]), max_size=60)):
        if step == "add":
            tenant, group = data.draw(st.sampled_from("ab")), data.draw(st.sampled_from("mn"))
            made = entry(tenant, 0.5, tenant + group, size_bytes=7, deadline=data.draw(st.sampled_from([1.0, 9.0])))
            made.background = data.draw(st.booleans())
            queue.add(made)
            waiting.append(made)
        elif step == "take":
            taken = queue.take(lambda each: str(each.group).endswith("m"))
            able = [each for each in waiting if str(each.group).endswith("m")]
            assert (taken is None) == (not able)
            if taken is not None:
                # Within one model they come in their order.
                same = (taken.group, taken.background)
                assert taken is next(each for each in able if (each.group, each.background) == same)
                waiting.remove(taken)
        elif step == "forget" and waiting:
            gone = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
            queue.forget(gone)
        elif step == "late":
            late = queue.late(5.0)
            assert set(late) == {each for each in waiting if each.deadline == 1.0}
            waiting = [each for each in waiting if each.deadline > 5.0]
        assert queue.size == len(waiting)
        assert queue.size_bytes == 7 * len(waiting)


def test_who_asks_seldom_is_next_whatever_waits_of_another() -> None:
    queue: FairQueue[Entry] = FairQueue()
    for _ in range(100):
        queue.add(entry("flood"))
    for _ in range(10):
        queue.take(anyone)
    queue.add(entry("polite"))
    assert [each.tenant for _ in range(2) if (each := queue.take(anyone))].count("polite") == 1


def test_a_tenant_has_one_share_however_many_models_it_has() -> None:
    queue: FairQueue[Entry] = FairQueue()
    for number in range(60):
        queue.add(entry("many", group=f"m{number % 20}"))
        queue.add(entry("one"))
    served = Counter(each.tenant for _ in range(60) if (each := queue.take(anyone)))
    assert served["one"] == pytest.approx(30, abs=1)


def test_a_model_without_room_holds_up_no_other_of_its_tenant() -> None:
    queue: FairQueue[Entry] = FairQueue()
    queue.add(entry("a", group="full"))
    queue.add(entry("a", group="free"))
    taken = queue.take(lambda each: each.group == "free")
    assert taken is not None
    assert taken.group == "free"


def test_background_gets_a_small_share_and_all_that_nobody_wants() -> None:
    queue: Queue[Entry] = Queue()
    for number in range(400):
        made = entry("a")
        made.background = number % 2 == 0
        queue.add(made)
    first = Counter(each.background for _ in range(100) if (each := queue.take(anyone)))
    assert 4 <= first[True] <= 7
    rest = Counter(each.background for _ in range(300) if (each := queue.take(anyone)))
    assert rest[True] + first[True] == 200
