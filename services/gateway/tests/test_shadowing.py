"""Copies to a shadowed version: what they tell, and that nobody else notices them."""

import asyncio
from collections.abc import Callable

import httpx
import orjson
import pytest
from lepton_common import compression
from lepton_common.http11 import JSON, Request
from lepton_common.records import Limits, Shadow, Share

from .lab import Lab

INFER = "/v2/models/m/infer"
COUNTS = (
    *("agreed", "disagreed", "both_right", "both_wrong", "only_stable_right", "only_shadow_right"),
    *("failed", "dropped"),
)


def answer(value: int, pad: int = 0) -> bytes:
    output = {"name": "y", "datatype": "INT64", "shape": [1], "data": [value]}
    return orjson.dumps({"model_name": "m" + pad * " ", "outputs": [output]})


def versions(stable: Callable[[Request], None], shadow: Callable[[Request], None]) -> Callable[[Request], None]:
    """A mesh in which the shadow is version 2."""
    return lambda request: (shadow if b"x-lepton-shadow" in request.headers else stable)(request)


def say(version: int, value: int, status: int = 200, headers: bytes = b"", pad: int = 0) -> Callable[[Request], None]:
    block = JSON + b"x-lepton-version: %d\r\n" % version + headers
    return lambda request: request.respond(status, block, answer(value, pad))


async def shadow(lab: Lab, percent: float = 100, limits: Limits | None = None) -> None:
    """Version 2 is the shadow of version 1, and the gateway knows."""
    await lab.serve("m", 1, 2, shadow=Shadow(version=2, percent=percent), limits=limits)
    await lab.until("/v2/models/m/versions/2/ready", 503)


async def seen(lab: Lab, pairs: int) -> dict[str, int]:
    """What became of so many pairs, without the zeros."""
    async with lab.patience():
        while True:
            windows = [each.shadow for each in lab.windows.told("m") if each.shadow]
            assert {each.version for each in windows} <= {2}
            total = {name: sum(getattr(each, name) for each in windows) for name in COUNTS}
            if sum(total[name] for name in ("agreed", "disagreed", "failed", "dropped")) >= pairs:
                return {name: count for name, count in total.items() if count}
            await asyncio.sleep(0.01)


async def test_a_copy_of_what_the_stable_answered_goes_to_the_shadow(lab: Lab) -> None:
    await shadow(lab)
    lab.mesh.handler = versions(say(1, 5), say(2, 5))
    response = await lab.client.post(
        INFER,
        content=b"abc",
        headers={"x-lepton-label": "5", "x-request-timeout-ms": "5000", "inference-header-content-length": "3"},
    )
    assert response.headers["x-lepton-version"] == "1"
    assert await seen(lab, 1) == {"agreed": 1, "both_right": 1}
    first, copy = lab.mesh.requests
    assert (copy.body, copy.target) == (first.body, first.target)
    assert copy.headers[b"x-lepton-version"] == b"2"
    assert copy.headers[b"x-lepton-shadow"] == b"1"
    assert copy.headers[b"inference-header-content-length"] == b"3"
    assert copy.headers.keys().isdisjoint({b"x-request-timeout-ms", b"authorization", b"x-lepton-label"})
    assert b"x-lepton-label" not in first.headers
    (window,) = (each for each in lab.windows.told("m") if each.shadow)
    assert window.shadow
    assert sum(window.shadow.latency.values()) == 1


async def test_the_shadow_is_in_no_version_s_window_and_not_under_way(lab: Lab) -> None:
    await shadow(lab, limits=Limits(max_concurrency=1))
    held: asyncio.Queue[Request] = asyncio.Queue()
    lab.mesh.handler = versions(say(1, 5), held.put_nowait)
    for _ in range(3):
        assert (await lab.client.post(INFER)).status_code == 200
    windows = lab.windows.told("m")
    assert {each.version for window in windows for each in window.versions} == {1}
    assert windows[-1].in_flight == 0
    for _ in range(3):
        say(2, 6)(await held.get())
    assert await seen(lab, 3) == {"disagreed": 3}
    assert {each.version for window in lab.windows.told("m") for each in window.versions} == {1}


@pytest.mark.parametrize(
    ("stable", "other", "label", "found"),
    [
        (5, 5, "6", {"agreed": 1, "both_wrong": 1}),
        (5, 6, "5", {"disagreed": 1, "only_stable_right": 1}),
        (5, 6, "[6]", {"disagreed": 1, "only_shadow_right": 1}),
        (5, 6, "nonsense", {"disagreed": 1}),
    ],
)
async def test_labels_say_which_of_the_two_was_right(
    lab: Lab, stable: int, other: int, label: str, found: dict[str, int]
) -> None:
    await shadow(lab)
    lab.mesh.handler = versions(say(1, stable), say(2, other))
    await lab.client.post(INFER, headers={"x-lepton-label": label})
    assert await seen(lab, 1) == found


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (say(2, 5, status=500), "failed"),
        (say(2, 5, status=400), "failed"),
        (lambda request: request.respond(200, b"", b"no answer"), "failed"),
        (say(2, 5, status=429), "dropped"),
        (say(2, 5, status=503, headers=b"x-envoy-ratelimited: true\r\n"), "dropped"),
        (say(2, 5, pad=300_000), "dropped"),
    ],
)
async def test_a_shadow_that_fails_is_counted_and_one_without_room_is_not_blamed(
    lab: Lab, other: Callable[[Request], None], found: str
) -> None:
    await shadow(lab)
    lab.mesh.handler = versions(say(1, 5), other)
    assert (await lab.client.post(INFER)).status_code == 200
    assert await seen(lab, 1) == {found: 1}


async def test_a_shadow_that_does_not_answer_fails_at_the_models_own_deadline(lab: Lab) -> None:
    await shadow(lab, limits=Limits(timeout_ms=100))
    lab.mesh.handler = versions(say(1, 5), lambda request: None)
    assert (await lab.client.post(INFER, headers={"x-request-timeout-ms": "90"})).status_code == 200
    assert await seen(lab, 1) == {"failed": 1}
    assert len(lab.mesh.requests) == 2


async def test_a_mesh_that_breaks_off_is_not_the_shadows_failure_and_not_asked_again(lab: Lab) -> None:
    await shadow(lab)

    def cut(request: Request) -> None:
        for connection in tuple(lab.mesh_server.connections):
            connection.abort()

    lab.mesh.handler = versions(say(1, 5), cut)
    assert (await lab.client.post(INFER)).status_code == 200
    assert await seen(lab, 1) == {"dropped": 1}
    assert len(lab.mesh.requests) == 2


async def test_only_what_the_split_gave_to_the_stable_and_it_could_answer_is_copied(lab: Lab) -> None:
    share = (Share(version=1, percent=50), Share(version=3, percent=50))
    await lab.serve("m", 1, 2, 3)
    serving = await lab.serve("m", 1, 2, 3, shadow=Shadow(version=2, percent=100))
    serving = serving.model_copy(update={"split": share})
    await lab.etcd.put(serving.key, serving.model_dump_json().encode())
    await lab.until("/v2/models/m/versions/3/ready", 503)
    for handler, path in [
        (say(3, 5), INFER),
        (say(1, 5), "/v2/models/m/versions/1/infer"),
        (say(1, 5, status=500), INFER),
        (lambda request: request.respond(200, JSON, answer(5)), INFER),
    ]:
        lab.mesh.handler = versions(handler, say(2, 5))
        await lab.client.post(path)
    await lab.client.get("/v2/models/m")
    assert not any(b"x-lepton-shadow" in request.headers for request in lab.mesh.requests)
    lab.mesh.handler = versions(say(1, 5), say(2, 5))
    await lab.client.post(INFER)
    assert await seen(lab, 1) == {"agreed": 1}


async def test_a_share_of_the_requests_is_copied(lab: Lab) -> None:
    await shadow(lab, percent=30)
    lab.mesh.handler = versions(say(1, 5), say(2, 5))
    for _ in range(300):
        await lab.client.post(INFER)
    copies = sum(b"x-lepton-shadow" in request.headers for request in lab.mesh.requests)
    assert 40 < copies < 150  # Six standard deviations.
    await shadow(lab, percent=0)


async def test_too_many_copies_under_way_are_dropped_and_no_caller_waits(lab: Lab) -> None:
    await shadow(lab)
    held: asyncio.Queue[Request] = asyncio.Queue()
    lab.mesh.handler = versions(say(1, 5), held.put_nowait)
    async with asyncio.TaskGroup() as group:
        answers = [group.create_task(lab.client.post(INFER)) for _ in range(100)]
    assert {each.result().status_code for each in answers} == {200}
    taken = [await held.get() for _ in range(64)]
    assert await seen(lab, 36) == {"dropped": 36}
    for request in taken:
        say(2, 5)(request)
    assert await seen(lab, 100) == {"dropped": 36, "agreed": 64}
    await lab.client.post(INFER)
    say(2, 5)(await held.get())
    assert await seen(lab, 101) == {"dropped": 36, "agreed": 65}


async def test_copies_hold_a_bounded_number_of_bytes(lab: Lab) -> None:
    await shadow(lab)
    held: asyncio.Queue[Request] = asyncio.Queue()
    lab.mesh.handler = versions(say(1, 5), held.put_nowait)
    body = bytes(900_000)
    for _ in range(25):
        assert (await lab.client.post(INFER, content=body)).status_code == 200
    taken = (16 << 20) // (len(body) + len(answer(5)))
    assert await seen(lab, 25 - taken) == {"dropped": 25 - taken}
    for _ in range(taken):
        say(2, 5)(await held.get())
    assert await seen(lab, 25) == {"dropped": 25 - taken, "agreed": taken}


async def test_answers_too_large_to_compare_are_not_copied(lab: Lab) -> None:
    await shadow(lab)
    lab.mesh.handler = versions(say(1, 5, pad=300_000), say(2, 5))
    assert (await lab.client.post(INFER)).status_code == 200
    assert await seen(lab, 1) == {"dropped": 1}
    assert len(lab.mesh.requests) == 1


async def test_compressed_answers_are_compared_as_what_they_hold(lab: Lab) -> None:
    await shadow(lab)

    def squeezed(request: Request) -> None:
        assert request.headers[b"accept-encoding"] == b"gzip"
        body = compression.compress([answer(5)], b"gzip")
        request.respond(200, JSON + b"content-encoding: gzip\r\nx-lepton-version: 1\r\n", body)

    lab.mesh.handler = versions(squeezed, squeezed)
    response = await lab.client.post(INFER, headers={"accept-encoding": "gzip"})
    assert response.json()["outputs"][0]["data"] == [5]
    assert await seen(lab, 1) == {"agreed": 1}


async def test_a_shadow_that_was_taken_back_is_not_heard_any_more(lab: Lab) -> None:
    await shadow(lab)
    held: asyncio.Queue[Request] = asyncio.Queue()
    lab.mesh.handler = versions(say(1, 5), held.put_nowait)
    await lab.client.post(INFER)
    late = await held.get()
    await lab.serve("m", 1)
    await lab.until("/v2/models/m/versions/2/ready", 404)
    say(2, 6)(late)
    assert (await lab.client.post(INFER)).status_code == 200
    assert not any(each.shadow for each in lab.windows.told("m"))


async def test_callers_get_their_answers_while_the_shadow_hangs(lab: Lab) -> None:
    await shadow(lab)
    lab.mesh.handler = versions(say(1, 5), lambda request: None)
    responses: list[httpx.Response] = []
    for _ in range(10):
        responses += await asyncio.gather(*(lab.client.post(INFER) for _ in range(50)))
    assert {each.status_code for each in responses} == {200}
    assert await seen(lab, 436) == {"dropped": 436}
