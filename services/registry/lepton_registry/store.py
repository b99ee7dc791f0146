"""What the registry remembers, in PostgreSQL."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from lepton_common.db import Tx, like
from lepton_common.errors import NotFound
from lepton_common.events import Batching
from lepton_common.signature import Signature
from lepton_common.types import ModelRef, VersionRef
from sqlalchemy import RowMapping

from lepton_registry.domain import Artifact, Entry, Model, Tenant, Version, VersionState

# --- tenants ----------------------------------------------------------------------------------------------------------


async def add_tenant(tx: Tx, name: str) -> bool:
    """The tenant exists; True when it did not before."""
    result = await tx.execute("INSERT INTO tenants (name) VALUES (:name) ON CONFLICT DO NOTHING", {"name": name})
    return result.rowcount == 1


async def get_tenant(tx: Tx, name: str) -> Tenant:
    return _tenant(name, await _one(tx, "SELECT * FROM tenants WHERE name = :name", {"name": name}))


async def lock_tenant(tx: Tx, name: str) -> Tenant:
    return _tenant(name, await _one(tx, "SELECT * FROM tenants WHERE name = :name FOR UPDATE", {"name": name}))


async def list_tenants(tx: Tx) -> list[Tenant]:
    return [Tenant(**row) for row in await _rows(tx, "SELECT * FROM tenants ORDER BY name", {})]


# --- keys, of which etcd has the rest ---------------------------------------------------------------------------------


async def save_key_uses(tx: Tx, uses: Mapping[str, datetime]) -> None:
    """Each key's last use is known; an older one changes nothing."""
    await tx.execute(
        """
        INSERT INTO key_uses (key, last_used_at)
        SELECT * FROM unnest(CAST(:keys AS text[]), CAST(:times AS timestamptz[]))
        ON CONFLICT (key) DO UPDATE SET last_used_at = greatest(key_uses.last_used_at, excluded.last_used_at)
        """,
        {"keys": sorted(uses), "times": [uses[key] for key in sorted(uses)]},
    )


async def list_key_uses(tx: Tx, keys: Sequence[str]) -> dict[str, datetime]:
    rows = await _rows(tx, "SELECT * FROM key_uses WHERE key = ANY (CAST(:keys AS text[]))", {"keys": list(keys)})
    return {row["key"]: row["last_used_at"] for row in rows}


async def remove_key_use(tx: Tx, key: str) -> None:
    await tx.execute("DELETE FROM key_uses WHERE key = :key", {"key": key})


# --- artifacts --------------------------------------------------------------------------------------------------------


async def add_artifact(tx: Tx, artifact: Artifact) -> bool:
    """The tenant has the artifact; True when it had not before."""
    result = await tx.execute(
        """
        INSERT INTO artifacts (tenant, sha256, size_bytes, format, signature, created_at)
        VALUES (:tenant, :sha256, :size_bytes, :format, CAST(:signature AS jsonb), :created_at)
        ON CONFLICT DO NOTHING
        """,
        {
            "tenant": artifact.tenant,
            "sha256": artifact.sha256,
            "size_bytes": artifact.size_bytes,
            "format": artifact.format,
            "signature": json.dumps(artifact.signature.to_dict()),
            "created_at": artifact.created_at,
        },
    )
    return result.rowcount == 1


async def find_artifact(tx: Tx, tenant: str, sha256: str) -> Artifact | None:
    row = await _one(
        tx,
        "SELECT * FROM artifacts WHERE tenant = :tenant AND sha256 = :sha256",
        {"tenant": tenant, "sha256": sha256},
    )
    return Artifact(**{**row, "signature": Signature.from_dict(row["signature"])}) if row else None


async def get_artifact(tx: Tx, tenant: str, sha256: str) -> Artifact:
    artifact = await find_artifact(tx, tenant, sha256)
    if artifact is None:
        raise NotFound(f"no artifact {sha256}; upload it first with PUT /v1/artifacts/{sha256}")
    return artifact


# --- models -----------------------------------------------------------------------------------------------------------

_MODELS = """
    SELECT models.*, COALESCE(found.aliases, CAST('{}' AS jsonb)) AS aliases
    FROM models LEFT JOIN LATERAL (
        SELECT jsonb_object_agg(alias, version) AS aliases
        FROM aliases WHERE aliases.tenant = models.tenant AND aliases.model = models.name
    ) AS found ON true
"""


async def add_model(tx: Tx, model: ModelRef, at: datetime) -> bool:
    """The model exists; True when it did not before."""
    result = await tx.execute(
        "INSERT INTO models (tenant, name, created_at) VALUES (:tenant, :model, :at) ON CONFLICT DO NOTHING",
        {**_ref(model), "at": at},
    )
    return result.rowcount == 1


async def get_model(tx: Tx, model: ModelRef) -> Model:
    row = await _one(tx, f"{_MODELS} WHERE models.tenant = :tenant AND models.name = :model", _ref(model))
    return _model(model, row)


async def lock_model(tx: Tx, model: ModelRef) -> Model:
    """The model; its row is held, so its facts are decided, and told, one after the other."""
    row = await _one(
        tx, f"{_MODELS} WHERE models.tenant = :tenant AND models.name = :model FOR UPDATE OF models", _ref(model)
    )
    return _model(model, row)


async def list_models(tx: Tx, tenant: str, after: str, limit: int, patterns: Sequence[str] = ()) -> list[Model]:
    """Models by name that a pattern matches, those after that name."""
    rows = await _rows(
        tx,
        f"""
        {_MODELS} WHERE models.tenant = :tenant AND models.name > :after
        AND models.name LIKE ANY (CAST(:patterns AS text[])) ORDER BY models.name LIMIT :limit
        """,
        {"tenant": tenant, "after": after, "limit": limit, "patterns": like(patterns)},
    )
    return [Model(**row) for row in rows]


async def save_alias(tx: Tx, version: VersionRef, alias: str) -> None:
    """The model's alias points to the version."""
    await tx.execute(
        """
        INSERT INTO aliases (tenant, model, alias, version) VALUES (:tenant, :model, :alias, :version)
        ON CONFLICT (tenant, model, alias) DO UPDATE SET version = excluded.version
        """,
        {**_version_ref(version), "alias": alias},
    )


# --- versions ---------------------------------------------------------------------------------------------------------

_VERSIONS = """
    SELECT versions.*, artifacts.size_bytes, artifacts.format, artifacts.signature
    FROM versions JOIN artifacts USING (tenant, sha256)
    WHERE versions.tenant = :tenant AND versions.model = :model
"""


async def add_version(tx: Tx, version: Version) -> None:
    """The version is the model's newest. The model's row is locked by the caller."""
    await tx.execute(
        """
        INSERT INTO versions (tenant, model, version, sha256, batching, metrics, labels, state, state_reason,
                              created_at, created_by)
        VALUES (:tenant, :model, :version, :sha256, CAST(:batching AS jsonb), CAST(:metrics AS jsonb),
                CAST(:labels AS jsonb), :state, :state_reason, :created_at, :created_by)
        """,
        {
            "tenant": version.tenant,
            "model": version.model,
            "version": version.version,
            "sha256": version.sha256,
            "batching": version.batching.model_dump_json(),
            "metrics": json.dumps(dict(version.metrics)),
            "labels": json.dumps(dict(version.labels)),
            "state": version.state,
            "state_reason": version.state_reason,
            "created_at": version.created_at,
            "created_by": version.created_by,
        },
    )
    await tx.execute(
        "UPDATE models SET latest_version = :version WHERE tenant = :tenant AND name = :model",
        {"tenant": version.tenant, "model": version.model, "version": version.version},
    )


async def get_version(tx: Tx, version: VersionRef) -> Version:
    row = await _one(tx, f"{_VERSIONS} AND version = :version", _version_ref(version))
    if row is None:
        raise NotFound(f"no version {version.version} of model {version.model.model!r}")
    return _version(row)


async def find_version_of(tx: Tx, model: ModelRef, sha256: str) -> Version | None:
    """The model's version that is made of those bytes."""
    row = await _one(tx, f"{_VERSIONS} AND sha256 = :sha256", {**_ref(model), "sha256": sha256})
    return _version(row) if row else None


async def list_versions(tx: Tx, model: ModelRef, after: int, limit: int) -> list[Version]:
    """Versions by number, those after that number."""
    rows = await _rows(
        tx,
        f"{_VERSIONS} AND version > :after ORDER BY version LIMIT :limit",
        {**_ref(model), "after": after, "limit": limit},
    )
    return [_version(row) for row in rows]


async def save_state(tx: Tx, version: VersionRef, state: VersionState, reason: str) -> None:
    await tx.execute(
        """
        UPDATE versions SET state = :state, state_reason = :reason
        WHERE tenant = :tenant AND model = :model AND version = :version
        """,
        {**_version_ref(version), "state": state, "reason": reason},
    )


# --- timeline ---------------------------------------------------------------------------------------------------------


async def add_entry(tx: Tx, entry: Entry) -> None:
    """The fact is on its model's timeline, once."""
    await tx.execute(
        """
        INSERT INTO timeline (id, tenant, model, at, type, version, actor, reason, evidence)
        VALUES (:id, :tenant, :model, :at, :type, :version, :actor, :reason, CAST(:evidence AS jsonb))
        ON CONFLICT (id) DO NOTHING
        """,
        {
            "id": entry.id,
            "tenant": entry.tenant,
            "model": entry.model,
            "at": entry.at,
            "type": entry.type,
            "version": entry.version,
            "actor": entry.actor,
            "reason": entry.reason,
            "evidence": json.dumps(dict(entry.evidence)),
        },
    )


async def list_entries(tx: Tx, model: ModelRef, after: int, limit: int) -> list[Entry]:
    """Facts in the order in which they happened, those after the one with that `seq` (0: from the first)."""
    rows = await _rows(
        tx,
        """
        SELECT timeline.* FROM timeline
        WHERE tenant = :tenant AND model = :model AND (
            CAST(:after AS bigint) = 0 OR (at, seq) > (
                SELECT last.at, last.seq FROM timeline AS last
                WHERE last.tenant = :tenant AND last.model = :model AND last.seq = CAST(:after AS bigint)
            )
        )
        ORDER BY at, seq LIMIT :limit
        """,
        {**_ref(model), "after": after, "limit": limit},
    )
    return [Entry(**row) for row in rows]


# --- rows -------------------------------------------------------------------------------------------------------------


async def _one(tx: Tx, sql: str, params: Mapping[str, Any]) -> RowMapping | None:
    return (await tx.execute(sql, params)).mappings().one_or_none()


async def _rows(tx: Tx, sql: str, params: Mapping[str, Any]) -> list[RowMapping]:
    return list((await tx.execute(sql, params)).mappings().all())


def _ref(model: ModelRef) -> dict[str, Any]:
    return {"tenant": model.tenant, "model": model.model}


def _version_ref(version: VersionRef) -> dict[str, Any]:
    return {**_ref(version.model), "version": version.version}


def _tenant(name: str, row: RowMapping | None) -> Tenant:
    if row is None:
        raise NotFound(f"no tenant {name!r}")
    return Tenant(**row)


def _model(model: ModelRef, row: RowMapping | None) -> Model:
    if row is None:
        raise NotFound(f"no model {model.model!r}")
    return Model(**row)


def _version(row: RowMapping) -> Version:
    return Version(
        **{
            **row,
            "signature": Signature.from_dict(row["signature"]),
            "batching": Batching.model_validate(row["batching"]),
            "state": VersionState(row["state"]),
        }
    )
