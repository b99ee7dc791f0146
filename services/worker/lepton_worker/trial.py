"""The first load of an artifact, in a child process: what crashes or hangs there harms nothing else.

    python -m lepton_worker.trial FILE INTRA_OP_THREADS

loads the file, examines it and prints the verdict as JSON, or `{"refused": reason}`.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lepton_common.errors import Invalid

from lepton_worker.domain import Verdict
from lepton_worker.engine import RUNTIME, Engine
from lepton_worker.warmup import examine

COMMAND = (sys.executable, "-m", "lepton_worker.trial")


class Crashed(Invalid):
    """The child was ended by a signal."""


class Trial:
    """Tries artifacts. A verdict is kept beside its artifact, so that only the first load of a digest pays for it."""

    def __init__(self, intra_op_threads: int, timeout_s: float, command: Sequence[str] = COMMAND) -> None:
        self._intra_op_threads = intra_op_threads
        self._timeout_s = timeout_s
        self._command = command

    async def verdict(self, path: Path) -> Verdict:
        """What is known of the artifact in `path`. Raises Invalid saying how it was refused, crashed or hung."""
        note = path.with_suffix(".verdict")
        verdict = _remembered(note)
        if verdict is None:
            try:
                verdict = await self._try(path)
            except Crashed:  # Perhaps by the machine's fault, not the model's: once is not enough to condemn it.
                verdict = await self._try(path)
            note.write_text(json.dumps({"runtime": RUNTIME, **dataclasses.asdict(verdict)}))
        return verdict

    async def _try(self, path: Path) -> Verdict:
        # Not asyncio's subprocess: uvloop forks, which runs gRPC's fork handlers beside its threads. Popen does not.
        child = subprocess.Popen(  # noqa: ASYNC220 - it takes milliseconds
            [*self._command, str(path), str(self._intra_op_threads)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        reading = asyncio.create_task(asyncio.to_thread(child.communicate))
        try:
            async with asyncio.timeout(self._timeout_s):
                output, _ = await asyncio.shield(reading)
        except TimeoutError:
            raise Invalid(f"the model did not load within {self._timeout_s:g} s") from None
        finally:
            child.kill()
            await reading
        return _verdict(child.returncode, output)


def _remembered(note: Path) -> Verdict | None:
    """The verdict noted there, if by this runtime: another one may see the artifact differently."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(note.read_text())
        if type(found) is dict and found.get("runtime") == RUNTIME:
            return _parsed(found)
    return None


def _verdict(status: int, output: bytes) -> Verdict:
    if status < 0:
        raise Crashed(f"the model crashed the runtime while it loaded: {signal.Signals(-status).name}")
    with contextlib.suppress(ValueError):
        found = json.loads(output)
        match found:
            case {"refused": str(reason)}:
                raise Invalid(reason)
        verdict = _parsed(found)
        if verdict is not None:
            return verdict
    raise Invalid(f"the model ended the runtime while it loaded: exit status {status}")


def _parsed(found: object) -> Verdict | None:
    match found:
        case {"batchable": bool(batchable), "reason": str(reason), "free_size": int() | None as free_size}:
            return Verdict(batchable, reason, free_size)
    return None


def _main(path: Path, intra_op_threads: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Should the machine run out of memory, this process is the one to go.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        outcome = dataclasses.asdict(examine(Engine(path, intra_op_threads)))
    except Invalid as error:
        outcome = {"refused": error.message}
    sys.stdout.write(json.dumps(outcome))
    sys.stdout.flush()
    # The verdict stands. Taking the runtime apart with its threads could only crash.
    os._exit(0)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
