"""A batcher to ask, and a model for it whose answers can be checked."""

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from lepton_common.errors import Invalid
from lepton_common.events import Batching
from lepton_common.tensors import Array
from lepton_worker.batcher import Batcher
from lepton_worker.buckets import Outputs, Work
from lepton_worker.usage import Usage

NEVER = math.inf


class Model:
    """Doubles its input. It can be held, so that a queue forms, and remembers what it ran together."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.ran: list[int] = []

    def __call__(self, inputs: Mapping[str, Array]) -> Outputs:
        assert self.open.wait(10)
        x = inputs["x"]
        self.ran.append(len(x))
        if (x < 0).any():
            raise Invalid("a negative value")
        return {"y": 2 * x}


def row(value: float, rows: int = 1, width: int = 1) -> Outputs:
    return {"x": np.full((rows, width), value, np.float32)}


class Caller:
    """Submits, and waits for what comes."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher

    def submit(self, inputs: Outputs, deadline: float = NEVER) -> tuple[Work, asyncio.Future[Any]]:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        return self.batcher.submit(inputs, deadline, lambda outcome, waited_s: answer.set_result(outcome)), answer

    async def ask(self, inputs: Outputs, deadline: float = NEVER) -> Any:
        return await self.submit(inputs, deadline)[1]


@asynccontextmanager
async def batching(
    run: Callable[[Mapping[str, Array]], Outputs],
    *,
    slots: int = 1,
    max_rows: int = 8,
    max_queued_rows: int = 100,
    mergeable: bool = True,
    usage: Usage | None = None,
) -> AsyncIterator[Caller]:
    limits = Batching(max_rows=max_rows, max_queued_rows=max_queued_rows)
    batcher = Batcher(run, slots, limits, (usage or Usage()).of("acme"), mergeable=mergeable)
    yield Caller(batcher)
    await batcher.close(5)
