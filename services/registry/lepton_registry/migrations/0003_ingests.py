"""Pushes by Kafka that wait to be carried out."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    # A row is gone when its ingest is over. `attempts` tells the holder of a lease from those before it.
    op.execute(
        """
        CREATE TABLE ingests (
            id uuid PRIMARY KEY,
            tenant text NOT NULL,
            request text NOT NULL,
            source text NOT NULL,
            asked jsonb NOT NULL,
            actor text NOT NULL,
            traceparent text,
            at timestamptz NOT NULL,
            due_at timestamptz NOT NULL DEFAULT now(),
            leased_until timestamptz,
            attempts int NOT NULL DEFAULT 0
        )
        """
    )
