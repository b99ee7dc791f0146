import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lepton_common.auth import Caller, Keys, authorise, check_operator, digest, new_secret, secret_of
from lepton_common.errors import Forbidden, NotFound, Unauthenticated, Unavailable
from lepton_common.etcd import EtcdClient
from lepton_common.records import KEYS, KeyRecord, Scope
from lepton_common.types import ModelRef

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
async def keys(etcd: EtcdClient) -> AsyncIterator[Keys]:
    keys = Keys(etcd)
    task = asyncio.create_task(keys.mirror.run())
    await keys.mirror.synced()
    yield keys
    task.cancel()
    await asyncio.wait([task])


async def add(etcd: EtcdClient, *scopes: Scope, expires_at: datetime | None = None) -> tuple[str, KeyRecord]:
    """A new key's secret and record, in etcd."""
    secret, sha256, prefix = new_secret()
    record = KeyRecord(
        id="k1",
        prefix=prefix,
        tenant="acme",
        name="ci",
        scopes=frozenset(scopes),
        created_at=NOW,
        expires_at=expires_at,
    )
    await etcd.put(KEYS + sha256, record.model_dump_json().encode())
    return secret, record


async def until_known(keys: Keys, secret: str, record: KeyRecord | None) -> None:
    async with asyncio.timeout(10):
        while keys.mirror.items.get(digest(secret)) != record:  # noqa: ASYNC110, only tests wait for it
            await asyncio.sleep(0.01)


async def test_a_key_says_who_calls(etcd: EtcdClient, keys: Keys) -> None:
    secret, record = await add(etcd, Scope.INFER, Scope.READ)
    await until_known(keys, secret, record)
    expected = Caller("acme", frozenset({Scope.INFER, Scope.READ}), record.id, "ci")
    assert keys.check(secret, Scope.INFER, NOW) == expected
    assert keys.check(secret, Scope.READ, NOW) == expected
    assert keys.journal.used == {"k1": NOW}


async def test_a_missing_scope_is_forbidden_and_admin_has_them_all(etcd: EtcdClient, keys: Keys) -> None:
    reader, _ = await add(etcd, Scope.READ)
    admin, record = await add(etcd, Scope.ADMIN)
    await until_known(keys, admin, record)
    with pytest.raises(Forbidden, match="'deploy'"):
        keys.check(reader, Scope.DEPLOY, NOW)
    with pytest.raises(Forbidden):
        keys.check(reader, Scope.ADMIN, NOW)
    for scope in Scope:
        assert keys.check(admin, scope, NOW).tenant == "acme"


@pytest.mark.parametrize(
    ("scope", "opened"),
    [
        (Scope.INFER, {Scope.INFER}),
        (Scope.READ, {Scope.READ}),
        (Scope.TEST, {Scope.TEST}),
        (Scope.DEPLOY, {Scope.READ, Scope.TEST, Scope.DEPLOY}),
        (Scope.ADMIN, set(Scope)),
    ],
)
def test_a_scope_opens_what_it_needs_and_no_more(scope: Scope, opened: set[Scope]) -> None:
    caller = Caller("acme", frozenset({scope}), "k1", "ci")
    assert {each for each in Scope if caller.has(each)} == opened


@given(
    pattern=st.text("ab*?-", min_size=1, max_size=8),
    model=st.text("ab-", min_size=1, max_size=8),
)
def test_a_pattern_is_for_the_names_it_matches_from_end_to_end(pattern: str, model: str) -> None:
    caller = Caller("acme", frozenset({Scope.INFER}), "k1", "ci", models=("nothing", pattern))
    expected = re.fullmatch(pattern.replace("*", ".*").replace("?", "."), model) is not None
    assert caller.sees(model) is expected
    if expected:
        authorise(caller, Scope.INFER, model=model)
        assert caller.ref(model) == ModelRef("acme", model)
    else:
        for refused in (lambda: authorise(caller, Scope.INFER, model=model), lambda: caller.ref(model)):
            with pytest.raises(Forbidden, match=f"'{re.escape(model)}' is none of them") as error:
                refused()
            assert (error.value.tenant, error.value.key_id) == ("acme", "k1")


def test_patterns_take_no_time_however_they_are_made() -> None:
    caller = Caller("acme", frozenset(), "k1", "ci", models=("*a" * 31 + "b",))
    began = time.perf_counter()
    assert not caller.sees("a" * 5000)
    assert time.perf_counter() - began < 1


def test_a_tenant_is_managed_by_its_own_admins_and_by_the_operator() -> None:
    for own, tenant in (("acme", "acme"), ("default", "acme")):
        authorise(Caller(own, frozenset({Scope.ADMIN}), "k1", "ci"), Scope.ADMIN, tenant=tenant)
    for own, tenant in (("acme", "other"), ("acme", "default")):
        with pytest.raises(NotFound, match=f"no tenant '{tenant}'"):
            authorise(Caller(own, frozenset({Scope.ADMIN}), "k1", "ci"), Scope.ADMIN, tenant=tenant)


def test_the_operator_is_an_admin_of_the_default_tenant() -> None:
    check_operator(Caller("default", frozenset({Scope.ADMIN}), "k1", "root"))
    for tenant, scope in (("acme", Scope.ADMIN), ("default", Scope.DEPLOY)):
        with pytest.raises(Forbidden, match="only an admin key of the tenant 'default'"):
            check_operator(Caller(tenant, frozenset({scope}), "k1", "ci"))


async def test_a_key_ends_at_its_expiry_also_when_it_was_used_before(etcd: EtcdClient, keys: Keys) -> None:
    secret, record = await add(etcd, Scope.READ, expires_at=NOW + timedelta(hours=1))
    await until_known(keys, secret, record)
    keys.check(secret, Scope.READ, NOW + timedelta(minutes=59))
    with pytest.raises(Unauthenticated, match="expired"):
        keys.check(secret, Scope.READ, NOW + timedelta(hours=1))


async def test_a_revoked_key_that_was_in_use_is_refused(etcd: EtcdClient, keys: Keys) -> None:
    secret, record = await add(etcd, Scope.READ)
    await until_known(keys, secret, record)
    keys.check(secret, Scope.READ, NOW)
    await etcd.delete(KEYS + digest(secret))
    await until_known(keys, secret, None)
    with pytest.raises(Unauthenticated, match="unknown"):
        keys.check(secret, Scope.READ, NOW)


async def test_a_changed_key_counts_at_once(etcd: EtcdClient, keys: Keys) -> None:
    secret, record = await add(etcd, Scope.READ)
    await until_known(keys, secret, record)
    keys.check(secret, Scope.READ, NOW)
    changed = record.model_copy(update={"scopes": frozenset({Scope.INFER})})
    await etcd.put(KEYS + digest(secret), changed.model_dump_json().encode())
    await until_known(keys, secret, changed)
    with pytest.raises(Forbidden):
        keys.check(secret, Scope.READ, NOW)


async def test_no_key_is_refused_as_unknown_before_the_table_was_read(etcd: EtcdClient) -> None:
    secret, _ = await add(etcd, Scope.READ)
    with pytest.raises(Unavailable, match="not loaded"):
        Keys(etcd).check(secret, Scope.READ, NOW)


@pytest.mark.parametrize(
    "secret", ["", "lp_", "x" * 46, "lp_" + "a" * 44, "lp_" + "a" * 42 + "ä", "lp_" + "a" * 43 + "\n"]
)
async def test_what_does_not_look_like_a_key_is_refused(keys: Keys, secret: str) -> None:
    with pytest.raises(Unauthenticated, match="not an API key"):
        keys.check(secret, Scope.READ, NOW)


async def test_guesses_do_not_fill_the_memory(keys: Keys) -> None:
    for _ in range(3):
        with pytest.raises(Unauthenticated, match="unknown"):
            keys.check(new_secret()[0], Scope.READ, NOW)
    assert keys._remembered == {}


def test_a_new_secret_is_known_only_by_its_digest() -> None:
    secret, sha256, prefix = new_secret()
    assert len(secret) == 46
    assert sha256 == hashlib.sha256(secret.encode()).hexdigest() == digest(secret)
    assert secret.startswith(prefix)
    assert len(prefix) == 11
    assert new_secret()[0] != secret


@pytest.mark.parametrize(
    ("authorization", "api_key", "secret"),
    [
        (None, None, None),
        (b"Bearer lp_a", None, "lp_a"),
        (b"bearer   lp_a ", None, "lp_a"),
        (None, b" lp_b", "lp_b"),
        (b"Bearer lp_a", b"lp_b", "lp_a"),
        (b"Bearer", None, ""),
        (b"", b"lp_b", "lp_b"),
        (b"Bearer \xff", None, "\xff"),
    ],
)
def test_a_secret_is_read_from_either_header(
    authorization: bytes | None, api_key: bytes | None, secret: str | None
) -> None:
    assert secret_of(authorization, api_key) == secret


@pytest.mark.parametrize("authorization", [b" ", b"Basic bHA6eA==", b"lp_a"])
def test_another_scheme_is_refused_with_what_to_send(authorization: bytes) -> None:
    with pytest.raises(Unauthenticated, match="Authorization: Bearer lp_"):
        secret_of(authorization, b"lp_b")
