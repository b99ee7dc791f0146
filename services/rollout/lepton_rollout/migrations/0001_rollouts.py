"""Versions heard of, and rollouts."""

from alembic import op
from lepton_common.db import create_shared_tables

revision = "0001"
down_revision = None


def upgrade() -> None:
    create_shared_tables(op)
    op.execute(
        """
        CREATE TABLE versions (
            tenant text NOT NULL,
            model text NOT NULL,
            version int NOT NULL,
            assigned jsonb NOT NULL,
            PRIMARY KEY (tenant, model, version)
        )
        """
    )
    op.execute(
        """
        CREATE TABLE rollouts (
            id uuid PRIMARY KEY,
            tenant text NOT NULL,
            model text NOT NULL,
            version int NOT NULL,
            assigned jsonb NOT NULL,
            strategy text NOT NULL,
            actor text NOT NULL,
            started_at timestamptz NOT NULL,
            load_by timestamptz NOT NULL,
            state text NOT NULL,
            reason text NOT NULL,
            previous int,
            finished_at timestamptz,
            holder uuid,
            held_until timestamptz,
            FOREIGN KEY (tenant, model, version) REFERENCES versions
        )
        """
    )
    op.execute("CREATE UNIQUE INDEX one_open_rollout ON rollouts (tenant, model) WHERE finished_at IS NULL")
    op.execute("CREATE INDEX rollouts_newest ON rollouts (tenant, started_at DESC)")
