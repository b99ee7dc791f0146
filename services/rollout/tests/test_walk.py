"""A long walk: a thousand weight changes on a real Envoy under load, and what callers see of it."""

import asyncio
import os
import random
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Self

import pytest
from lepton.envoy import Envoy
from lepton_common.records import Serving, Share, Sticky
from lepton_common.types import ModelRef
from lepton_rollout.mesh import virtual_service
from lepton_rollout.mesh_envoy import EnvoyMesh
from lepton_rollout.record import TOTAL_WEIGHT
from scipy.stats import binom

from .stand_ins import StartWorker, serving

# More of them by hand.
CHANGES = int(os.environ.get("LEPTON_CHANGES", "300"))
HOLD_EVERY = 50
ASKED_AT_A_HOLD = 1_000
# Two-sided, for each hold: a right split fails a thousand changes once in 50,000 runs.
LEVEL = 1e-6
USERS = 100


class Caller:
    """One kept-alive connection to the mesh, with as little HTTP as it takes: callers must not be the bottleneck."""

    def __init__(self, address: str, model: ModelRef) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._model = model

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(self._host, int(self._port))
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    async def ask(self, bucket: int | None = None) -> str:
        """What came back: "200 version 1"."""
        sticky = "" if bucket is None else f"x-lepton-bucket: {bucket}\r\n"
        path = f"/v2/models/{self._model.model}/infer"
        self._writer.write(f"GET {path} HTTP/1.1\r\nhost: {self._model.host}\r\n{sticky}\r\n".encode())
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        status, *lines = head.split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines if line)
        await self._reader.readexactly(int(headers["content-length"]))
        return f"{status.split()[1]} version {headers.get('x-lepton-version')}"


class Load:
    """Callers that ask without pause. `seen` are all answers, `held` those to what was asked in the last hold."""

    def __init__(self, envoy: Envoy, model: ModelRef, callers: int) -> None:
        self.seen: Counter[str] = Counter()
        self.held: Counter[str] = Counter()
        self._hold = 0
        self._callers = [Caller(envoy.mesh, model) for _ in range(callers)]
        self._answered = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._ask(each)) for each in self._callers]
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self._tasks:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            assert isinstance(result, asyncio.CancelledError), f"a caller ended: {result!r}"

    async def hold(self, count: int) -> Counter[str]:
        """The answers to that many requests, all asked from now on."""
        self._hold += 1
        self.held.clear()
        while self.held.total() < count:
            assert not any(task.done() for task in self._tasks)
            self._answered.clear()
            await self._answered.wait()
        return self.held.copy()

    async def _ask(self, caller: Caller) -> None:
        async with caller:
            while True:
                hold = self._hold
                answer = await caller.ask()
                self.seen[answer] += 1
                if hold == self._hold:
                    self.held[answer] += 1
                self._answered.set()


# A thousand take some 30 s of two idle cores; other tests may run beside it.
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("envoy")
async def test_weight_changes_under_load_fail_no_request_and_every_split_is_as_set(
    mesh: EnvoyMesh, envoy_recipe: Envoy, model: ModelRef, start_worker: StartWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(3)
    sticky = ModelRef("default", "sticky")
    await mesh.place([(await start_worker(name)).state() for name in ("a", "b")])
    # Up to all of the traffic, and down again, in steps as uneven as chance has them.
    up = sorted(chance.sample(range(TOTAL_WEIGHT + 1), CHANGES // 2))
    walk = [*up, *reversed(up)]
    users = [0, 9_999, *chance.sample(range(TOTAL_WEIGHT), USERS - 2)]
    before = dict.fromkeys(users, 1)
    await mesh.apply(virtual_service(_split(model, 1, 0)), virtual_service(_sticky(sticky, 1, 0)))
    flips, farthest = Counter[str](), 0.0

    async with Load(envoy_recipe, model, callers=3) as load, Caller(envoy_recipe.mesh, sticky) as asking:
        for number, weight in enumerate(walk):
            candidate = chance.randint(0, TOTAL_WEIGHT)
            await mesh.apply(
                virtual_service(_split(model, 2 + number, candidate)),
                virtual_service(_sticky(sticky, 2 + number, weight)),
            )
            user = chance.choice(users)
            assert await asking.ask(user) == f"200 version {_version(user, weight)}"
            if number % HOLD_EVERY == HOLD_EVERY - 1:
                seen = await load.hold(ASKED_AT_A_HOLD)
                farthest = max(farthest, _distance(seen, candidate))
                after = {user: int((await asking.ask(user)).removeprefix("200 version ")) for user in users}
                flips += _flips(before, after, grows=number < CHANGES // 2)
                before = after

    told = (
        f"{CHANGES} weight changes under load: {load.seen.total()} requests, answers {dict(load.seen)};"
        f" {CHANGES // HOLD_EVERY} holds of {ASKED_AT_A_HOLD} requests, the farthest split {farthest:.2f} standard"
        f" deviations off (level {LEVEL:g}, two-sided); of {USERS} sticky users {flips['into']} changes into a grown"
        f" candidate, {flips['out']} out of a shrunk one, {flips['other']} others"
    )
    with capsys.disabled():
        sys.stdout.write(f"\n{told}\n")
    assert set(load.seen) == {"200 version 1", "200 version 2"}
    assert flips["other"] == 0
    assert flips["into"] > 0
    assert flips["out"] > 0


def _distance(seen: Mapping[str, int], weight: int) -> float:
    """How many standard deviations the split is off. It is within the binomial interval of its level."""
    count, total, share = seen["200 version 2"], sum(seen.values()), weight / TOTAL_WEIGHT
    low, high = binom.ppf([LEVEL / 2, 1 - LEVEL / 2], total, share)
    assert low <= count <= high, f"{count} of {total} answers are the candidate's, which has {share:.2%}"
    deviation = (total * share * (1 - share)) ** 0.5
    return float(abs(count - total * share) / deviation) if deviation else 0.0


def _flips(before: dict[int, int], after: dict[int, int], *, grows: bool) -> Counter[str]:
    """The users who changed their version, by how: into a candidate that grew, out of one that shrank, or otherwise."""
    flips: Counter[str] = Counter()
    for user, version in after.items():
        if version != before[user]:
            into = version == 2
            flips[("into" if into else "out") if into is grows else "other"] += 1
    return flips


def _version(bucket: int, weight: int) -> int:
    """The candidate, version 2, has the last buckets."""
    return 2 if bucket >= TOTAL_WEIGHT - weight else 1


def _split(model: ModelRef, generation: int, weight: int) -> Serving:
    percents = {1: (TOTAL_WEIGHT - weight) / 100, 2: weight / 100}
    split = tuple(Share(version=version, percent=percent) for version, percent in percents.items())
    return serving(model, generation, {1: 100}, 2).model_copy(update={"split": split})


def _sticky(model: ModelRef, generation: int, weight: int) -> Serving:
    return _split(model, generation, weight).model_copy(update={"sticky": Sticky(by="x-user")})
