"""What becomes of a request when the mesh or the caller does not do its part."""

import asyncio
import re
import socket

import pytest
from lepton_common.http11 import JSON, Request, Server
from lepton_common.records import Limits

from .lab import Lab, error_of

INFER = "/v2/models/m/infer"


@pytest.mark.parametrize(
    ("status", "headers", "body", "message"),
    [
        (503, b"content-type: text/plain\r\n", b"no healthy upstream", "no healthy upstream"),
        (503, b"", b"", "Service Unavailable"),
        (413, b"content-type: text/html\r\n", b"<html>x</html>", "Content Too Large"),
        (400, JSON, b'{"detail": [{"loc": ["body"]}]}', "Bad Request"),
        (500, JSON, b'{"error": {"code": 1}}', "Internal Server Error"),
        (520, JSON, b"[1]", "[1]"),
        (429, JSON, b'{"error": "queue full"}', "queue full"),
    ],
)
async def test_every_error_of_the_mesh_becomes_one_of_the_protocol(
    lab: Lab, status: int, headers: bytes, body: bytes, message: str
) -> None:
    lab.mesh.handler = lambda request: request.respond(status, headers + b"x-lepton-version: 1\r\n", body)
    response = await lab.client.post(INFER)
    assert response.status_code == status
    assert error_of(response) == message or (status == 413 and "Large" in error_of(response))
    assert response.headers["x-lepton-version"] == "1"
    assert ("retry-after" in response.headers) == (status in (429, 503, 504))


async def test_the_deadline_is_the_shorter_of_the_callers_and_the_models(lab: Lab) -> None:
    left = asyncio.Event()

    def hold(request: Request) -> None:
        request.on_disconnect = left.set

    lab.mesh.handler = hold
    response = await lab.client.post(INFER, headers={"x-request-timeout-ms": "50"})
    assert response.status_code == 504
    assert "50 ms" in error_of(response)
    assert response.headers["retry-after"] == "1"
    async with lab.patience():
        await left.wait()  # The work is not done for nobody.
    await lab.serve("quick", 1, limits=Limits(timeout_ms=60))
    await lab.until("/v2/models/quick/ready", 503)
    assert "60 ms" in error_of(await lab.client.post("/v2/models/quick/infer"))


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (JSON, b'{"error":"upstream request timeout"}'),  # our mesh's
        (b"content-type: text/plain\r\n", b"upstream request timeout"),  # Istio's
    ],
)
async def test_a_version_that_the_mesh_gave_up_on_is_named(lab: Lab, headers: bytes, body: bytes) -> None:
    lab.mesh.handler = lambda request: request.respond(504, headers + b"x-lepton-version: 1\r\n", body)
    response = await lab.client.post(INFER, headers={"x-request-timeout-ms": "20"})
    assert response.status_code == 504
    assert re.fullmatch(r"model 'm' version 1: no answer within (\d|1\d|20) ms", error_of(response))
    assert (response.headers["x-lepton-version"], response.headers["retry-after"]) == ("1", "1")


async def test_requests_over_a_models_concurrency_are_429(lab: Lab) -> None:
    held: asyncio.Queue[Request] = asyncio.Queue()
    lab.mesh.handler = held.put_nowait
    await lab.serve("narrow", 1, limits=Limits(max_concurrency=2))
    await lab.until("/v2/models/narrow/ready", 503)
    running = [asyncio.create_task(lab.client.post("/v2/models/narrow/infer")) for _ in range(2)]
    taken = [await held.get() for _ in running]
    response = await lab.client.post("/v2/models/narrow/infer")
    assert response.status_code == 429
    assert "limit" in error_of(response)
    assert response.headers["retry-after"] == "1"
    for request in taken:
        request.respond(200, JSON, b"{}")
    assert [response.status_code for response in await asyncio.gather(*running)] == [200, 200]
    lab.mesh.handler = lambda request: request.respond(200, JSON, b"{}")
    assert (await lab.client.post("/v2/models/narrow/infer")).status_code == 200


async def test_a_caller_that_leaves_takes_its_request_along(lab: Lab) -> None:
    left = asyncio.Event()

    def hold(request: Request) -> None:
        request.on_disconnect = left.set

    lab.mesh.handler = hold
    with socket.create_connection(lab.address) as caller:
        head = f"POST {INFER} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {lab.key}\r\ncontent-length: 0\r\n\r\n"
        caller.sendall(head.encode())
        async with lab.patience():
            await lab.mesh.arrived.wait()
    async with lab.patience():
        await left.wait()
    text = await lab.metrics()
    assert 'lepton_gateway_requests_total{code="499",model="m",tenant="acme",version=""} 1.0' in text
    assert 'lepton_gateway_in_flight{model="m",tenant="acme"} 0.0' in text


async def test_requests_wait_for_a_mesh_that_restarts(lab: Lab) -> None:
    assert (await lab.client.post(INFER)).status_code == 200
    host, port = lab.mesh_server.address
    await lab.mesh_server.drain(0)
    waiting = [asyncio.create_task(lab.client.post(INFER)) for _ in range(10)]
    await asyncio.sleep(0.2)  # They meet closed connections and refused ones.
    again = Server(lab.mesh)
    await again.start(host, port)
    assert [response.status_code for response in await asyncio.gather(*waiting)] == [200] * 10
    await again.drain(0)


async def test_requests_cut_off_by_the_mesh_are_sent_again(lab: Lab) -> None:
    def cut(request: Request) -> None:
        lab.mesh.handler = lambda request: request.respond(200, JSON, b"{}")
        for connection in tuple(lab.mesh_server.connections):
            connection.abort()

    lab.mesh.handler = cut
    assert (await lab.client.post(INFER)).status_code == 200
    assert len(lab.mesh.requests) == 2


async def test_a_mesh_that_always_cuts_off_is_503_in_the_end(lab: Lab) -> None:
    def cut(request: Request) -> None:
        for connection in tuple(lab.mesh_server.connections):
            connection.abort()

    lab.mesh.handler = cut
    response = await lab.client.post(INFER)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert error_of(response)
    assert len(lab.mesh.requests) <= 8


async def test_no_mesh_within_the_deadline_is_503(lab: Lab) -> None:
    await lab.mesh_server.drain(0)
    response = await lab.client.post(INFER, headers={"x-request-timeout-ms": "300"})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"


async def test_what_is_served_is_still_known_after_the_record_is_taken_back(lab: Lab) -> None:
    await lab.serve("m")
    response = await lab.until("/v2/models/m/ready", 503)
    assert "not loaded" in error_of(response)
    response = await lab.client.post(INFER)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    await lab.serve("m", 3)
    async with lab.patience():
        while (await lab.client.post(INFER)).status_code != 200:
            continue
