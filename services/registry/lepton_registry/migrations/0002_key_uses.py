"""When keys were last used."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.execute("CREATE TABLE key_uses (key text PRIMARY KEY, last_used_at timestamptz NOT NULL)")
