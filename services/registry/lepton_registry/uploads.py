"""Uploads that may be cut off and resumed: bytes gather in a staging folder until they are whole and verified."""

import asyncio
import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from lepton_common.errors import Conflict, DeadlineExceeded, Invalid, TooLarge, Unavailable

_CONTENT_RANGE = re.compile(r"bytes (?:([0-9]{1,15})-([0-9]{1,15})|\*)/([0-9]{1,15})")
_BUFFER_BYTES = 1 << 20
_WAIT_FOR_WRITER_S = 20.0
_ASK_WRITER_EVERY_S = 0.05
_SILENCE_S = 60.0

T = TypeVar("T")


class WrongOffset(Conflict):
    """A part that does not follow what is already there, which is `offset` bytes."""

    def __init__(self, offset: int) -> None:
        super().__init__(f"the upload continues at byte {offset}")
        self.offset = offset


@dataclass(frozen=True, slots=True)
class Part:
    """`length` bytes of a whole of `total`, from byte `start`. With no bytes, `start` None, it only asks to finish."""

    start: int | None
    length: int
    total: int

    @classmethod
    def parse(cls, content_range: str) -> "Part":
        """Of a Content-Range header, `bytes 0-99/200` or `bytes */200`. Raises Invalid on anything else."""
        match = _CONTENT_RANGE.fullmatch(content_range)
        if match is None:
            raise Invalid("Content-Range: expected bytes FIRST-LAST/TOTAL or bytes */TOTAL")
        total = int(match[3])
        if match[1] is None:
            return cls(None, 0, total)
        first, last = int(match[1]), int(match[2])
        if not first <= last < total:
            raise Invalid(f"Content-Range: {first}-{last} is no part of {total} bytes")
        return cls(first, last - first + 1, total)


class Staging:
    """The folder of unfinished uploads: one file for each tenant and digest, and one writer of it at a time.

    The writer holds a lock of the operating system, so a killed process leaves nothing to unlock, and what it had
    received stays: the length of the file is where the upload goes on.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes

    async def offset(self, tenant: str, sha256: str) -> int:
        """How many bytes of the artifact are here already."""
        return await _in_thread(lambda: _size(self._folder / tenant / sha256))

    @asynccontextmanager
    async def hold(self, tenant: str, sha256: str) -> AsyncIterator["Upload"]:
        """The upload, for this caller alone. Another caller waits for a while, then gets Unavailable."""
        path = self._folder / tenant / sha256
        with _disk_errors():
            try:
                async with asyncio.timeout(_WAIT_FOR_WRITER_S):
                    while (file := _lock(path)) is None:  # noqa: ASYNC110 - a file's lock cannot be awaited
                        await asyncio.sleep(_ASK_WRITER_EVERY_S)
            except TimeoutError as error:
                raise Unavailable("another upload of these bytes is running", retry_after_s=5) from error
        with file:
            yield Upload(path, file, self._max_bytes)

    async def sweep(self, before_s: float) -> int:
        """Uploads that nobody has written to since then (seconds, as time.time()) are gone. Returns how many."""
        return await _in_thread(lambda: self._sweep(before_s))

    def _sweep(self, before_s: float) -> int:
        removed = 0
        for path in self._folder.glob("*/*"):
            if path.stat().st_mtime < before_s and (file := _lock(path)):
                with file:
                    path.unlink()
                removed += 1
        return removed


class Upload:
    """One upload in the hands of its only writer; `size` bytes of it are here."""

    def __init__(self, path: Path, file: BinaryIO, max_bytes: int) -> None:
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self._file = file
        self._max_bytes = max_bytes

    async def receive(self, chunks: AsyncIterator[bytes], length: int | None) -> None:
        """The upload is what `chunks` bring, from its first byte on. `length`: how many bytes they say they are.

        What came before the caller went, or fell silent (DeadlineExceeded), stays. Raises TooLarge, and Unavailable
        when the disk is full; then nothing is left of the upload.
        """
        await self._cut(0)
        await self._make_sure_it_fits(length or 0)
        try:
            await self._append(chunks, self._max_bytes)
        except TooLarge:
            await self.discard()
            raise

    async def receive_part(self, chunks: AsyncIterator[bytes], part: Part) -> None:
        """The part, or what came of it, is appended. As `receive`; raises WrongOffset when the part does not follow."""
        if part.start not in (None, self.size):
            raise WrongOffset(self.size)
        await self._make_sure_it_fits(part.total)
        start = self.size
        try:
            await self._append(chunks, start + part.length)
        except TooLarge as error:
            await self._cut(start)
            raise Invalid(f"the body is longer than the {part.length} bytes of its Content-Range") from error

    async def sha256(self) -> str:
        """The digest of what is here."""
        return await _in_thread(lambda: _sha256(self.path))

    async def discard(self) -> None:
        """Nothing is left of the upload."""
        await _in_thread(lambda: self.path.unlink(missing_ok=True))

    async def _append(self, chunks: AsyncIterator[bytes], up_to: int) -> None:
        buffer = bytearray()
        try:
            async for chunk in _until_silent(chunks):
                if self.size + len(buffer) + len(chunk) > up_to:
                    raise TooLarge(f"an artifact has at most {up_to} bytes")
                buffer += chunk
                if len(buffer) >= _BUFFER_BYTES:
                    await self._write(buffer)
        finally:
            await self._write(buffer)

    async def _write(self, buffer: bytearray) -> None:
        try:
            await _in_thread(lambda: _write_all(self._file, bytes(buffer)))
        except Unavailable:
            # Gives the room back, to this upload's next attempt or to others.
            buffer.clear()
            await self.discard()
            raise
        self.size += len(buffer)
        buffer.clear()

    async def _cut(self, size: int) -> None:
        await _in_thread(lambda: self._file.truncate(size))
        self.size = size

    async def _make_sure_it_fits(self, total: int) -> None:
        if total > self._max_bytes:
            raise TooLarge(f"{total} bytes are more than the {self._max_bytes} that an artifact may have")
        usage = await _in_thread(lambda: shutil.disk_usage(self.path.parent))
        if usage.free < total - self.size:
            raise _full()


def _lock(path: Path) -> BinaryIO | None:
    """The file, made if need be, to append to; None while another has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its last holder may have removed it after we opened it.
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    file.close()
    return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_all(file: BinaryIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]


async def _until_silent(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    while True:
        try:
            async with asyncio.timeout(_SILENCE_S):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise DeadlineExceeded(f"nothing arrived for {_SILENCE_S:g} s") from error
        yield chunk


async def _in_thread(work: Callable[[], T]) -> T:
    with _disk_errors():
        return await asyncio.to_thread(work)


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _full() from error
        raise Unavailable("the registry's folder for uploads is not usable", retry_after_s=60) from error


def _full() -> Unavailable:
    return Unavailable("the registry's disk for uploads is full", retry_after_s=60)
