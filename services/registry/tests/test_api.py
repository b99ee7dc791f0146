"""The registry through its front door."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from lepton_common.events import ModelCreated, VersionRegistered
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import positive_data_acceptance

from .conftest import OPERATOR, Registry, model_bytes, until


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def upload(client: httpx.AsyncClient, data: bytes) -> str:
    (await client.put(f"/v1/artifacts/{sha256(data)}", content=data)).raise_for_status()
    return sha256(data)


async def push(client: httpx.AsyncClient, model: str, data: bytes, **settings: Any) -> dict[str, Any]:
    digest = await upload(client, data)
    answer = await client.post(f"/v1/models/{model}/versions", json={"sha256": digest, **settings})
    version: dict[str, Any] = answer.raise_for_status().json()
    return version


def problem(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == status
    return str(answer.json()["detail"])


# --- artifacts --------------------------------------------------------------------------------------------------------


async def test_artifact_is_stored_with_its_signature_and_comes_back_whole(registry: Registry) -> None:
    client, data = await registry.tenant("acme"), model_bytes()
    answer = await client.put(f"/v1/artifacts/{sha256(data)}", content=data)
    assert answer.status_code == 201
    assert answer.json()["size_bytes"] == len(data)
    assert answer.json()["signature"]["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert (await client.put(f"/v1/artifacts/{sha256(data)}", content=data)).status_code == 200
    assert (await client.head(f"/v1/artifacts/{sha256(data)}")).status_code == 200
    assert (await client.get(f"/v1/artifacts/{sha256(data)}")).content == data
    assert not [path for path in registry.settings.staging.rglob("*") if path.is_file()]


async def test_upload_is_resumed_where_its_connection_broke(registry: Registry) -> None:
    client, data = await registry.tenant("acme"), model_bytes(padding=3 << 20)
    path, total = f"/v1/artifacts/{sha256(data)}", len(data)
    half = total // 2

    async def offset() -> int:
        head = await client.head(path)
        assert head.status_code == 404
        return int(head.headers["upload-offset"])

    async def some_is_there() -> bool:
        return await offset() > 0

    async def breaks() -> AsyncIterator[bytes]:
        yield data[:half]
        await until(some_is_there)
        raise ConnectionResetError

    async def send(first: int, last: int, content: Any) -> httpx.Response:
        return await client.put(path, content=content, headers={"content-range": f"bytes {first}-{last}/{total}"})

    with pytest.raises(ConnectionResetError):
        await send(0, total - 1, breaks())
    wrong = await send(half + 1, total - 1, data[half + 1 :])
    there = int(wrong.headers["upload-offset"])
    assert f"continues at byte {there}" in problem(wrong, 409)
    assert 0 < there <= half
    part = await send(there, total - 2, data[there:-1])
    assert part.status_code == 202
    assert part.json() == {"sha256": sha256(data), "offset": total - 1, "total_bytes": total}
    assert await offset() == total - 1
    assert (await send(total - 1, total - 1, data[-1:])).status_code == 201
    assert (await client.head(path)).status_code == 200


async def test_upload_whose_last_answer_was_lost_is_finished_by_asking(registry: Registry) -> None:
    client, data = await registry.tenant("acme"), model_bytes()
    folder = registry.settings.staging / "acme"
    folder.mkdir(parents=True)
    (folder / sha256(data)).write_bytes(data)  # What a kill -9 leaves between the last byte and the answer.
    head = await client.head(f"/v1/artifacts/{sha256(data)}")
    assert (head.status_code, head.headers["upload-offset"]) == (404, str(len(data)))
    answer = await client.put(f"/v1/artifacts/{sha256(data)}", headers={"content-range": f"bytes */{len(data)}"})
    assert answer.status_code == 201


async def test_wrong_digest_is_refused_and_nothing_is_stored(registry: Registry) -> None:
    client, data = await registry.tenant("acme"), model_bytes()
    answer = await client.put(f"/v1/artifacts/{'0' * 64}", content=data)
    assert f"have the sha256 {sha256(data)}" in problem(answer, 400)
    head = await client.head(f"/v1/artifacts/{'0' * 64}")
    assert (head.status_code, head.headers["upload-offset"]) == (404, "0")
    assert not [path for path in Path(registry.settings.blobs).rglob("*") if path.is_file()]  # noqa: ASYNC240 - a test may wait


async def test_what_is_no_model_is_refused_and_nothing_is_stored(registry: Registry) -> None:
    client, data = await registry.tenant("acme"), b"PK\x03\x04 not a model"
    assert "not an ONNX model" in problem(await client.put(f"/v1/artifacts/{sha256(data)}", content=data), 400)
    assert (await client.head(f"/v1/artifacts/{sha256(data)}")).headers["upload-offset"] == "0"
    assert not [path for path in Path(registry.settings.blobs).rglob("*") if path.is_file()]  # noqa: ASYNC240 - a test may wait


async def test_artifact_over_the_limit_is_refused(registry: Registry) -> None:
    client, data = await registry.tenant("acme"), bytes(registry.settings.max_artifact_bytes + 1)
    refused = problem(await client.put(f"/v1/artifacts/{sha256(data)}", content=data), 413)
    assert str(registry.settings.max_artifact_bytes) in refused


async def test_same_bytes_uploaded_at_once_are_stored_once(registry: Registry) -> None:
    client, data = await registry.tenant("acme"), model_bytes()
    answers = await asyncio.gather(*(client.put(f"/v1/artifacts/{sha256(data)}", content=data) for _ in range(4)))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 201]


async def test_knowing_a_digest_gives_no_foreign_artifact(registry: Registry) -> None:
    acme, other = await registry.tenant("acme"), await registry.tenant("other")
    digest = await upload(acme, model_bytes())
    assert (await other.head(f"/v1/artifacts/{digest}")).status_code == 404
    problem(await other.get(f"/v1/artifacts/{digest}"), 404)
    problem(await other.post("/v1/models/m/versions", json={"sha256": digest}), 404)
    await push(other, "m", model_bytes())


async def test_lost_or_damaged_bytes_are_healed_by_the_next_upload(registry: Registry) -> None:
    client, data = await registry.tenant("acme"), model_bytes()
    digest = await upload(client, data)
    (blob,) = (path for path in Path(registry.settings.blobs).rglob("*") if path.is_file())  # noqa: ASYNC240 - a test may wait
    blob.write_bytes(b"x" * len(data))
    with pytest.raises(httpx.RemoteProtocolError):
        await client.get(f"/v1/artifacts/{digest}")
    head = await client.head(f"/v1/artifacts/{digest}")
    assert (head.status_code, head.headers["upload-offset"]) == (404, "0")
    await upload(client, data)
    assert (await client.get(f"/v1/artifacts/{digest}")).content == data
    blob.unlink()
    assert "lost" in problem(await client.get(f"/v1/artifacts/{digest}"), 404)
    assert (await client.head(f"/v1/artifacts/{digest}")).status_code == 404
    await upload(client, data)
    assert (await client.get(f"/v1/artifacts/{digest}")).content == data


# --- models and versions ----------------------------------------------------------------------------------------------


async def test_first_push_creates_the_model_and_says_so(registry: Registry) -> None:
    client = await registry.tenant("acme")
    settings = {"batching": {"max_rows": 8}, "metrics": {"accuracy": 0.97}, "labels": {"team": "vision"}}
    version = await push(client, "digits", model_bytes(), **settings)
    assert version == (await client.get("/v1/models/digits/versions/1")).json()
    assert (version["version"], version["state"], version["tenant"]) == (1, "registered", "acme")
    assert (version["metrics"], version["labels"]) == ({"accuracy": 0.97}, {"team": "vision"})
    assert version["batching"] == {"max_rows": 8, "max_queued_rows": 4096}
    model = (await client.get("/v1/models/digits")).json()
    assert (model["name"], model["latest_version"], model["aliases"]) == ("digits", 1, {})
    created, registered = await registry.bus.first(2)
    assert isinstance(created, ModelCreated)
    assert isinstance(registered, VersionRegistered)
    assert (registered.tenant, registered.model, registered.version) == ("acme", "digits", 1)
    assert (registered.sha256, registered.batching.max_rows, registered.deploy) == (version["sha256"], 8, True)
    assert registered.actor == version["created_by"]


async def test_repeated_push_returns_the_same_version(registry: Registry) -> None:
    client = await registry.tenant("acme")
    first = await push(client, "digits", model_bytes(1))
    second = await push(client, "digits", model_bytes(2), deploy=False)
    again = await client.post(
        "/v1/models/digits/versions", json={"sha256": first["sha256"], "labels": {"new": "label"}}
    )
    assert again.status_code == 200
    assert again.json() == first
    assert second["version"] == 2
    events = [each for each in await registry.bus.first(3) if isinstance(each, VersionRegistered)]
    assert [(each.version, each.deploy) for each in events] == [(1, True), (2, False)]


async def test_concurrent_pushes_are_numbered_without_gaps(registry: Registry) -> None:
    client = await registry.tenant("acme")
    digests = [await upload(client, model_bytes(n)) for n in range(4)]
    answers = await asyncio.gather(
        *(client.post("/v1/models/digits/versions", json={"sha256": each}) for each in digests * 2)
    )
    assert sorted(answer.status_code for answer in answers) == [200] * 4 + [201] * 4
    numbers = {answer.json()["sha256"]: answer.json()["version"] for answer in answers}
    assert sorted(numbers.values()) == [1, 2, 3, 4]
    told = [each.version for each in await registry.bus.first(5) if isinstance(each, VersionRegistered)]
    assert told == [1, 2, 3, 4]


async def test_version_of_bytes_that_were_not_uploaded_is_refused(registry: Registry) -> None:
    client = await registry.tenant("acme")
    answer = await client.post("/v1/models/digits/versions", json={"sha256": "0" * 64})
    assert "upload it first" in problem(answer, 404)
    problem(await client.get("/v1/models/digits"), 404)


async def test_foreign_models_do_not_exist(registry: Registry) -> None:
    acme, other = await registry.tenant("acme"), await registry.tenant("other")
    await push(acme, "digits", model_bytes())
    for path in ("", "/versions", "/versions/1", "/timeline"):
        assert (await acme.get(f"/v1/models/digits{path}")).status_code == 200
        assert "no " in problem(await other.get(f"/v1/models/digits{path}"), 404)
    assert (await other.get("/v1/models")).json() == {"items": [], "next": None}


async def test_lists_come_in_pages(registry: Registry) -> None:
    client = await registry.tenant("acme")
    for n in range(3):
        version = await push(client, "digits", model_bytes(n))
    for n in range(4):
        await client.post(f"/v1/models/model-{n}/versions", json={"sha256": version["sha256"]})

    async def walk(path: str, field: str) -> list[Any]:
        found: list[Any] = []
        page: dict[str, Any] = {"next": None}
        while not found or page["next"]:
            params = {"limit": "2"} | ({"after": page["next"]} if page["next"] else {})
            page = (await client.get(path, params=params)).raise_for_status().json()
            assert len(page["items"]) <= 2
            found += [each[field] for each in page["items"]]
        return found

    assert await walk("/v1/models", "name") == ["digits", *(f"model-{n}" for n in range(4))]
    assert await walk("/v1/models/digits/versions", "version") == [1, 2, 3]


# --- everything -------------------------------------------------------------------------------------------------------

# A digest that the body does not have, or an expiry in the past: wrong, but no schema can say so.
WRONG_BEYOND_SCHEMA = {"PUT /v1/artifacts/{sha256}", "POST /v1/keys"}

OPERATIONS = {
    "GET /v1/tenants",
    "POST /v1/tenants",
    "GET /v1/keys",
    "POST /v1/keys",
    "DELETE /v1/keys/{key_id}",
    "POST /v1/keys/{key_id}/rotate",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "GET /v1/models/{model}/versions",
    "POST /v1/models/{model}/versions",
    "GET /v1/models/{model}/versions/{version}",
    "GET /v1/models/{model}/timeline",
    "PUT /v1/artifacts/{sha256}",
    "HEAD /v1/artifacts/{sha256}",
    "GET /v1/artifacts/{sha256}",
}


async def test_openapi_tells_no_lies(registry: Registry) -> None:
    client = await registry.client()
    await push(client, "digits", model_bytes())

    def examine() -> set[str]:
        schema = schemathesis.openapi.from_url(f"{registry.url}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
        for operation in operations:
            check_operation(operation)
        return {operation.label for operation in operations}

    assert await asyncio.to_thread(examine) == OPERATIONS


def check_operation(operation: Any) -> None:
    """Whatever fits or misses the operation's schema, its answers are those that the schema tells of."""
    excluded = [positive_data_acceptance] if operation.label in WRONG_BEYOND_SCHEMA else []

    @hypothesis_settings(max_examples=15, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def check(case: Any) -> None:
        case.call_and_validate(headers={"Authorization": f"Bearer {OPERATOR}"}, excluded_checks=excluded)

    check()
