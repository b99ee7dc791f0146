"""Rollouts that walk: policies, progress, decisions, and the windows they are judged by."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.execute(
        """
        ALTER TABLE rollouts
            DROP COLUMN strategy,
            ADD COLUMN policy jsonb NOT NULL DEFAULT '{"strategy": "immediate"}',
            ADD COLUMN outcome text,
            ADD COLUMN stable int,
            ADD COLUMN group_id uuid,
            ADD COLUMN walk jsonb NOT NULL DEFAULT '{}',
            ADD COLUMN revision int NOT NULL DEFAULT 0
        """
    )
    op.execute("DROP INDEX one_open_rollout")
    op.execute(
        """
        CREATE UNIQUE INDEX one_open_rollout ON rollouts (tenant, model)
        WHERE finished_at IS NULL AND state <> 'queued'
        """
    )
    op.execute("CREATE INDEX open_rollouts ON rollouts (started_at) WHERE finished_at IS NULL")
    op.execute("CREATE INDEX rollouts_of_group ON rollouts (group_id) WHERE group_id IS NOT NULL")
    _add_tables()


def _add_tables() -> None:
    op.execute(
        """
        CREATE TABLE decisions (
            rollout uuid NOT NULL REFERENCES rollouts,
            number int NOT NULL,
            at timestamptz NOT NULL,
            action text NOT NULL,
            stage int NOT NULL,
            percent double precision NOT NULL,
            reason text NOT NULL,
            actor text NOT NULL,
            gates jsonb NOT NULL,
            PRIMARY KEY (rollout, number)
        )
        """
    )
    op.execute(
        """
        CREATE TABLE windows (
            tenant text NOT NULL,
            model text NOT NULL,
            second bigint NOT NULL,
            body jsonb NOT NULL,
            PRIMARY KEY (tenant, model, second)
        )
        """
    )
    op.execute("CREATE INDEX windows_by_age ON windows (second)")
    op.execute(
        """
        CREATE TABLE policies (
            tenant text NOT NULL,
            model text NOT NULL,
            policy jsonb NOT NULL,
            actor text NOT NULL,
            at timestamptz NOT NULL,
            PRIMARY KEY (tenant, model)
        )
        """
    )
