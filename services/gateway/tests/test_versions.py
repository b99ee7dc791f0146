"""How a request comes to its version, and how its answer is counted."""

import asyncio
from hashlib import blake2b

import httpx
import pytest
from lepton_common.http11 import JSON, Request
from lepton_common.records import Limits, Scope, Sticky

from .lab import Lab, counted, error_of

INFER = "/v2/models/m/infer"
# What a model's record may ask for in vain.
SECRET = (
    "authorization",
    "x-api-key",
    "x-lepton-bucket",
    "x-lepton-version",
    "x-envoy-retry-on",
    "host",
    "Bad Name",
    "",
)


async def sees(lab: Lab, key: str, **headers: str) -> httpx.Response:
    """The answer to the first request that the mesh got from that key."""
    async with lab.patience():
        while True:
            response = await lab.client.post(INFER, headers={"authorization": f"Bearer {key}", **headers})
            if response.status_code not in (401, 404):
                return response


async def until_sent(lab: Lab, path: str, header: bytes, **headers: str) -> bytes:
    """The header of a request as the mesh gets it, once it gets one."""
    async with lab.patience():
        while True:
            assert (await lab.client.post(path, headers=headers)).status_code == 200
            value = lab.mesh.requests[-1].headers.get(header)
            if value is not None:
                return value


# --- forced versions ---


@pytest.mark.parametrize("scope", [Scope.TEST, Scope.DEPLOY, Scope.ADMIN])
async def test_testers_name_a_version_by_header(lab: Lab, scope: Scope) -> None:
    await lab.serve("m", 1, 2)
    await lab.until("/v2/models/m/versions/2/ready", 503)
    key = await lab.new_key(Scope.INFER, scope)
    lab.mesh.handler = lambda request: request.respond(200, b"x-lepton-version: 2\r\n", b"{}")
    assert (await sees(lab, key, **{"x-lepton-version": "2"})).status_code == 200
    assert lab.mesh.requests[-1].headers[b"x-lepton-version"] == b"2"
    assert counted(lab.windows.told("m"))[2, True, "ok"] == 1


async def test_without_the_scope_a_version_by_header_is_403(lab: Lab) -> None:
    response = await lab.client.post(INFER, headers={"x-lepton-version": "1"})
    assert response.status_code == 403
    assert "'test'" in error_of(response)
    assert not lab.mesh.requests
    del lab.client.headers["authorization"]
    assert (await lab.client.post(INFER, headers={"x-lepton-version": "1"})).status_code == 403


@pytest.mark.parametrize("version", ["9", "latest", "-1", "1.0", "", "9" * 10])
async def test_a_version_that_is_not_there_is_404_by_header_as_by_path(lab: Lab, version: str) -> None:
    key = await lab.new_key(Scope.INFER, Scope.TEST)
    assert (await sees(lab, key)).status_code == 200
    headers = {"authorization": f"Bearer {key}", "x-lepton-version": version}
    response = await lab.client.post(INFER, headers=headers)
    assert response.status_code == 404
    assert repr(version) in error_of(response) or f"version {version}" in error_of(response)


async def test_a_header_that_contradicts_the_path_is_400(lab: Lab) -> None:
    await lab.serve("m", 1, 2)
    await lab.until("/v2/models/m/versions/2/ready", 503)
    key = await lab.new_key(Scope.INFER, Scope.TEST)
    assert (await sees(lab, key)).status_code == 200
    for version, status in (("1", 400), ("2", 200)):
        headers = {"authorization": f"Bearer {key}", "x-lepton-version": version}
        response = await lab.client.post("/v2/models/m/versions/2/infer", headers=headers)
        assert response.status_code == status


async def test_a_version_in_the_path_needs_no_scope_and_counts_as_forced(lab: Lab) -> None:
    assert (await lab.client.post("/v2/models/m/versions/1/infer")).status_code == 200
    assert (await lab.client.post(INFER)).status_code == 200
    assert counted(lab.windows.told("m")) == {
        **{(1, forced, "ok"): 1 for forced in (True, False)},
        **{(1, forced, "latency"): 1 for forced in (True, False)},
    }


# --- users that stay ---


async def test_a_user_named_by_header_always_has_the_same_bucket(lab: Lab) -> None:
    await lab.serve("m", 1, sticky=Sticky(by="X-User", salt="salt"))
    expected = b"%d" % (int.from_bytes(blake2b(b"saltanna", digest_size=8).digest(), "big") % 10_000)
    assert await until_sent(lab, INFER, b"x-lepton-bucket", **{"x-user": "anna"}) == expected
    assert b"x-user" not in lab.mesh.requests[-1].headers
    await lab.client.post(INFER, headers={"x-user": "anna", "x-lepton-bucket": "1"})
    assert lab.mesh.requests[-1].headers[b"x-lepton-bucket"] == expected
    await lab.client.post(INFER, headers={"x-user": "bert"})
    assert lab.mesh.requests[-1].headers[b"x-lepton-bucket"] != expected
    for headers in ({}, {"x-user": ""}, {"x-lepton-bucket": "1"}):
        await lab.client.post(INFER, headers=headers)
        assert b"x-lepton-bucket" not in lab.mesh.requests[-1].headers
    await lab.client.post("/v2/models/m/versions/1/infer", headers={"x-user": "anna"})
    assert b"x-lepton-bucket" not in lab.mesh.requests[-1].headers


async def test_a_user_may_be_named_by_their_key(lab: Lab) -> None:
    await lab.serve("m", 1, sticky=Sticky(by="key"))
    one = await until_sent(lab, INFER, b"x-lepton-bucket")
    assert await until_sent(lab, INFER, b"x-lepton-bucket") == one
    await sees(lab, await lab.new_key(Scope.INFER))
    assert lab.mesh.requests[-1].headers[b"x-lepton-bucket"] != one
    # Callers without a key are nobody in particular.
    await lab.serve("local", 1, tenant="default", sticky=Sticky(by="key"))
    del lab.client.headers["authorization"]
    async with lab.patience():
        while (await lab.client.post("/v2/models/local/infer")).status_code != 200:
            continue
    assert b"x-lepton-bucket" not in lab.mesh.requests[-1].headers


async def test_users_are_counted_once_a_second(lab: Lab) -> None:
    await lab.serve("m", 1, sticky=Sticky(by="x-user"))
    await until_sent(lab, INFER, b"x-lepton-bucket", **{"x-user": "first"})
    lab.windows.told("m")
    begun = len(lab.windows.kept)
    for user in ("anna", "bert", "anna", "anna"):
        await lab.client.post(INFER, headers={"x-user": user})
    await lab.client.post(INFER)
    told = [version for window in lab.windows.told("m") for version in window.versions]
    assert len(told) == sum(each.users is not None for each in told)
    # Who does not say who they are is a user of their own, but of no other request.
    assert 3 <= sum(each.users.requests for each in told if each.users) <= 5
    cells = [cell for closed in lab.windows.kept[begun:] for cell in closed.split.values()]
    assert sum(sum(cell.counts.values()) for cell in cells) == 5
    users = [set(cell.users) for cell in cells]
    assert len(set().union(*users)) == 2
    assert sum(map(len, users)) <= 2 * len(cells)


# --- what the mesh routes by ---


async def test_headers_that_the_record_names_go_on_to_the_mesh(lab: Lab) -> None:
    await lab.serve("m", 1, forwarded=("x-cohort", "content-type", *SECRET))
    assert await until_sent(lab, INFER, b"x-cohort", **{"x-cohort": "beta"}) == b"beta"
    await lab.client.post(
        INFER, headers={"x-cohort": "beta", "x-other": "1", "x-lepton-bucket": "5", "x-envoy-retry-on": "5xx"}
    )
    sent = lab.mesh.requests[-1].headers
    assert sent[b"host"] == b"m.acme.models.lepton"
    assert sent.keys() == {b"host", b"x-cohort", b"accept-encoding", b"content-length"}


# --- whose an answer is ---


async def test_every_outcome_is_counted_against_the_version_that_the_mesh_names(lab: Lab) -> None:
    for status, headers in [
        (200, b"x-lepton-version: 1\r\n"),
        (500, b"x-lepton-version: 1\r\n"),
        (503, b"x-lepton-version: 1\r\n"),
        (503, b"x-lepton-version: 1\r\nx-envoy-ratelimited: true\r\n"),
        (429, b"x-lepton-version: 1\r\n"),
        (504, b"x-lepton-version: 1\r\n"),
        (400, b"x-lepton-version: 1\r\n"),
        (499, b"x-lepton-version: 1\r\n"),
        (200, b""),
        (502, b""),
        (200, b"x-lepton-version: what\r\n"),
    ]:

        def respond(request: Request, status: int = status, headers: bytes = headers) -> None:
            request.respond(status, JSON + headers, b"{}")

        lab.mesh.handler = respond
        assert (await lab.client.post(INFER)).status_code == status
    assert counted(lab.windows.told("m")) == {
        (1, False, "ok"): 1,
        (1, False, "server_errors"): 2,
        (1, False, "shed"): 2,
        (1, False, "timeouts"): 1,
        (1, False, "client_errors"): 2,
        (1, False, "latency"): 8,
        (0, False, "ok"): 2,
        (0, False, "server_errors"): 1,
        (0, False, "latency"): 3,
    }
    assert 'code="503",model="m",tenant="acme",version="1"} 2.0' in await lab.metrics()


async def test_the_worker_has_the_time_to_say_itself_that_it_was_too_slow(lab: Lab) -> None:
    def late(request: Request) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(0.03, request.respond, 504, JSON + b"x-lepton-version: 1\r\n", b'{"error": "too slow"}')

    lab.mesh.handler = late
    response = await lab.client.post(INFER, headers={"x-request-timeout-ms": "20"})
    assert response.status_code == 504
    assert error_of(response) == "too slow"
    assert counted(lab.windows.told("m")) == {(1, False, "timeouts"): 1, (1, False, "latency"): 1}


async def test_metadata_is_in_no_window(lab: Lab) -> None:
    assert (await lab.client.get("/v2/models/m")).status_code == 200
    assert not counted(lab.windows.told("m"))
    assert 'code="200",model="m",tenant="acme",version="1"} 1.0' in await lab.metrics()


async def test_requests_over_the_limit_are_shed_by_no_version(lab: Lab) -> None:
    held: asyncio.Queue[Request] = asyncio.Queue()
    lab.mesh.handler = held.put_nowait
    await lab.serve("narrow", 1, limits=Limits(max_concurrency=1))
    await lab.until("/v2/models/narrow/ready", 503)
    running = asyncio.create_task(lab.client.post("/v2/models/narrow/infer"))
    request = await held.get()
    assert (await lab.client.post("/v2/models/narrow/infer")).status_code == 429
    assert lab.windows.told("narrow")[-1].in_flight == 1
    request.respond(200, JSON + b"x-lepton-version: 1\r\n", b"{}")
    await running
    assert counted(lab.windows.told("narrow")) == {(0, False, "shed"): 1, (1, False, "ok"): 1, (1, False, "latency"): 1}


async def test_a_clock_that_jumps_loses_no_answer(lab: Lab) -> None:
    seconds = []
    for shift in (0, 3600, -3600, -1, 0):
        lab.windows.shift_s += shift
        assert (await lab.client.post(INFER)).status_code == 200
        seconds.append(int(lab.windows.clock()))
    told = lab.windows.told("m")
    assert counted(told) == {(1, False, "ok"): 5, (1, False, "latency"): 5}
    assert len({each.id for each in told}) == len(told)
    having = [window.second for window in told if window.versions]
    assert all(min(abs(second - each) for each in seconds) <= 1 for second in having)
