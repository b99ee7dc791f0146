"""Tenants and keys, through the registry's front door."""

import asyncio
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from lepton_common.auth import new_secret
from lepton_common.db import Database
from lepton_common.events import AccessRefused, KeyCreated, KeyRevoked, KeyRotated, KeysUsed, TenantCreated
from lepton_registry.handlers import on_keys_used

from .conftest import OPERATOR, Registry, model_bytes, until, until_known
from .test_api import problem, push


async def test_only_the_operator_makes_tenants(registry: Registry) -> None:
    operator = await registry.client()
    assert (await operator.post("/v1/tenants", json={"name": "acme"})).status_code == 201
    assert (await operator.post("/v1/tenants", json={"name": "acme"})).status_code == 200
    assert [each["name"] for each in (await operator.get("/v1/tenants")).json()] == ["acme", "default"]
    admin = await registry.tenant("acme", "admin")
    assert "only an admin key of the tenant 'default'" in problem(
        await admin.post("/v1/tenants", json={"name": "more"}), 403
    )
    assert [each["name"] for each in (await admin.get("/v1/tenants")).json()] == ["acme"]


async def test_key_shows_its_secret_once_and_opens_until_it_is_revoked(registry: Registry) -> None:
    operator = await registry.client()
    answer = await operator.post("/v1/keys", json={"name": "ci", "scopes": ["read"]})
    assert answer.status_code == 201
    made = answer.json()
    assert made["secret"].startswith(made["prefix"])
    client = await registry.client(made["secret"])
    await until_known(client)
    listed = (await operator.get("/v1/keys")).json()
    assert {**listed[-1], "secret": made["secret"]} == made
    assert made["secret"] not in (await operator.get("/v1/keys")).text
    assert (await client.get("/v1/models")).status_code == 200
    assert (await operator.delete(f"/v1/keys/{made['id']}")).status_code == 204

    async def is_revoked() -> bool:
        return (await client.get("/v1/models")).status_code == 401

    await until(is_revoked)
    problem(await operator.delete(f"/v1/keys/{made['id']}"), 404)


async def test_repeated_request_for_a_key_makes_no_second_one(registry: Registry) -> None:
    operator = await registry.client()
    answers = await asyncio.gather(*(operator.post("/v1/keys", json={"name": "ci"}) for _ in range(5)))
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409, 409]
    assert [each["name"] for each in (await operator.get("/v1/keys")).json()] == ["bootstrap", "ci"]


async def test_admin_of_a_tenant_manages_its_own_keys_and_sees_no_others(registry: Registry) -> None:
    admin, other = await registry.tenant("acme", "admin"), await registry.tenant("other", "admin")
    own = (await admin.post("/v1/keys", json={"name": "own"})).raise_for_status().json()
    assert own["tenant"] == "acme"
    problem(await other.delete(f"/v1/keys/{own['id']}"), 404)
    problem(await other.get("/v1/keys", params={"tenant": "acme"}), 404)
    problem(await other.post("/v1/keys", json={"name": "spy", "tenant": "acme"}), 404)
    assert "own" not in {each["name"] for each in (await other.get("/v1/keys")).json()}
    operator = await registry.client()
    assert "own" in {each["name"] for each in (await operator.get("/v1/keys", params={"tenant": "acme"})).json()}
    problem(await operator.post("/v1/keys", json={"name": "lost", "tenant": "nobody"}), 404)


async def test_key_that_has_expired_opens_nothing(registry: Registry) -> None:
    operator = await registry.client()
    past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    assert "expires_at" in problem(await operator.post("/v1/keys", json={"name": "old", "expires_at": past}), 400)
    soon = (datetime.now(UTC) + timedelta(seconds=1)).isoformat()
    made = (await operator.post("/v1/keys", json={"name": "soon", "scopes": ["read"], "expires_at": soon})).json()
    client = await registry.client(made["secret"])

    async def has_expired() -> bool:
        answer = await client.get("/v1/models")
        return answer.status_code == 401 and "expired" in problem(answer, 401)

    await until(has_expired)


@pytest.mark.parametrize(
    ("scope", "status"),
    [
        ("infer", (403, 403, 403)),
        ("test", (403, 403, 403)),
        ("read", (200, 403, 403)),
        ("deploy", (200, 404, 403)),
        ("admin", (200, 404, 200)),
    ],
)
async def test_each_scope_opens_its_own_doors(registry: Registry, scope: str, status: tuple[int, int, int]) -> None:
    client = await registry.tenant("acme", scope)
    version = await client.post("/v1/models/m/versions", json={"sha256": "0" * 64})
    answers = [await client.get("/v1/models"), version, await client.get("/v1/keys")]
    assert tuple(answer.status_code for answer in answers) == status


async def test_unknown_or_missing_key_is_turned_away(registry: Registry) -> None:
    problem(await (await registry.client(new_secret()[0])).get("/v1/models"), 401)
    async with httpx.AsyncClient(base_url=registry.url) as nobody:
        problem(await nobody.get("/v1/models"), 401)
        assert (await nobody.get("/v1/models", headers={"x-api-key": OPERATOR})).status_code == 200


async def test_key_for_some_models_sees_no_others_and_says_so_whether_they_exist_or_not(registry: Registry) -> None:
    owner = await registry.tenant("acme", "deploy")
    for number, model in enumerate(("fraud-1", "fraud-2", "secret")):
        await push(owner, model, model_bytes(number))
    operator = await registry.client()
    wanted = {"name": "some", "tenant": "acme", "scopes": ["deploy"], "models": ["fraud-?", "frost*"]}
    client = await registry.client((await operator.post("/v1/keys", json=wanted)).raise_for_status().json()["secret"])
    await until_known(client)
    asked = ({"limit": "1"}, {"limit": "1", "after": "fraud-1"})
    pages = [(await client.get("/v1/models", params=params)).json() for params in asked]
    assert [page["items"][0]["name"] for page in pages] == ["fraud-1", "fraud-2"]
    assert [page["next"] for page in pages] == ["fraud-1", None]
    assert (await client.get("/v1/models/fraud-2/versions")).status_code == 200
    for model in ("secret", "nobody-has-this"):
        for path in ("", "/versions", "/versions/1", "/timeline"):
            told = problem(await client.get(f"/v1/models/{model}{path}"), 403)
            assert told == f"this API key is for the models fraud-?, frost* only, and '{model}' is none of them"
        problem(await client.post(f"/v1/models/{model}/versions", json={"sha256": "0" * 64}), 403)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"models": ["Fraud"]}, "body.models.0"),
        ({"models": ["fraud-[ab]"]}, "body.models.0"),
        ({"models": ["fraud-*"], "scopes": ["infer", "admin"]}, "models"),
        ({"limits": {"burst": 5}}, "limits.rate_per_s"),
        ({"limits": {"rate_per_s": 0}}, "body.limits.rate_per_s"),
        ({"limits": {"per_hour": 5}}, "body.limits.per_hour"),
    ],
)
async def test_key_that_makes_no_sense_is_refused_naming_what_is_wrong(
    registry: Registry, wrong: dict[str, object], told: str
) -> None:
    operator = await registry.client()
    assert told in problem(await operator.post("/v1/keys", json={"name": "odd", **wrong}), 400)


async def test_rotated_key_leaves_its_rights_to_another_and_ends(registry: Registry) -> None:
    operator = await registry.client()
    rights = {"scopes": ["read"], "models": ["fraud-*"], "limits": {"rate_per_s": 2.5, "per_day": 1000}}
    old = (await operator.post("/v1/keys", json={"name": "ci", **rights})).raise_for_status().json()
    path = f"/v1/keys/{old['id']}/rotate"
    answers = await asyncio.gather(*(operator.post(path, json={"overlap_s": 1}) for _ in range(4)))
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409]
    new = next(answer.json() for answer in answers if answer.status_code == 201)
    before, after = await registry.client(old["secret"]), await registry.client(new["secret"])
    await until_known(after)
    listed = {each["id"]: each for each in (await operator.get("/v1/keys")).json()}
    assert listed[old["id"]]["replaced_by"] == new["id"]
    same = ("name", "scopes", "models", "limits")
    assert [listed[new["id"]][each] for each in same] == [old[each] for each in same]
    assert new["secret"] != old["secret"]

    async def has_ended() -> bool:
        return "expired" in (await before.get("/v1/models")).text

    await until(has_ended)
    assert (await after.get("/v1/models")).status_code == 200
    assert new["id"] in problem(await operator.post(path, json={}), 409)
    problem(await operator.post(f"/v1/keys/{'0' * 16}/rotate", json={}), 404)
    other = await registry.tenant("other", "admin")
    problem(await other.post(f"/v1/keys/{new['id']}/rotate", json={}), 404)


async def test_every_change_and_every_refusal_is_told_to_the_audit_without_a_secret(registry: Registry) -> None:
    operator = await registry.client()
    await operator.post("/v1/tenants", json={"name": "acme"})
    wanted = {"name": "ci", "tenant": "acme", "scopes": ["read"], "limits": {"per_day": 7}}
    key = (await operator.post("/v1/keys", json=wanted)).json()
    new = (await operator.post(f"/v1/keys/{key['id']}/rotate", json={})).json()
    client, nobody = await registry.client(new["secret"]), await registry.client(new_secret()[0])
    await until_known(client)
    for _ in range(300):
        await client.delete(f"/v1/keys/{key['id']}")
    await nobody.get("/v1/models/lp_not-for-the-audit")
    await operator.delete(f"/v1/keys/{key['id']}")

    def is_whole(audit: list[object]) -> bool:
        refused = sum(each.count for each in audit if isinstance(each, AccessRefused) and each.key == new["id"])
        return refused == 300 and any(isinstance(each, KeyRevoked) for each in audit)

    audit = await registry.bus.told(lambda audit: is_whole([*audit]))
    tenant, created, rotated, *rest = [each for each in audit if not isinstance(each, KeysUsed)]
    assert isinstance(tenant, TenantCreated)
    assert (tenant.tenant, tenant.actor, tenant.peer) == ("acme", "bootstrap", "127.0.0.1")
    assert isinstance(created, KeyCreated)
    assert (created.key, created.scopes, created.limits) == (key["id"], ("read",), {"per_day": 7})
    assert isinstance(rotated, KeyRotated)
    assert (rotated.key, rotated.replaced_by) == (key["id"], new["id"])
    assert [each.key for each in rest if isinstance(each, KeyRevoked)] == [key["id"]]
    refused = [each for each in rest if isinstance(each, AccessRefused)]
    # Three hundred within a second or a few: they are counted, not told one by one.
    [*mine] = [each for each in refused if each.key == new["id"]]
    assert len(mine) < 30
    assert {(each.tenant, each.status, each.what) for each in mine} == {("acme", 403, "DELETE /v1/keys/{key_id}")}
    text = "".join(each.model_dump_json() for each in audit)
    assert "lp_not-for-the-audit" not in text
    assert all(secret not in text for secret in (OPERATOR, key["secret"], new["secret"]))


async def test_last_use_of_a_key_is_listed(registry: Registry) -> None:
    operator = await registry.client()
    key = (await operator.post("/v1/keys", json={"name": "ci"})).json()
    db = Database(registry.settings.postgres_dsn, "registry")
    used = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    async with db.transaction() as tx:
        for at in (used, used - timedelta(minutes=1)):  # The gateways are not in step.
            await on_keys_used(KeysUsed(tenant="default", keys={key["id"]: at}), tx)
    await db.close()
    listed = {each["name"]: each["last_used_at"] for each in (await operator.get("/v1/keys")).json()}
    assert listed == {"bootstrap": None, "ci": "2026-01-02T03:04:05Z"}
