"""Labels: what was right for requests that were answered before."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    # A partition for a day, by when the label was known. `id` is the message's, so that a repeat changes nothing.
    op.execute(
        """
        CREATE TABLE labels (
            tenant text NOT NULL,
            id uuid NOT NULL,
            second bigint NOT NULL,
            at timestamptz NOT NULL,
            request text,
            key text,
            model text,
            label jsonb NOT NULL,
            PRIMARY KEY (tenant, id, second)
        ) PARTITION BY RANGE (second)
        """
    )
    op.execute("CREATE INDEX labels_of_request ON labels (tenant, request) WHERE request IS NOT NULL")
    op.execute("CREATE INDEX labels_of_key ON labels (tenant, key) WHERE key IS NOT NULL")
    op.execute("CREATE INDEX labels_of_model ON labels (tenant, model, at)")
