"""Artifacts on the local disk, by digest: verified on every use, the least recently used ones leave first."""

import asyncio
import hashlib
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

import structlog
from lepton_common.errors import Invalid

_SUFFIX = ".artifact"

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Fetcher(Protocol):
    async def fetch(self, sha256: str, path: Path) -> object:
        """`path` holds exactly the bytes of that digest, or after an error nothing. Raises NotFound, Unavailable."""


class Cache:
    """A folder of artifacts that take at most `budget_bytes`, beside whatever else is written next to one."""

    def __init__(self, folder: Path, budget_bytes: int, blobs: Fetcher) -> None:
        self._folder = folder
        self._budget_bytes = budget_bytes
        self._blobs = blobs
        self._locks: dict[str, asyncio.Lock] = {}
        self._held: Counter[str] = Counter()
        self._arriving_bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        for half_fetched in folder.glob(f".*{_SUFFIX}.*"):  # by a process that was killed
            half_fetched.unlink()

    @asynccontextmanager
    async def held(self, sha256: str, size_bytes: int) -> AsyncIterator[Path]:
        """A file with the bytes of that digest, which stays for as long as the block lasts.

        A cached file that no longer has them is thrown away and fetched again. Raises Invalid when it can never fit
        the budget, and what the store raises.
        """
        path = self._folder / f"{sha256}{_SUFFIX}"
        self._held[sha256] += 1
        try:
            async with self._locks.setdefault(sha256, asyncio.Lock()):
                if not await asyncio.to_thread(_is_intact, path, sha256):
                    await self._fetch(sha256, size_bytes, path)
                os.utime(path)
            yield path
        finally:
            self._held[sha256] -= 1
            if not self._held[sha256]:
                del self._held[sha256], self._locks[sha256]

    async def _fetch(self, sha256: str, size_bytes: int, path: Path) -> None:
        if size_bytes > self._budget_bytes:
            raise Invalid(f"the artifact has {size_bytes} bytes, this worker's cache takes {self._budget_bytes}")
        _remove(path)
        self._make_room(size_bytes)
        self._arriving_bytes += size_bytes
        try:
            await self._blobs.fetch(sha256, path)
        finally:
            self._arriving_bytes -= size_bytes

    def _make_room(self, size_bytes: int) -> None:
        """The least recently used artifacts that nobody holds are gone, until `size_bytes` more fit."""
        found = [(path, path.stat()) for path in self._folder.glob(f"*{_SUFFIX}")]
        taken_bytes = sum(stat.st_size for _, stat in found) + self._arriving_bytes
        excess_bytes = taken_bytes + size_bytes - self._budget_bytes
        for path, stat in sorted(found, key=lambda each: each[1].st_mtime_ns):
            if excess_bytes <= 0:
                return
            if path.stem not in self._held:
                _remove(path)
                excess_bytes -= stat.st_size


def _remove(path: Path) -> None:
    for each in path.parent.glob(f"{path.stem}.*"):
        each.unlink(missing_ok=True)


def _is_intact(path: Path, sha256: str) -> bool:
    try:
        with path.open("rb") as file:
            intact = hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except FileNotFoundError:
        return False
    if not intact:
        _log.warning("a cached artifact is corrupt, fetching it again", sha256=sha256)
    return intact
