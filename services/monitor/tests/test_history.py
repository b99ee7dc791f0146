"""The history on a real database: minutes from seconds, partitions that come and go."""

from lepton_common.types import ModelRef
from lepton_monitor import store
from lepton_monitor.domain import Content, by_minute
from lepton_monitor.partitions import drop_partitions

from .lab import Lab
from .stand_ins import START, Clock, version, window

MODEL = ModelRef("default", "digits")


async def close(lab: Lab, *seconds: int) -> None:
    """These seconds of gateway `a` are closed."""
    for second in seconds:
        lab.clock.now_s = max(lab.clock.now_s, START + second + 1.05)
        await lab.hear(window(START + second, "a", version(1, ok=second + 1)))
    lab.clock.now_s += 6
    await lab.mark()


async def minutes(lab: Lab) -> dict[int, int]:
    async with lab.db.transaction() as tx:
        found = await store.list_minutes(tx, MODEL, 0, 2**40, 100_000)
    return {second - START: content.requests for second, content in found}


async def tables(lab: Lab, table: str) -> list[int]:
    rows = await lab.rows(f"SELECT relname FROM pg_class WHERE relkind = 'r' AND relname LIKE '{table}\\_%'")
    return sorted(int(str(name).removeprefix(f"{table}_")) for (name,) in rows)


async def test_every_second_is_in_its_minute_once_however_often_it_is_rolled_up(lab: Lab) -> None:
    await close(lab, 0, 1)
    await lab.history.roll_up()
    await lab.history.roll_up()
    assert await minutes(lab) == {0: 1 + 2}
    await close(lab, 2, 59, 60, 61, 130)
    await lab.history.roll_up()
    await Lab(lab.db, lab.clock).history.roll_up()
    assert await minutes(lab) == {0: 1 + 2 + 3 + 60, 60: 61 + 62, 120: 131}


async def test_a_minute_has_the_sketches_of_all_its_seconds(lab: Lab) -> None:
    await lab.hear(window(START, "a", version(1, ms=10, ok=3)))
    await close(lab, 1)
    await lab.history.roll_up()
    async with lab.db.transaction() as tx:
        ((_, minute),) = await store.list_minutes(tx, MODEL, 0, 2**40, 10)
        seconds = await store.list_seconds(tx, MODEL, 0, 2**40, 10)
    expected: Content = by_minute(seconds)[START]
    assert minute.versions == expected.versions
    assert sum(minute.versions[0].latency.values()) == 5


async def test_more_seconds_than_fit_in_one_go_are_rolled_up_all_the_same(lab: Lab) -> None:
    await lab.history.make_partitions()
    await close(lab, 0)
    async with lab.db.transaction() as tx:
        await tx.execute(
            """
            INSERT INTO seconds (tenant, model, second, sequence, content)
            SELECT tenant, model, second + step, sequence + step, content FROM seconds, generate_series(1, 1000) AS step
            """
        )
        await tx.execute("UPDATE models SET closed = closed + 1000")
    await lab.history.roll_up()
    assert sum((await minutes(lab)).values()) == 1001


async def test_partitions_are_there_before_they_are_needed(lab: Lab) -> None:
    await lab.history.make_partitions()
    assert await tables(lab, "seconds") == [START // 600 * 600 + step * 600 for step in (-1, 0, 1, 2)]
    assert await tables(lab, "minutes") == [START // 86_400 * 86_400, START // 86_400 * 86_400 + 86_400]
    await Lab(lab.db, lab.clock).history.make_partitions()


async def test_old_seconds_go_and_their_minutes_stay_for_a_month(lab: Lab) -> None:
    await close(lab, 0, 1)
    lab.clock.now_s = START + 2 * 3600
    await lab.history.keep()
    assert await lab.rows("SELECT * FROM seconds") == []
    assert START // 600 * 600 not in await tables(lab, "seconds")
    assert await minutes(lab) == {0: 3}
    lab.clock.now_s = START + 32 * 86_400
    await lab.history.keep()
    assert await minutes(lab) == {}


async def test_no_second_goes_before_it_is_in_a_minute(lab: Lab) -> None:
    await close(lab, 0, 1)
    async with lab.db.transaction() as tx:
        assert await drop_partitions(tx, "seconds", START + 7200) == []
    await lab.history.roll_up()
    async with lab.db.transaction() as tx:
        assert len(await drop_partitions(tx, "seconds", START + 7200)) == 1


async def test_seconds_of_long_ago_are_closed_into_a_partition_made_for_them(lab: Lab) -> None:
    lab.clock.now_s = START + 20 * 3600
    await lab.history.make_partitions()
    await lab.hear(window(START), window(START + 1))
    lab.clock.now_s += 10
    await lab.mark()
    assert [event.second for event in await lab.closed()] == [START, START + 1]
    await lab.history.keep()
    assert await minutes(lab) == {0: 2}
    # The rest of that minute comes after its first seconds were dropped.
    await close(lab, 2)
    await lab.history.keep()
    assert await minutes(lab) == {0: 2 + 3}


async def test_what_gateways_told_goes_some_minutes_after_it_was_closed(lab: Lab) -> None:
    await close(lab, 0, 1)
    await lab.hear(window(START + 2, "b"))
    await lab.history.keep()
    assert await lab.rows("SELECT count(*) FROM inputs") == [(3,)]
    lab.clock.now_s += 301
    await lab.history.keep()
    # What is not closed stays, however old it is.
    assert await lab.rows("SELECT second FROM inputs") == [(START + 2,)]


async def test_a_replica_that_never_made_partitions_makes_those_it_needs(lab: Lab) -> None:
    other = Lab(lab.db, Clock(START + 1.05))
    await lab.history.make_partitions()
    await other.hear(window(START))
    other.clock.now_s += 1
    await other.mark()
    assert len(await other.closed()) == 1
