"""When seconds close, on a real database: in order, once, and the same whatever happens to the service."""

import asyncio

import pytest
from lepton_common.db import Database
from lepton_common.errors import Invalid
from lepton_common.events import ShadowWindow
from lepton_common.types import ModelRef
from lepton_monitor import store

from .lab import Lab
from .stand_ins import START, Clock, told, version, window

MODEL = ModelRef("default", "digits")


async def begin(lab: Lab, *gateways: str) -> None:
    """The model's first second, of all these gateways, is closed."""
    await lab.hear(*(window(START, gateway) for gateway in gateways))
    lab.clock.now_s = START + 3
    assert await lab.mark() == [START]


async def seconds(lab: Lab) -> list[int]:
    return [event.second - START for event in await lab.closed()]


async def test_a_first_second_waits_for_gateways_that_are_not_known_yet(lab: Lab) -> None:
    await lab.hear(window(START, "a"))
    lab.clock.now_s = START + 1.9
    assert await lab.mark() == []
    await lab.hear(window(START, "b"))
    assert await seconds(lab) == []
    lab.clock.now_s = START + 1.96
    assert await lab.mark() == [START]
    (closed,) = await lab.closed()
    assert (closed.second, closed.sequence, closed.gateways, closed.in_flight) == (START, 1, 2, 2)
    assert closed.versions[0].ok == 2


async def test_a_second_closes_with_the_last_gateway_that_tells_of_it(lab: Lab) -> None:
    await begin(lab, "a", "b")
    await lab.hear(window(START + 1, "a"))
    assert await seconds(lab) == [0]
    await lab.hear(window(START + 1, "b"))
    assert await seconds(lab) == [0, 1]
    assert [event.gateways for event in await lab.closed()] == [2, 2]


async def test_a_dead_gateway_holds_up_no_second_for_longer_than_the_wait(lab: Lab) -> None:
    await begin(lab, "a", "b")
    for second in range(1, 4):
        lab.clock.now_s = START + second + 1.05
        await lab.hear(window(START + second, "a"))
        assert await lab.mark() == []
        lab.clock.now_s += 0.91
        assert await lab.mark() == [START + second]
    assert await seconds(lab) == [0, 1, 2, 3]
    assert [event.gateways for event in await lab.closed()] == [2, 1, 1, 1]


async def test_what_a_gateway_kept_through_an_outage_is_not_late_behind_anothers(lab: Lab) -> None:
    await begin(lab, "a", "b")
    lab.clock.now_s = START + 40
    await lab.hear(*(window(START + second, "a") for second in range(1, 31)))
    lab.clock.now_s += 4
    # They came a minute late themselves: the other gateway is given time.
    assert await lab.mark() == []
    await lab.hear(*(window(START + second, "b") for second in range(1, 31)))
    closed = await lab.closed()
    assert [event.second for event in closed] == [START + second for second in range(31)]
    assert [event.sequence for event in closed] == list(range(1, 32))
    assert {event.gateways for event in closed} == {2}
    assert lab.counted("windows_late_total") == 0


async def test_a_marker_is_behind_all_that_was_sent_before_it(lab: Lab) -> None:
    """A replica that reads late sends its marker late: what is still to be read comes first."""
    await begin(lab, "a", "b")
    await lab.hear(window(START + 1, "a"))
    lab.clock.now_s = START + 60
    await lab.marking.mark()
    marker = lab.bus.events[-1]
    await lab.hear(window(START + 1, "b"), window(START + 2, "a"), window(START + 2, "b"))
    await lab.hear(marker)  # type: ignore[arg-type]  # one of all kinds that the bus has
    assert [event.gateways for event in await lab.closed()] == [2, 2, 2]


async def test_seconds_without_requests_leave_no_gap_in_the_sequence(lab: Lab) -> None:
    await begin(lab, "a")
    silent = window(START + 5).model_copy(update={"versions": ()})
    lab.clock.now_s = START + 201
    await lab.hear(window(START + 4), silent, window(START + 200))
    assert [(event.second - START, event.sequence) for event in await lab.closed()] == [(0, 1), (4, 2), (200, 3)]


async def test_a_late_window_changes_no_event_and_is_counted_where_it_belongs(lab: Lab) -> None:
    await begin(lab, "a")
    before = told(await lab.closed())
    await lab.hear(window(START, "b"), window(START - 5, "b"))
    assert told(await lab.closed()) == before
    assert lab.counted("windows_late_total") == 2
    assert await lab.rows("SELECT second, late FROM seconds") == [(START, 1)]


async def test_a_repeated_window_is_not_late(lab: Lab) -> None:
    await begin(lab, "a")
    await lab.hear(window(START, "a"), window(START, "a"))
    assert lab.counted("windows_late_total") == 0


async def test_of_one_gateways_windows_of_a_second_the_one_that_counts_most_stays(lab: Lab) -> None:
    await lab.hear(window(START, "a", version(1, ok=5)), window(START, "a", version(1, ok=3)))
    await lab.hear(window(START, "a", version(1, ok=7)))
    await lab.hear(window(START, "a", version(1, ok=1), epoch=2))
    lab.clock.now_s = START + 3
    await lab.mark()
    (closed,) = await lab.closed()
    assert closed.versions[0].ok == 8
    assert closed.gateways == 1


async def test_a_window_told_before_its_second_was_over_does_not_close_it(lab: Lab) -> None:
    await begin(lab, "a")
    whole = window(START + 1, "a", version(1, ok=9))
    early = window(START + 1, "a").model_copy(update={"at": lab.clock()})
    lab.clock.now_s = START + 1.5
    await lab.hear(early.model_copy(update={"at": lab.clock()}))
    assert await seconds(lab) == [0]
    await lab.hear(whole)
    assert [event.versions[0].ok for event in await lab.closed()] == [1, 9]


async def test_a_window_from_the_future_is_refused(lab: Lab) -> None:
    with pytest.raises(Invalid, match=r"gateway 'a': second \d+ is 8 s ahead of this machine's clock"):
        await lab.hear(window(START + 9))
    assert await lab.rows("SELECT * FROM models") == []


async def test_another_replica_goes_on_where_one_was_killed(lab: Lab, db: Database) -> None:
    await begin(lab, "a", "b")
    await lab.hear(window(START + 1, "a"))
    other = Lab(db, Clock(START + 2.1))
    await other.hear(window(START + 1, "b"))
    undisturbed = [event.id for event in await other.closed()]
    assert await seconds(other) == [0, 1]
    assert len(set(undisturbed)) == 2


async def test_replicas_that_hear_the_same_model_at_once_close_each_second_once(lab: Lab, db: Database) -> None:
    await begin(lab, "a", "b", "c", "d")
    replicas = [Lab(db, Clock(START + 60)) for _ in range(4)]

    async def one_gateway(replica: Lab, gateway: str) -> None:
        for second in range(1, 21):
            await replica.hear(window(START + second, gateway))

    await asyncio.gather(*map(one_gateway, replicas, "abcd"))
    closed = await lab.closed()
    assert [event.second for event in closed] == [START + second for second in range(21)]
    assert [event.sequence for event in closed] == list(range(1, 22))
    assert {event.gateways for event in closed} == {4}


async def test_shadows_of_all_gateways_add_up(lab: Lab) -> None:
    shadow = ShadowWindow(version=2, agreed=3, disagreed=1, only_stable_right=1, latency={600: 4})
    await lab.hear(window(START, "a", shadow=shadow), window(START, "b", shadow=shadow))
    lab.clock.now_s = START + 3
    await lab.mark()
    (closed,) = await lab.closed()
    assert closed.shadow == ShadowWindow(version=2, agreed=6, disagreed=2, only_stable_right=2, latency={600: 8})


async def test_a_marker_is_sent_again_only_when_it_seems_lost(lab: Lab) -> None:
    await lab.hear(window(START))
    lab.clock.now_s = START + 3
    await lab.marking.mark()
    await lab.marking.mark()
    assert len(lab.bus.events) == 1


async def test_more_seconds_than_one_transaction_closes_are_closed_by_the_next(lab: Lab) -> None:
    await begin(lab, "a", "b")
    lab.clock.now_s = START + 1000
    count = store.MOST_SECONDS + 20
    await lab.hear(*(window(START + second, "a") for second in range(1, count + 1)))
    lab.clock.now_s += 6
    assert await lab.mark() == [START + count]
    assert len(await lab.closed()) == 1 + store.MOST_SECONDS
    lab.clock.now_s += 6
    another = Lab(lab.db, lab.clock)
    assert await another.mark() == [START + count]
    assert await seconds(lab) == list(range(count + 1))
