"""What gateways told, how far each model is, and its history by the second and by the minute."""

from alembic import op
from lepton_common.db import create_shared_tables

revision = "0001"
down_revision = None


def upgrade() -> None:
    create_shared_tables(op)
    op.execute(
        """
        CREATE TABLE models (
            tenant text NOT NULL,
            model text NOT NULL,
            closed bigint NOT NULL DEFAULT -1,
            sequence bigint NOT NULL DEFAULT 0,
            oldest bigint,
            marked bigint NOT NULL DEFAULT -1,
            done jsonb NOT NULL DEFAULT '{}',
            rolled_up bigint NOT NULL DEFAULT -1,
            PRIMARY KEY (tenant, model)
        ) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05)
        """
    )
    op.execute(
        """
        CREATE TABLE inputs (
            tenant text NOT NULL,
            model text NOT NULL,
            second bigint NOT NULL,
            gateway text NOT NULL,
            epoch bigint NOT NULL,
            requests bigint NOT NULL,
            arrived_at timestamptz NOT NULL,
            content text NOT NULL,
            PRIMARY KEY (tenant, model, second, gateway, epoch)
        ) WITH (autovacuum_vacuum_scale_factor = 0.05)
        """
    )
    # By the second, a partition for ten minutes; `late` counts windows that came after it was closed.
    op.execute(
        """
        CREATE TABLE seconds (
            tenant text NOT NULL,
            model text NOT NULL,
            second bigint NOT NULL,
            sequence bigint NOT NULL,
            late int NOT NULL DEFAULT 0,
            content text NOT NULL,
            PRIMARY KEY (tenant, model, second)
        ) PARTITION BY RANGE (second)
        """
    )
    # By the minute, a partition for a day; `second` is the minute's first.
    op.execute(
        """
        CREATE TABLE minutes (
            tenant text NOT NULL,
            model text NOT NULL,
            second bigint NOT NULL,
            content text NOT NULL,
            PRIMARY KEY (tenant, model, second)
        ) PARTITION BY RANGE (second)
        """
    )
