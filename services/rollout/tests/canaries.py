"""A quick policy, and callers that follow and steer a rollout by it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from lepton_common.events import (
    Event,
    decode,
)

from .lab import Lab

# Quick, but judged like any other.
QUICK = {
    "steps": [10, 50],
    "dwell_s": 3,
    "min_requests": 50,
    "bake_s": 2,
    "judge": {"errors": {"margin": 3, "acceptable": 0.05}, "slow": {"margin": 3, "acceptable": 0.3}},
    "cool_down_s": 0,
}

Start = Callable[..., Awaitable[dict[str, Any]]]


async def seen(client: httpx.AsyncClient, started: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get(f"/v1/rollouts/{started['id']}")).raise_for_status().json()
    return found


async def until(
    client: httpx.AsyncClient, started: dict[str, Any], holds: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """The rollout once that holds."""
    try:
        async with asyncio.timeout(30):
            while not holds(found := await seen(client, started)):
                pass
    except TimeoutError:
        raise AssertionError(f"not so after 30 s: {found}") from None
    return found


async def steer(client: httpx.AsyncClient, started: dict[str, Any], command: str, **more: Any) -> httpx.Response:
    return await client.post(f"/v1/rollouts/{started['id']}/{command}", json={"reason": "the test says so", **more})


def told(lab: Lab, kind: type[Event]) -> list[Any]:
    events = [decode(message.headers["ce_type"], message.value) for message in lab.bus.sent]
    return [event for event in events if isinstance(event, kind)]
