"""Transactions, migrations and what happens to both when PostgreSQL goes away."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from lepton.processes import Process
from lepton.servers import Postgres
from lepton_common.db import Database, migrate
from lepton_common.errors import TooLarge, Unavailable
from lepton_common.events import ModelCreated
from lepton_common.testing import serving
from sqlalchemy.exc import DBAPIError, IntegrityError

FIRST = """
    from alembic import op
    from lepton_common.db import create_shared_tables

    revision = "0001"
    down_revision = None

    def upgrade() -> None:
        create_shared_tables(op)
        op.execute("CREATE TABLE things (name text PRIMARY KEY, count int NOT NULL DEFAULT 0)")
"""
SECOND = """
    from alembic import op

    revision = "0002"
    down_revision = "0001"

    def upgrade() -> None:
        op.execute("INSERT INTO things (name) VALUES ('second')")
"""
BROKEN = (
    SECOND
    + """
        op.execute("INSERT INTO nowhere VALUES (1)")
"""
)

Package = Callable[..., str]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    """Makes an importable package `things` with these migrations."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(*migrations: str) -> str:
        folder = tmp_path / "things" / "migrations"
        folder.mkdir(parents=True, exist_ok=True)
        (folder.parent / "__init__.py").touch()
        for index, each in enumerate(migrations, 1):
            (folder / f"{index:04}_change.py").write_text(dedent(each))
        return "things"

    yield make
    sys.modules.pop("things", None)


@pytest.fixture
async def db(postgres_dsn: str, package: Package) -> AsyncIterator[Database]:
    db = Database(postgres_dsn, "things")
    await migrate(db, package(FIRST))
    yield db
    await db.close()


async def names(db: Database) -> list[str]:
    async with db.transaction() as tx:
        return [str(row[0]) for row in await tx.execute("SELECT name FROM things ORDER BY name")]


async def test_a_transaction_commits_at_the_end_of_its_block(db: Database) -> None:
    async with db.transaction() as tx:
        await tx.execute("INSERT INTO things (name) VALUES (:name)", {"name": "a"})
    assert await names(db) == ["a"]


async def test_a_transaction_that_raises_leaves_nothing_and_sends_nothing(db: Database) -> None:
    async def fail() -> None:
        async with db.transaction() as tx:
            await tx.execute("INSERT INTO things (name) VALUES ('a')")
            await tx.emit(ModelCreated(tenant="acme", model="a"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await fail()
    async with db.transaction() as tx:
        assert (await tx.execute("SELECT count(*) FROM outbox")).scalar_one() == 0
    assert await names(db) == []


async def test_an_emitted_event_waits_in_the_outbox_as_a_cloud_event(db: Database) -> None:
    event = ModelCreated(tenant="acme", model="a")
    async with db.transaction() as tx:
        await tx.emit(event)
    async with db.transaction() as tx:
        row = (await tx.execute("SELECT * FROM outbox")).mappings().one()
    assert (row["id"], row["topic"], row["key"], row["type"]) == (event.id, "lepton.models", "acme/a", "ModelCreated")
    assert row["headers"]["ce_source"] == "/things"
    assert ModelCreated.model_validate_json(row["payload"]) == event


async def test_an_event_too_large_for_the_bus_is_refused_before_it_is_in_the_outbox(db: Database) -> None:
    with pytest.raises(TooLarge, match="ModelCreated"):
        async with db.transaction() as tx:
            await tx.emit(ModelCreated(tenant="acme", model="a" * 300_000))


async def test_mistakes_are_not_taken_for_unavailability(db: Database) -> None:
    for statement, kind in (
        ("INSERT INTO things (name) VALUES ('a'), ('a')", IntegrityError),
        ("SELECT nonsense", DBAPIError),
    ):
        with pytest.raises(kind):
            async with db.transaction() as tx:
                await tx.execute(statement)


async def test_a_deadlock_is_worth_another_try(db: Database) -> None:
    async with db.transaction() as tx:
        await tx.execute("INSERT INTO things (name) VALUES ('a'), ('b')")
    both_hold_one = asyncio.Barrier(2)

    async def lock(first: str, second: str) -> None:
        async with db.transaction() as tx:
            await tx.execute("UPDATE things SET count = 1 WHERE name = :name", {"name": first})
            await both_hold_one.wait()
            await tx.execute("UPDATE things SET count = 2 WHERE name = :name", {"name": second})

    results = await asyncio.gather(lock("a", "b"), lock("b", "a"), return_exceptions=True)
    assert sorted(map(repr, results)) == ["None", "Unavailable('the database is not available')"]


async def test_handled_is_noted_once_for_each_consumer_and_only_if_committed(db: Database) -> None:
    event = ModelCreated(tenant="acme", model="a")

    async def fail() -> None:
        async with db.transaction() as tx:
            assert await tx.first_time("a", event.id)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await fail()
    for consumer, expected in (("a", True), ("a", False), ("b", True)):
        async with db.transaction() as tx:
            assert await tx.first_time(consumer, event.id) is expected


async def test_replicas_that_start_together_migrate_once(postgres_dsn: str, package: Package) -> None:
    name = package(FIRST, SECOND)
    replicas = [Database(postgres_dsn, "things") for _ in range(4)]
    await asyncio.gather(*(migrate(each, name) for each in replicas))
    assert await names(replicas[0]) == ["second"]
    for each in replicas:
        await each.close()


async def test_a_migration_that_fails_leaves_nothing_behind(db: Database, package: Package) -> None:
    with pytest.raises(DBAPIError, match="nowhere"):
        await migrate(db, package(FIRST, BROKEN))
    assert await names(db) == []
    await migrate(db, package(FIRST, SECOND))
    assert await names(db) == ["second"]


async def test_services_share_a_database_by_schemas(db: Database, postgres_dsn: str, package: Package) -> None:
    other = Database(postgres_dsn, "other")
    await migrate(other, package(FIRST))
    async with other.transaction() as tx:
        await tx.execute("INSERT INTO things (name) VALUES ('theirs')")
    assert (await names(db), await names(other)) == ([], ["theirs"])
    await other.close()


async def test_postgresql_away_is_unavailable_and_back_is_back(tmp_path: Path, package: Package) -> None:
    (tmp_path / "postgres").mkdir()
    recipe = Postgres(tmp_path / "postgres")
    db = Database(recipe.dsn, "things")
    with pytest.raises(Unavailable):
        await names(db)
    async with serving(recipe) as process:
        await migrate(db, package(FIRST))
        await asyncio.gather(*(names(db) for _ in range(10)))
        with pytest.raises(Unavailable):
            await be_cut_off(db, process)
        with pytest.raises(Unavailable):
            await names(db)
    async with serving(recipe):
        # All ten connections in the pool are dead, and none of these is to notice.
        assert await asyncio.gather(*(names(db) for _ in range(10))) == [[]] * 10
    await db.close()


async def be_cut_off(db: Database, process: Process) -> None:
    async with db.transaction() as tx:
        await tx.execute("INSERT INTO things (name) VALUES ('lost')")
        process.kill()
        await tx.execute("SELECT 1")
