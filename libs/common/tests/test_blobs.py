import asyncio
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lepton_common.blobs import Blobs, Corrupt
from lepton_common.errors import Invalid, NotFound, Unavailable

DATA = bytes(range(256)) * 20_000  # About 5 MB: several chunks.
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(DATA)
    return path


@pytest.fixture(params=["folder", "memory"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    """The same must hold for a folder and for an object store; memory stands in for those that cannot run here."""
    return Blobs(tmp_path / "blobs" if request.param == "folder" else "memory:///")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small tmpfs can only be mounted by root")
    yield folder
    subprocess.run(["umount", folder], check=True)


async def download(blobs: Blobs, into: list[bytes]) -> None:
    async for chunk in blobs.stream(SHA256):
        into.append(chunk)  # noqa: PERF401, what came before an error counts


def files_under(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


async def test_what_is_put_comes_back_as_a_file_and_as_a_stream(blobs: Blobs, source: Path, tmp_path: Path) -> None:
    assert await blobs.size(SHA256) is None
    assert await blobs.put_file(source, SHA256) == len(DATA)
    assert await blobs.size(SHA256) == len(DATA)
    assert await blobs.fetch(SHA256, tmp_path / "fetched") == len(DATA)
    assert (tmp_path / "fetched").read_bytes() == DATA
    assert b"".join([chunk async for chunk in blobs.stream(SHA256)]) == DATA


async def test_an_empty_artifact_is_one_too(blobs: Blobs, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    sha256 = hashlib.sha256().hexdigest()
    assert await blobs.put_file(tmp_path / "empty", sha256) == 0
    assert await blobs.fetch(sha256, tmp_path / "fetched") == 0


async def test_a_repeated_put_changes_nothing(source: Path, tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    await blobs.put_file(source, SHA256)
    stored = tmp_path / "blobs" / SHA256[:2] / SHA256
    before = stored.stat()
    assert await blobs.put_file(source, SHA256) == len(DATA)
    assert (stored.stat().st_ino, stored.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


async def test_parallel_puts_of_the_same_bytes_agree(blobs: Blobs, source: Path, tmp_path: Path) -> None:
    assert await asyncio.gather(*(blobs.put_file(source, SHA256) for _ in range(4))) == [len(DATA)] * 4
    assert await blobs.fetch(SHA256, tmp_path / "fetched") == len(DATA)


@pytest.mark.parametrize("content", [b"", b"x", DATA + b"x", DATA[:-1]])
async def test_bytes_of_another_digest_are_not_stored(blobs: Blobs, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "wrong").write_bytes(content)
    with pytest.raises(Invalid, match=SHA256):
        await blobs.put_file(tmp_path / "wrong", SHA256)
    assert await blobs.size(SHA256) is None


async def test_a_half_written_artifact_is_never_visible(source: Path, tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    putting = asyncio.create_task(blobs.put_file(source, SHA256))
    sizes = set()
    while not putting.done():
        sizes.add(await blobs.size(SHA256))
    assert await putting == len(DATA)
    assert sizes <= {None, len(DATA)}


@pytest.mark.parametrize("damage", [DATA[:-1], b"", DATA[:-1] + b"!"])
async def test_a_corrupt_artifact_is_named_leaves_nothing_and_is_healed_by_putting_it_again(
    source: Path, tmp_path: Path, damage: bytes
) -> None:
    blobs = Blobs(tmp_path / "blobs")
    await blobs.put_file(source, SHA256)
    (tmp_path / "blobs" / SHA256[:2] / SHA256).write_bytes(damage)
    (tmp_path / "cache").mkdir()
    with pytest.raises(Corrupt, match=SHA256):
        await blobs.fetch(SHA256, tmp_path / "cache" / "model")
    assert files_under(tmp_path / "cache") == []
    received: list[bytes] = []
    with pytest.raises(Corrupt):
        await download(blobs, received)
    # Whoever downloads it can tell that it is not whole.
    assert len(b"".join(received)) < len(damage) or not damage
    await blobs.put_file(source, SHA256)
    assert await blobs.fetch(SHA256, tmp_path / "cache" / "model") == len(DATA)


async def test_an_artifact_that_is_not_stored_is_not_found(blobs: Blobs, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=SHA256):
        await blobs.fetch(SHA256, tmp_path / "fetched")
    assert files_under(tmp_path) == []
    assert await blobs.size(SHA256) is None


@pytest.mark.parametrize(
    "name", ["", "../../etc/passwd", SHA256.upper(), SHA256 + "0", SHA256[:-1] + "/", "a" * 63 + "\n"]
)
async def test_only_a_digest_names_an_artifact(blobs: Blobs, source: Path, name: str) -> None:
    for call in (blobs.put_file(source, name), blobs.fetch(name, source), blobs.size(name)):
        with pytest.raises(Invalid, match="not a sha256"):
            await call


async def test_a_full_store_says_so_and_keeps_nothing(source: Path, small_disk: Path) -> None:
    with pytest.raises(Unavailable, match="the artifact store is full"):
        await Blobs(small_disk).put_file(source, SHA256)
    assert files_under(small_disk) == []


async def test_a_full_cache_disk_says_so_and_keeps_nothing(source: Path, small_disk: Path, tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    await blobs.put_file(source, SHA256)
    with pytest.raises(Unavailable, match="No space left"):
        await blobs.fetch(SHA256, small_disk / "model")
    assert files_under(small_disk) == []


async def test_a_store_that_is_away_is_unavailable(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "c",
    }.items():
        monkeypatch.setenv(name, value)
    blobs = Blobs("s3://bucket/artifacts")
    for call in (blobs.put_file(source, SHA256), blobs.size(SHA256), blobs.fetch(SHA256, source.parent / "fetched")):
        with pytest.raises(Unavailable, match="the artifact store is not available"):
            await call
    assert files_under(source.parent) == [source.name]


MEASURE = """
import asyncio, hashlib, pathlib, resource, sys
from lepton_common.blobs import Blobs

def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

async def round_trip(folder, megabytes):
    source, sha256 = folder / "source", hashlib.sha256()
    with source.open("wb") as file:
        for number in range(megabytes):
            file.write(chunk := number.to_bytes(4, "big") * 262144)
            sha256.update(chunk)
    blobs = Blobs(folder / "blobs")
    await blobs.put_file(source, sha256.hexdigest())
    await blobs.fetch(sha256.hexdigest(), folder / "fetched")

folder = pathlib.Path(sys.argv[1])
asyncio.run(round_trip(folder, 1))
before = peak_mb()
asyncio.run(round_trip(folder, 128))
print(peak_mb() - before)
"""


def test_a_large_artifact_does_not_sit_in_memory(tmp_path: Path) -> None:
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert float(measured.stdout) < 64  # MB, of 128.
