"""Runs `inspection.py` on a file in a child process, so that no file can crash, stall or bloat the service."""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

import structlog
from lepton_common.errors import Invalid, Unavailable
from lepton_common.signature import Signature

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Inspector(Protocol):
    async def inspect(self, path: Path) -> Signature:
        """The signature of the model in `path`. Raises Invalid saying why it may not be served."""


class ChildInspector:
    """One child process a file, bounded in time and memory; `at_once` of them at most."""

    def __init__(self, timeout_s: float, at_once: int = 2) -> None:
        self._timeout_s = timeout_s
        self._turn = asyncio.Semaphore(at_once)

    async def inspect(self, path: Path) -> Signature:
        """The signature of the model in `path`. Raises Invalid saying why it may not be served."""
        async with self._turn, _child(path) as child:
            try:
                async with asyncio.timeout(self._timeout_s):
                    output, _ = await child.communicate()
            except TimeoutError as error:
                raise Invalid(f"checking the model took longer than {self._timeout_s:g} s") from error
        if child.returncode:
            _log.warning("inspection of an upload crashed", returncode=child.returncode, sha256=path.name)
            raise Invalid("not a valid ONNX model: it crashes the ONNX checker or takes more memory than allowed")
        outcome = json.loads(output)
        if reason := outcome.get("refused"):
            raise Invalid(reason)
        return Signature.from_dict(outcome["signature"])


@contextlib.asynccontextmanager
async def _child(path: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A running inspection, which has ended when the block does. It inherits none of the service's secrets."""
    try:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-m", f"{__package__}.inspection", str(path)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={},
        )
    except OSError as error:
        raise Unavailable("the registry cannot start a check of the model", retry_after_s=5) from error
    try:
        yield child
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
