"""The HTTP API that every service gets: whatever comes in, what goes out is an answer or a problem."""

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Any

import httpx
import pytest
import schemathesis
from fastapi import FastAPI, Request
from hypothesis import HealthCheck, given, settings
from lepton.models import Name, Number
from lepton_common import web
from lepton_common.auth import Caller, Keys
from lepton_common.errors import Conflict, Forbidden, Limited, NotFound, Unauthenticated, Unavailable
from lepton_common.etcd import EtcdClient
from lepton_common.records import Scope
from lepton_common.service import Service
from lepton_common.settings import Settings
from lepton_common.telemetry import configure
from lepton_common.web import MAX_BODY_BYTES, PROBLEM, caller, create_app
from prometheus_client import CollectorRegistry
from pydantic import BaseModel, ConfigDict
from schemathesis.core.result import Ok


class OneKey(Keys):
    """A table of one key, without etcd."""

    def check(self, secret: str, scope: Scope, now: datetime, model: str | None = None) -> Caller:
        assert now.tzinfo is not None
        if secret != "lp_right":
            raise Unauthenticated("unknown API key")
        if scope is Scope.ADMIN:
            raise Forbidden("this API key does not have the scope 'admin'")
        return Caller("acme", frozenset({scope}), "k1", "tests")


class NewThing(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: Name
    weight: Number = 1.0


@pytest.fixture
async def app() -> AsyncIterator[FastAPI]:
    telemetry = configure("things", Settings(), CollectorRegistry())
    service = Service("things", Settings(), telemetry)
    service.readiness.started = True
    etcd = EtcdClient("127.0.0.1:1")
    app = create_app(service, OneKey(etcd), unlimited=["/v1/streams/"])

    @app.post("/v1/things", status_code=201)
    async def add(thing: NewThing, who: Annotated[Caller, caller(Scope.DEPLOY)]) -> dict[str, str]:
        return {"name": thing.name, "tenant": who.tenant}

    @app.get("/v1/things/{name}")
    async def get(name: Name, who: Annotated[Caller, caller(Scope.READ)], limit: int = 1) -> dict[str, int]:
        return {"limit": limit}

    # Apart from what the fuzzer calls: it reads the strings in an app's source and tries them as inputs.
    @app.get("/v1/failing/{how}", include_in_schema=False)
    async def fail(how: str) -> None:
        raises: dict[str, Exception] = {
            "missing": NotFound("no thing 'missing'"),
            "busy": Conflict("the thing is busy"),
            "limited": Limited("too many", retry_after_s=2.5),
            "away": Unavailable("the database is not available"),
            "broken": RuntimeError("postgresql://user:password@host"),
        }
        raise raises[how]

    @app.delete("/v1/things/{name}", status_code=204)
    async def remove(name: Name, who: Annotated[Caller, caller(Scope.ADMIN)]) -> None: ...

    @app.put("/v1/streams/{name}")
    async def stream(name: Name, request: Request) -> int:
        return sum([len(chunk) async for chunk in request.stream()])

    yield app
    await etcd.close()
    telemetry.close()


@pytest.fixture
async def http(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    headers = {"authorization": "Bearer lp_right"}
    async with httpx.AsyncClient(transport=transport, base_url="http://things", headers=headers) as client:
        yield client


def told(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The problem in the answer."""
    assert answer.status_code == status
    assert answer.headers["content-type"] == PROBLEM
    body: dict[str, Any] = answer.json()
    assert body["status"] == status
    assert body["type"] == "about:blank"
    return body


@pytest.mark.parametrize(
    "content_type", ["application/json", "application/x-www-form-urlencoded", "text/plain", "multipart/form-data", ""]
)
async def test_json_is_read_whatever_the_content_type_says(http: httpx.AsyncClient, content_type: str) -> None:
    answer = await http.post("/v1/things", content=b'{"name": "a"}', headers={"content-type": content_type})
    assert (answer.status_code, answer.json()) == (201, {"name": "a", "tenant": "acme"})


async def test_json_is_read_without_a_content_type(http: httpx.AsyncClient) -> None:
    assert (await http.post("/v1/things", content=b'{"name": "a"}')).status_code == 201


async def test_each_wrong_input_is_named(http: httpx.AsyncClient) -> None:
    problem = told(await http.post("/v1/things", json={"name": "A!", "weight": "heavy", "colour": 1}), 400)
    assert [each["name"] for each in problem["errors"]] == ["body.name", "body.weight", "body.colour"]
    assert "body.weight: " in problem["detail"]
    problem = told(await http.get("/v1/things/a", params={"limit": "many"}), 400)
    assert [each["name"] for each in problem["errors"]] == ["query.limit"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"name": "\\ud800"}',
        b'{"\\ud800": 1}',
        b'{"name": "a", "weight": NaN}',
        b'{"name": "a", "weight": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
    ],
)
async def test_a_malformed_body_is_a_problem(http: httpx.AsyncClient, body: bytes) -> None:
    assert "body" in told(await http.post("/v1/things", content=body), 400)["detail"]


async def test_errors_keep_their_status_and_say_when_to_try_again(http: httpx.AsyncClient) -> None:
    assert told(await http.get("/v1/failing/missing"), 404)["detail"] == "no thing 'missing'"
    assert told(await http.get("/v1/failing/busy"), 409)["title"] == "Conflict"
    limited = await http.get("/v1/failing/limited")
    assert (told(limited, 429)["detail"], limited.headers["retry-after"]) == ("too many", "3")
    away = await http.get("/v1/failing/away")
    assert (told(away, 503)["detail"], away.headers["retry-after"]) == ("the database is not available", "1")


async def test_an_unknown_path_and_method_are_problems(http: httpx.AsyncClient) -> None:
    assert "/v1/nothing" in told(await http.get("/v1/nothing"), 404)["detail"]
    answer = await http.patch("/v1/things/a")
    assert told(answer, 405)["detail"] == "PATCH is not allowed here"
    assert answer.headers["allow"]


async def test_a_key_is_needed_and_its_scope(http: httpx.AsyncClient) -> None:
    answer = await http.get("/v1/things/a", headers={"authorization": ""})
    assert told(answer, 401)["detail"].startswith("no key")
    assert answer.headers["www-authenticate"] == "Bearer"
    told(await http.get("/v1/things/a", headers={"authorization": "Bearer lp_wrong"}), 401)
    told(await http.delete("/v1/things/a"), 403)
    answer = await http.get("/v1/things/a", headers={"authorization": "", "x-api-key": "lp_right"})
    assert answer.status_code == 200


async def test_an_unhandled_error_tells_the_caller_nothing(http: httpx.AsyncClient) -> None:
    answer = await http.get("/v1/failing/broken", headers={"x-request-id": "r-1"})
    assert "password" not in str(told(answer, 500))
    assert answer.headers["x-request-id"] == "r-1"


async def test_a_request_id_is_made_when_the_given_one_is_not_plain(http: httpx.AsyncClient) -> None:
    answer = await http.get("/v1/things/a", headers={"x-request-id": "a b\t" * 50})
    assert len(answer.headers["x-request-id"]) == 32


async def test_a_body_over_the_limit_is_refused(http: httpx.AsyncClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b" " * (MAX_BODY_BYTES // 2)

    answer = await http.post("/v1/things", content=b" " * (MAX_BODY_BYTES + 1))
    told(answer, 413)
    assert answer.headers["connection"] == "close"
    told(await http.post("/v1/things", content=chunks()), 413)
    assert (await http.put("/v1/streams/a", content=chunks())).json() == 3 * (MAX_BODY_BYTES // 2)


async def test_body_that_does_not_come_is_not_waited_for(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "_BODY_TIMEOUT_S", 0.05)

    async def chunks() -> AsyncIterator[bytes]:
        yield b'{"name": '
        await asyncio.sleep(10)

    async with asyncio.timeout(5):
        answer = await http.post("/v1/things", content=chunks())
    assert "0.05 s" in told(answer, 408)["detail"]
    assert answer.headers["connection"] == "close"


async def test_health_says_what_is_missing(app: FastAPI, http: httpx.AsyncClient) -> None:
    assert (await http.get("/health/live")).json() == {"status": "live"}
    assert (await http.get("/health/ready")).status_code == 200


async def test_metrics_are_prometheus_text(http: httpx.AsyncClient) -> None:
    answer = await http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert "lepton_things_task_failures" in answer.text


async def test_openapi_refers_to_nothing_that_is_not_there(http: httpx.AsyncClient) -> None:
    assert "$defs" not in (await http.get("/openapi.json")).text


@pytest.mark.parametrize("label", ["POST /v1/things", "GET /v1/things/{name}", "DELETE /v1/things/{name}"])
async def test_openapi_tells_no_lies(app: FastAPI, label: str) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", app).include(name=label)
    (operation,) = (result.ok() for result in schema.get_all_operations() if isinstance(result, Ok))

    @settings(max_examples=15, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def check(case: Any) -> None:
        case.call_and_validate(headers={"Authorization": "Bearer lp_right"})

    check()
