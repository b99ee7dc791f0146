import asyncio
import hashlib
import os
from pathlib import Path

import pytest
from lepton_common.blobs import Blobs
from lepton_common.errors import Invalid, NotFound
from lepton_worker.cache import Cache


class CountingBlobs:
    """A real store, and which digests were fetched from it."""

    def __init__(self, folder: Path) -> None:
        self.store = Blobs(folder / "blobs")
        self.folder = folder
        self.fetched: list[str] = []

    async def put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        source = self.folder / "source"
        source.write_bytes(data)
        await self.store.put_file(source, digest)
        return digest

    async def fetch(self, sha256: str, path: Path) -> object:
        self.fetched.append(sha256)
        return await self.store.fetch(sha256, path)


@pytest.fixture
def blobs(tmp_path: Path) -> CountingBlobs:
    return CountingBlobs(tmp_path)


async def read(cache: Cache, digest: str, size_bytes: int) -> bytes:
    async with cache.held(digest, size_bytes) as path:
        return path.read_bytes()


async def test_an_artifact_is_fetched_once(blobs: CountingBlobs, tmp_path: Path) -> None:
    digest = await blobs.put(b"model")
    assert await read(Cache(tmp_path / "cache", 100, blobs), digest, 5) == b"model"
    # A restarted worker finds it.
    assert await read(Cache(tmp_path / "cache", 100, blobs), digest, 5) == b"model"
    assert blobs.fetched == [digest]


async def test_an_artifact_wanted_twice_at_once_is_fetched_once(blobs: CountingBlobs, tmp_path: Path) -> None:
    digest = await blobs.put(b"model")
    cache = Cache(tmp_path / "cache", 100, blobs)
    assert await asyncio.gather(*(read(cache, digest, 5) for _ in range(5))) == [b"model"] * 5
    assert blobs.fetched == [digest]


async def test_a_corrupt_cached_artifact_is_thrown_away_and_fetched_again(blobs: CountingBlobs, tmp_path: Path) -> None:
    digest = await blobs.put(b"model")
    cache = Cache(tmp_path / "cache", 100, blobs)
    async with cache.held(digest, 5) as path:
        path.write_bytes(b"m0del")
        path.with_suffix(".verdict").write_text("of the corrupt bytes")
    async with cache.held(digest, 5) as path:
        assert path.read_bytes() == b"model"
        assert not path.with_suffix(".verdict").exists()
    assert blobs.fetched == [digest, digest]


async def test_the_least_recently_used_artifacts_leave_first_and_what_lies_beside_them(
    blobs: CountingBlobs, tmp_path: Path
) -> None:
    first, second, third = [await blobs.put(data) for data in (b"a" * 40, b"b" * 40, b"c" * 40)]
    cache = Cache(tmp_path / "cache", 100, blobs)
    for at, digest in enumerate((first, second, first)):
        async with cache.held(digest, 40) as path:
            path.with_suffix(".verdict").write_text("{}")
            os.utime(path, (at, at))
    await read(cache, third, 40)
    kept = {path.stem for path in (tmp_path / "cache").iterdir()}
    assert kept == {first, third}


async def test_an_artifact_in_use_is_never_evicted(blobs: CountingBlobs, tmp_path: Path) -> None:
    first, second = [await blobs.put(data) for data in (b"a" * 60, b"b" * 60)]
    cache = Cache(tmp_path / "cache", 100, blobs)
    async with cache.held(first, 60) as path:
        await read(cache, second, 60)
        assert path.exists()


async def test_an_artifact_larger_than_the_budget_is_refused(blobs: CountingBlobs, tmp_path: Path) -> None:
    digest = await blobs.put(b"model")
    with pytest.raises(Invalid, match="5 bytes, this worker's cache takes 4"):
        await read(Cache(tmp_path / "cache", 4, blobs), digest, 5)
    assert blobs.fetched == []


async def test_an_artifact_that_is_not_stored_leaves_nothing_behind(blobs: CountingBlobs, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await read(Cache(tmp_path / "cache", 100, blobs), "0" * 64, 5)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_a_killed_worker_left_half_fetched_is_removed(blobs: CountingBlobs, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / ".abc.artifact.x7").write_bytes(b"half")
    Cache(folder, 100, blobs)
    assert list(folder.iterdir()) == []
