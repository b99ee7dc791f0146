"""Artifacts by their sha256, in a folder or an object store. Every byte is verified on its way in and on its way out.

Everything is streamed: an artifact of any size needs some tens of megabytes of memory.
"""

import asyncio
import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from lepton_common.errors import Invalid, LeptonError, NotFound, Unavailable

if TYPE_CHECKING:  # These two exist in obstore's stubs only.
    from obstore.store import ClientConfig, RetryConfig

_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK_BYTES = 1024 * 1024
_PART_BYTES = 8 * 1024 * 1024  # S3 allows 10,000 parts, so an artifact may have 80 GB.
_PARTS_IN_FLIGHT = 3
# A stalled connection ends after 30 s without a byte; a whole artifact may take its time.
_CLIENT: "ClientConfig" = {"connect_timeout": "5s", "read_timeout": "30s", "timeout": "1h"}
_RETRY: "RetryConfig" = {"max_retries": 3, "retry_timeout": timedelta(seconds=15)}


class Corrupt(LeptonError):
    """The stored bytes are not those of their digest. Putting the right ones again heals it."""


class Blobs:
    """A store of artifacts. An artifact is whole or not there at all, also while it is being written."""

    def __init__(self, url: str | Path) -> None:
        """`url` is a folder, made when missing, or s3://bucket/path, gs://bucket/path, az://account/container/path.

        Credentials and endpoints of object stores come from their usual environment variables (AWS_…, GOOGLE_…, …).
        """
        self._folder: Path | None = None
        self._store: ObjectStore
        with _store_errors():
            if "://" in str(url):
                self._store = from_url(str(url), client_options=_CLIENT, retry_config=_RETRY)
            else:
                self._folder = Path(url).absolute()
                self._store = LocalStore(self._folder, mkdir=True)

    async def put_file(self, path: Path, sha256: str) -> int:
        """The file's bytes are stored, durably; returns how many. Putting what is stored already changes nothing.

        Raises Invalid, and stores nothing, when the file has another digest, and Unavailable when the store is away
        or full.
        """
        if await self.is_intact(sha256):
            return await self.size(sha256) or 0
        with path.open("rb") as file:
            chunks = _verified(_read(file), sha256, Invalid)
            with _store_errors():
                # Never visible half-written: a folder gets a temporary file and a rename, an object store a multipart
                # upload. Both are dropped when the last chunk does not come.
                await obstore.put_async(
                    self._store, _key(sha256), chunks, chunk_size=_PART_BYTES, max_concurrency=_PARTS_IN_FLIGHT
                )
            if self._folder:
                stored = self._folder / _key(sha256)
                with _disk_errors():
                    await asyncio.to_thread(_sync, stored, stored.parent, self._folder)
            return file.tell()

    async def fetch(self, sha256: str, path: Path) -> int:
        """`path` holds the artifact, durably; returns its size. Until then, and after an error, nothing is at `path`
        that was not there before.

        Raises NotFound, Corrupt, or Unavailable when the store is away or the disk full.
        """
        with _disk_errors():
            temporary = await asyncio.to_thread(_temporary_beside, path)
            try:
                async with aclosing(self.stream(sha256)) as chunks:
                    async for chunk in chunks:
                        await asyncio.to_thread(_append, temporary, chunk)
                return await asyncio.to_thread(_publish, temporary, path)
            except BaseException:  # Cancelled or failed, no half of a file may stay.
                with contextlib.suppress(OSError):  # A full disk fails the last write once more.
                    temporary.close()
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary.name)
                raise

    async def size(self, sha256: str) -> int | None:
        """The stored artifact's size in bytes, or None."""
        with _store_errors():
            try:
                return (await obstore.head_async(self._store, _key(sha256)))["size"]
            except FileNotFoundError:
                return None

    async def stream(self, sha256: str) -> AsyncGenerator[bytes, None]:
        """The artifact in chunks. The last one comes only when all were right, else Corrupt. Raises NotFound."""
        with _store_errors():
            try:
                found = await obstore.get_async(self._store, _key(sha256))
            except FileNotFoundError:
                raise NotFound(f"artifact {sha256} is not stored") from None
            async for chunk in _verified(aiter(found.stream(min_chunk_size=_CHUNK_BYTES)), sha256, Corrupt):
                yield chunk

    async def is_intact(self, sha256: str) -> bool:
        """Whether the artifact is stored and its bytes are right. Reads all of them."""
        try:
            async for _ in self.stream(sha256):
                pass
        except (NotFound, Corrupt):
            return False
        return True


def _key(sha256: str) -> str:
    if not _SHA256.fullmatch(sha256):
        raise Invalid(f"{sha256[:80]!r} is not a sha256: expected 64 lower-case hexadecimal digits")
    return f"{sha256[:2]}/{sha256}"


async def _read(file: IO[bytes]) -> AsyncIterator[bytes]:
    while chunk := await asyncio.to_thread(file.read, _CHUNK_BYTES):
        yield chunk


async def _verified(
    chunks: AsyncIterator[bytes], sha256: str, mismatch: type[LeptonError]
) -> AsyncGenerator[bytes, None]:
    """The same bytes, the last chunk held back until the digest of all is known to be right."""
    digest = hashlib.sha256()
    held = b""
    async for chunk in chunks:
        await asyncio.to_thread(digest.update, chunk)
        if held:
            yield held
        held = bytes(chunk)
    if digest.hexdigest() != sha256:
        raise mismatch(f"the bytes of artifact {sha256} have the sha256 {digest.hexdigest()}")
    yield held


def _temporary_beside(path: Path) -> IO[bytes]:
    return tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False)


def _append(file: IO[bytes], chunk: bytes) -> None:
    file.write(chunk)


def _publish(temporary: IO[bytes], path: Path) -> int:
    temporary.flush()
    os.fsync(temporary.fileno())
    size = temporary.tell()
    temporary.close()
    os.replace(temporary.name, path)
    _sync(path.parent)
    return size


def _sync(*paths: Path) -> None:
    """What these files and folders hold survives a power cut."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except BaseError as error:
        full = "os error 28" in str(error) or "os error 122" in str(error)  # ENOSPC, EDQUOT
        raise Unavailable(f"the artifact store is {'full' if full else 'not available'}", retry_after_s=30) from error


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(f"an artifact cannot be written to disk: {error.strerror}", retry_after_s=30) from error
