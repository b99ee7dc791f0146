"""Tenants, artifacts, models, versions, aliases, timeline."""

from alembic import op

from lepton_common.db import create_shared_tables

revision = "0001"
down_revision = None

_TABLES = (
    """
    CREATE TABLE tenants (
        name text PRIMARY KEY,
        created_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    "INSERT INTO tenants (name) VALUES ('default')",
    # Blobs are shared between tenants; these rows say who has proved to have the bytes by uploading them.
    """
    CREATE TABLE artifacts (
        tenant text NOT NULL REFERENCES tenants,
        sha256 text NOT NULL,
        size_bytes bigint NOT NULL,
        format text NOT NULL,
        signature jsonb NOT NULL,
        created_at timestamptz NOT NULL,
        PRIMARY KEY (tenant, sha256)
    )
    """,
    """
    CREATE TABLE models (
        tenant text NOT NULL REFERENCES tenants,
        name text NOT NULL,
        latest_version integer NOT NULL DEFAULT 0,
        created_at timestamptz NOT NULL,
        PRIMARY KEY (tenant, name)
    )
    """,
    """
    CREATE TABLE versions (
        tenant text NOT NULL,
        model text NOT NULL,
        version integer NOT NULL,
        sha256 text NOT NULL,
        batching jsonb NOT NULL,
        metrics jsonb NOT NULL,
        labels jsonb NOT NULL,
        state text NOT NULL,
        state_reason text NOT NULL,
        created_at timestamptz NOT NULL,
        created_by text NOT NULL,
        PRIMARY KEY (tenant, model, version),
        UNIQUE (tenant, model, sha256),
        FOREIGN KEY (tenant, model) REFERENCES models (tenant, name),
        FOREIGN KEY (tenant, sha256) REFERENCES artifacts
    )
    """,
    """
    CREATE TABLE aliases (
        tenant text NOT NULL,
        model text NOT NULL,
        alias text NOT NULL,
        version integer NOT NULL,
        PRIMARY KEY (tenant, model, alias),
        FOREIGN KEY (tenant, model, version) REFERENCES versions
    )
    """,
    """
    CREATE TABLE timeline (
        seq bigserial PRIMARY KEY,
        id uuid NOT NULL UNIQUE,
        tenant text NOT NULL,
        model text NOT NULL,
        at timestamptz NOT NULL,
        type text NOT NULL,
        version integer,
        actor text NOT NULL,
        reason text NOT NULL,
        evidence jsonb NOT NULL
    )
    """,
    "CREATE INDEX timeline_of_model ON timeline (tenant, model, at, seq)",
)


def upgrade() -> None:
    create_shared_tables(op)
    for statement in _TABLES:
        op.execute(statement)
