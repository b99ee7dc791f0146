"""A service's schema in PostgreSQL: transactions, the events they emit, migrations."""

import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

import asyncpg
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, CursorResult, Executable, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from lepton_common import envelope
from lepton_common.errors import Unavailable
from lepton_common.events import Event
from lepton_common.types import checked_name

# A statement that runs longer is a mistake; a transaction that idles longer holds locks others wait for.
_STATEMENT_TIMEOUT_S = 30
_IDLE_IN_TRANSACTION_TIMEOUT_S = 60
_CONNECT_TIMEOUT_S = 5
_POOL_SIZE = 10

# SQLSTATE classes and codes after which the same transaction may succeed: connection lost, rolled back for
# another's sake (deadlock, serialization), out of resources, server shutting down, lock or idle time-out.
_TRANSIENT = ("08", "40", "53", "57", "25P03", "55P03")

_LIKE = str.maketrans("*?", "%_")

Params = Mapping[str, Any] | Sequence[Mapping[str, Any]]


class Tx:
    """An open transaction. Tables of the service's schema are named plainly in its SQL."""

    def __init__(self, connection: AsyncConnection, db: "Database") -> None:
        self._connection = connection
        self._db = db

    async def execute(
        self, statement: str | Executable, params: Params | None = None
    ) -> CursorResult[*tuple[Any, ...]]:
        """The statement's result. Text takes `:name` parameters. Raises Unavailable when PostgreSQL is away."""
        executable = text(statement) if isinstance(statement, str) else statement
        with _unavailable():
            return await self._connection.execute(executable, params)

    async def first_time(self, consumer: str, event_id: UUID) -> bool:
        """Whether this consumer had not handled the event before; from this transaction's commit on, it has."""
        noted = await self.execute(
            "INSERT INTO handled (consumer, id) VALUES (:consumer, :id) ON CONFLICT DO NOTHING RETURNING id",
            {"consumer": consumer, "id": event_id},
        )
        return noted.first() is not None

    async def emit(self, event: Event) -> None:
        """The event is in the outbox: sent once this transaction commits, and never if it does not.

        Events of one subject leave in the order of their commits when the subject's row was locked before.
        """
        message = envelope.encode(event, source=self._db.schema)
        row = {
            "id": event.id,
            "topic": message.topic,
            "key": message.key,
            "type": type(event).__name__,
            "headers": json.dumps(message.headers),
            "payload": message.value,
            "channel": self._db.outbox_channel,
        }
        await self.execute(_EMIT, row)


class Database:
    """A pool of connections whose search path is one schema. Makes no connection before the first transaction."""

    def __init__(self, dsn: str, schema: str) -> None:
        self.schema = checked_name("schema", schema)
        self.outbox_channel = f"{schema}_outbox"  # NOTIFY on it wakes the relay
        self.url = dsn.replace("postgresql://", "postgresql+asyncpg://", 1)
        self.engine = create_async_engine(
            self.url,
            pool_size=_POOL_SIZE,
            max_overflow=0,
            pool_timeout=_CONNECT_TIMEOUT_S,
            # After a restart of PostgreSQL the first checkout finds the dead connections and replaces them all.
            pool_pre_ping=True,
            connect_args=_connect_args(schema, _STATEMENT_TIMEOUT_S),
        )

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Tx]:
        """A transaction that commits at the end of the block and rolls back when it raises.

        Raises Unavailable when PostgreSQL is away, too busy, or ended the transaction for another's sake. When
        that happens at the commit, the transaction may have been committed all the same.
        """
        async with self.connection() as connection:
            yield Tx(connection, self)
            with _unavailable():
                await connection.commit()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[AsyncConnection]:
        """A bare connection, rolled back and returned to the pool at the end. Raises Unavailable."""
        with _unavailable():
            connection = await self.engine.connect()
        try:
            yield connection
        finally:
            with _unavailable():
                await connection.close()

    @asynccontextmanager
    async def session(self) -> AsyncIterator[asyncpg.Connection]:
        """A connection of its own, closed at the end: for what lives as long as a session, advisory locks and LISTEN.

        Inside the block everything that PostgreSQL raises for a passing reason becomes Unavailable.
        """
        async with self.connection() as connection:
            raw = await connection.get_raw_connection()
            try:
                with _unavailable():
                    yield raw.driver_connection
            finally:
                await connection.invalidate()

    async def emit(self, events: Sequence[Event]) -> None:
        """The events are in the outbox, all of them or none. Raises Unavailable."""
        async with self.transaction() as tx:
            for event in events:
                await tx.emit(event)

    async def close(self) -> None:
        """No connection is left open."""
        await self.engine.dispose()


def like(patterns: Sequence[str]) -> list[str]:
    """Patterns of names (`fraud-*`, `?`) as SQL's LIKE ANY takes them; none is all. Names hold no % or _."""
    return [pattern.translate(_LIKE) for pattern in patterns or ("*",)]


async def migrate(db: Database, package: str) -> None:
    """The schema exists and is at the newest migration in `package`'s folder `migrations` (Alembic files, no env.py).

    All of it is one transaction under an advisory lock: replicas that start together wait for each other, and a
    migration that fails leaves nothing behind. Raises Unavailable when PostgreSQL is away.
    """
    folder = Path(str(resources.files(package) / "migrations"))
    # A migration, and waiting for that of another replica, may take longer than any statement of a request.
    engine = create_async_engine(db.url, poolclass=NullPool, connect_args=_connect_args(db.schema, None))
    with _unavailable():
        async with engine.begin() as connection:
            await connection.run_sync(_upgrade, folder, db.schema)


class Executes(Protocol):
    """What a migration's `op` can do, as far as it is needed here. asyncpg takes one statement a call."""

    def execute(self, sqltext: str) -> None: ...


def create_shared_tables(op: Executes) -> None:
    """`outbox` and `handled` exist: what `Tx.emit` and `Service.decide` write. A schema's first migration calls it."""
    for statement in _SHARED_TABLES:
        op.execute(statement)


# One round trip. NOTIFY is delivered at the commit, once a transaction however many events it emits.
_EMIT = """
    WITH added AS (
        INSERT INTO outbox (id, topic, key, type, headers, payload)
        VALUES (:id, :topic, :key, :type, CAST(:headers AS jsonb), :payload)
        RETURNING seq
    )
    SELECT pg_notify(:channel, '') FROM added
"""

# The outbox is nearly always empty but sees every event pass, so it is vacuumed early.
_SHARED_TABLES = (
    """
    CREATE TABLE outbox (
        seq bigserial PRIMARY KEY,
        id uuid NOT NULL,
        topic text NOT NULL,
        key text NOT NULL,
        type text NOT NULL,
        headers jsonb NOT NULL,
        payload bytea NOT NULL,
        at timestamptz NOT NULL DEFAULT clock_timestamp()
    ) WITH (autovacuum_vacuum_scale_factor = 0.01)
    """,
    """
    CREATE TABLE handled (
        consumer text NOT NULL,
        id uuid NOT NULL,
        at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (consumer, id)
    )
    """,
    "CREATE INDEX handled_at ON handled (at)",
)


def _connect_args(schema: str, statement_timeout_s: int | None) -> dict[str, Any]:
    return {
        "timeout": _CONNECT_TIMEOUT_S,
        # The client's own limit catches a server that no longer answers at all.
        "command_timeout": statement_timeout_s and statement_timeout_s + 5,
        "server_settings": {
            "application_name": f"lepton-{schema}",
            "search_path": f'"{schema}"',
            "statement_timeout": f"{statement_timeout_s or 0}s",
            "idle_in_transaction_session_timeout": f"{_IDLE_IN_TRANSACTION_TIMEOUT_S}s",
            # A client whose machine is gone loses its locks, the relay's among them, in a minute and not in two hours.
            "tcp_keepalives_idle": "30",
            "tcp_keepalives_interval": "10",
            "tcp_keepalives_count": "3",
        },
    }


def _upgrade(connection: Connection, folder: Path, schema: str) -> None:
    connection.execute(text("SELECT pg_advisory_xact_lock(hashtext(:name))"), {"name": f"lepton.migrate.{schema}"})
    connection.execute(text(f'CREATE SCHEMA IF NOT EXISTS "{schema}"'))
    script = ScriptDirectory(folder, version_locations=[folder])
    with EnvironmentContext(Config(), script, fn=lambda revision, _: script._upgrade_revs("head", revision)) as context:
        context.configure(connection=connection, version_table_schema=schema)
        context.run_migrations()


@contextmanager
def _unavailable() -> Iterator[None]:
    """What PostgreSQL or the way to it raises for a passing reason becomes Unavailable."""
    try:
        yield
    except (OSError, TimeoutError, PoolTimeout, asyncpg.InterfaceError) as error:
        raise Unavailable("the database is not available", retry_after_s=1) from error
    except (DBAPIError, asyncpg.PostgresError) as error:
        lost = isinstance(error, DBAPIError) and error.connection_invalidated
        state = str(getattr(getattr(error, "orig", error), "sqlstate", None) or "")
        if lost or state.startswith(_TRANSIENT):
            raise Unavailable("the database is not available", retry_after_s=1) from error
        raise
