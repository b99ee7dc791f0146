"""API keys as etcd holds them: written here only, mirrored by every service."""

import contextlib
from dataclasses import dataclass
from datetime import datetime

from lepton_common.auth import DEFAULT_TENANT
from lepton_common.errors import Conflict, NotFound
from lepton_common.etcd import EtcdClient, Versioned
from lepton_common.records import KEYS, KeyRecord, Scope

from lepton_registry.domain import BOOTSTRAP_PREFIX

_ID_CHARS = 16


@dataclass(frozen=True, slots=True)
class Found:
    """A key, and how etcd holds it."""

    record: KeyRecord
    stored: Versioned


def id_of(sha256: str) -> str:
    """The id of the key with that digest: enough of it to be unique, and of no use to find the secret."""
    return sha256[:_ID_CHARS]


async def list_keys(etcd: EtcdClient, tenant: str) -> list[KeyRecord]:
    """The tenant's keys, the oldest first."""
    found, _ = await etcd.list(KEYS)
    records = (KeyRecord.model_validate_json(each.value) for each in found)
    return sorted((each for each in records if each.tenant == tenant), key=lambda each: (each.created_at, each.id))


async def add_key(etcd: EtcdClient, sha256: str, record: KeyRecord) -> None:
    """The key is in etcd, hence valid wherever a service has heard of it. Raises Conflict when it was there."""
    await etcd.put_if_unchanged(KEYS + sha256, record.model_dump_json().encode(), 0)


async def replace_key(etcd: EtcdClient, old: Found, ending: KeyRecord, sha256: str, successor: KeyRecord) -> None:
    """The old key is as `ending` has it and the successor is there, both or neither. Raises Conflict."""
    records = {old.stored.key: ending, KEYS + sha256: successor}
    await etcd.put_together({key: each.model_dump_json().encode() for key, each in records.items()}, old.stored)


async def get_key(etcd: EtcdClient, key_id: str) -> Found:
    """The key with that id. Raises NotFound."""
    found, _ = await etcd.list(KEYS + key_id)
    if not found:
        raise NotFound(f"no key {key_id!r}")
    return Found(KeyRecord.model_validate_json(found[0].value), found[0])


async def remove_key(etcd: EtcdClient, key: Found) -> None:
    """The key is no longer in etcd, hence refused everywhere as soon as the services hear of it."""
    await etcd.delete(key.stored.key)


async def ensure_bootstrap_key(etcd: EtcdClient, sha256: str, now: datetime) -> None:
    """The operator's first key, of which only the digest is known here, exists."""
    record = KeyRecord(
        id=id_of(sha256),
        prefix=BOOTSTRAP_PREFIX,
        tenant=DEFAULT_TENANT,
        name="bootstrap",
        scopes=frozenset(Scope),
        created_at=now,
    )
    with contextlib.suppress(Conflict):
        await add_key(etcd, sha256, record)
