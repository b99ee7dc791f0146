"""How many requests over Kafka are worked on at a time."""

import re

from hypothesis import given
from hypothesis import strategies as st
from lepton_gateway.async_room import Room

from .lab import Lab


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.sampled_from(["well", "short", "late", "in time", "alone"]), max_size=300), st.integers(1, 500))
def test_room_stays_within_its_bounds(steps: list[str], most: int) -> None:
    clock = Clock()
    room = Room(most, clock)
    for step in steps:
        clock.now += 0.06
        match step:
            case "well":
                room.went_well()
            case "short":
                room.was_short()
            case _:
                room.looked(0.02 if step == "late" else 0.0, beside_callers=step != "alone")
        assert 1 <= room.size() <= most


def test_answers_of_one_moment_shrink_the_room_once() -> None:
    room = Room(100, lambda: 5.0)
    before = room.size()
    for _ in range(50):
        room.was_short()
    assert room.size() == int(before * 0.7)


def test_callers_who_have_to_wait_leave_one_message_at_a_time() -> None:
    room = Room(100, Clock())
    for _ in range(100):
        room.looked(0.01, beside_callers=True)
    assert room.size() == 1


def test_beside_callers_who_do_not_wait_there_is_more_and_more_room() -> None:
    room = Room(100, Clock())
    whole = room.size()
    room.looked(0.0, beside_callers=True)
    first = room.size()
    assert first < whole
    sizes = []
    for _ in range(1000):
        room.looked(0.001, beside_callers=True)
        sizes.append(room.size())
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (first, whole)


def test_callers_who_wait_now_and_then_leave_room_for_a_few() -> None:
    room = Room(100, Clock())
    sizes = []
    for look in range(5000):
        room.looked(0.01 if look % 40 == 0 else 0.0, beside_callers=True)
        sizes.append(room.size())
    assert 3 <= min(sizes[1000:]) < max(sizes) < 10


def test_when_the_last_caller_has_left_the_room_is_soon_whole_again() -> None:
    room = Room(100, Clock())
    whole = room.size()
    for _ in range(100):
        room.looked(0.01, beside_callers=True)
    room.looked(0.01, beside_callers=False)
    assert room.size() == 1, "another caller may come in a second"
    for _ in range(400):  # 8 s
        room.looked(0.01, beside_callers=False)
    assert room.size() == whole


async def test_requests_over_kafka_make_room_for_who_calls(lab: Lab) -> None:
    async def size() -> float:
        found = re.search(r"^lepton_gateway_async_room (\S+)$", await lab.metrics(), re.MULTILINE)
        assert found
        return float(found[1])

    await lab.serve("m", 1)
    alone = await size()
    async with lab.patience():
        while await size() >= alone:
            await lab.client.post("/v2/models/m/infer", headers={"authorization": f"Bearer {lab.key}"}, content=b"{}")
