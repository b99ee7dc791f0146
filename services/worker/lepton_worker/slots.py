"""The threads on which one version's batches run.

Runs share the cores. Those of a tenant that uses more of them than others go on threads of a lower priority: the kernel
interrupts them for the others' runs, so that a flood of large batches hardly delays anybody else, and wastes nothing.
Where a run has threads of its own (`LEPTON_INTRA_OP_THREADS`), or is a GPU's, only this part of it yields.
"""

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Callable

from lepton_worker.buckets import Batch
from lepton_worker.usage import Account

# A tenth of what others get of a core. With still less (19) a thread would hold the interpreter's lock and not get on:
# measured, others then wait longer than without.
_NICE = 10
_LEAST_PRIORITY = 19

Batches = queue.SimpleQueue[Batch | None]


class Slots:
    """Up to `count` batches at a time; `run` is called with each, on one of the threads. `account` is the tenant's."""

    def __init__(self, count: int, run: Callable[[Batch], None], account: Account) -> None:
        self._count = count
        self._run = run
        self._account = account
        self._threads: list[threading.Thread] = []
        self._usual = self._begin(0)
        self._yielding: Batches | None = None
        self._closed = False

    def put(self, batch: Batch) -> None:
        """The batch runs as soon as a thread is free."""
        self._queue().put(batch)

    def close(self) -> None:
        """The threads end after what they have."""
        self._closed = True
        for batches in (self._usual, self._yielding):
            if batches is not None:
                for _ in range(self._count):
                    batches.put(None)

    def join(self) -> None:
        """Wait for the threads to end."""
        for thread in self._threads:
            thread.join()

    def _queue(self) -> Batches:
        if not self._account.is_large or self._closed:
            return self._usual
        if self._yielding is None:
            try:
                self._yielding = self._begin(_NICE)
            except RuntimeError:  # The system has no more threads: it runs all the same.
                return self._usual
        return self._yielding

    def _begin(self, nice: int) -> Batches:
        """Threads that run what is put into the queue. Raises RuntimeError."""
        batches: Batches = queue.SimpleQueue()
        for count in range(self._count):
            thread = threading.Thread(target=self._serve, args=(batches, nice), name="slot", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                for _ in range(count):
                    batches.put(None)
                raise
            self._threads.append(thread)
        return batches

    def _serve(self, batches: Batches, nice: int) -> None:
        if nice and sys.platform == "linux":  # Elsewhere the number is of a process.
            own = os.getpriority(os.PRIO_PROCESS, 0)
            with contextlib.suppress(OSError):  # Where a sandbox forbids it, batches run all the same.
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(own + nice, _LEAST_PRIORITY))
        while (batch := batches.get()) is not None:
            self._run(batch)
            del batch  # Nothing is kept alive while the slot waits.
