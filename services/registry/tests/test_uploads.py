"""Uploads that are cut off, resumed, too long, at once, or meet a full disk."""

import asyncio
import hashlib
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lepton_common.errors import Invalid, TooLarge, Unavailable
from lepton_registry.uploads import Part, Staging, WrongOffset

SHA = "0" * 64
MEBIBYTE = 1 << 20


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def cut_off_after(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
    raise ConnectionResetError


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """The operating system takes no longer files from this process, as if the disk was full."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def staging(tmp_path: Path) -> Staging:
    return Staging(tmp_path / "staging", max_bytes=4 * MEBIBYTE)


async def test_upload_in_one_stream_is_whole(staging: Staging) -> None:
    data = [bytes([n]) * 700_000 for n in range(5)]
    async with staging.hold("acme", SHA) as upload:
        await upload.receive(chunks(*data), length=None)
        assert upload.path.read_bytes() == b"".join(data)
        assert await upload.sha256() == hashlib.sha256(b"".join(data)).hexdigest()


async def test_upload_goes_on_where_it_was_cut_off(staging: Staging) -> None:
    with pytest.raises(ConnectionResetError):
        async with staging.hold("acme", SHA) as upload:
            await upload.receive(cut_off_after(b"abc", b"de"), length=8)
    assert await staging.offset("acme", SHA) == 5
    async with staging.hold("acme", SHA) as upload:
        await upload.receive_part(chunks(b"fgh"), Part.parse("bytes 5-7/8"))
        assert upload.path.read_bytes() == b"abcdefgh"


async def test_parts_follow_each_other(staging: Staging) -> None:
    for header, data in [("bytes 0-1/5", b"ab"), ("bytes 2-3/5", b"cd"), ("bytes */5", b""), ("bytes 4-4/5", b"e")]:
        async with staging.hold("acme", SHA) as upload:
            await upload.receive_part(chunks(data), Part.parse(header))
    assert upload.size == 5
    assert upload.path.read_bytes() == b"abcde"


async def test_part_that_leaves_a_gap_or_overlaps_is_told_the_right_offset(staging: Staging) -> None:
    async with staging.hold("acme", SHA) as upload:
        await upload.receive_part(chunks(b"abc"), Part.parse("bytes 0-2/9"))
        for header in ("bytes 4-5/9", "bytes 2-3/9", "bytes 0-8/9"):
            with pytest.raises(WrongOffset) as caught:
                await upload.receive_part(chunks(b"xx"), Part.parse(header))
            assert caught.value.offset == 3
        assert upload.path.read_bytes() == b"abc"


async def test_part_longer_than_it_says_leaves_the_upload_as_it_was(staging: Staging) -> None:
    async with staging.hold("acme", SHA) as upload:
        await upload.receive_part(chunks(b"abc"), Part.parse("bytes 0-2/9"))
        with pytest.raises(Invalid, match="longer than the 2 bytes"):
            await upload.receive_part(chunks(b"d", b"e", b"f"), Part.parse("bytes 3-4/9"))
    assert await staging.offset("acme", SHA) == 3


async def test_new_stream_starts_from_the_first_byte(staging: Staging) -> None:
    async with staging.hold("acme", SHA) as upload:
        await upload.receive(chunks(b"old and long"), length=None)
        await upload.receive(chunks(b"new"), length=3)
        assert upload.path.read_bytes() == b"new"


@pytest.mark.parametrize("length", [None, 5 * MEBIBYTE])
async def test_upload_over_the_limit_leaves_nothing(staging: Staging, length: int | None) -> None:
    async with staging.hold("acme", SHA) as upload:
        with pytest.raises(TooLarge):
            await upload.receive(chunks(*[bytes(MEBIBYTE)] * 5), length)
    assert await staging.offset("acme", SHA) == 0


async def test_part_of_a_whole_over_the_limit_is_refused_before_a_byte_is_read(staging: Staging) -> None:
    body = chunks(b"a")
    async with staging.hold("acme", SHA) as upload:
        with pytest.raises(TooLarge):
            await upload.receive_part(body, Part.parse(f"bytes 0-0/{5 * MEBIBYTE}"))
    assert await anext(body) == b"a"


async def test_full_disk_is_unavailable_and_leaves_nothing(staging: Staging, tmp_path: Path) -> None:
    async with staging.hold("acme", SHA) as upload:
        with files_of_at_most(MEBIBYTE), pytest.raises(Unavailable, match="disk for uploads is full"):
            await upload.receive(chunks(*[bytes(MEBIBYTE)] * 3), length=None)
    assert not files_in(tmp_path)


async def test_upload_larger_than_the_free_disk_is_refused_before_a_byte_is_read(tmp_path: Path) -> None:
    staging = Staging(tmp_path, max_bytes=1 << 60)
    async with staging.hold("acme", SHA) as upload:
        with pytest.raises(Unavailable, match="disk for uploads is full"):
            await upload.receive_part(chunks(b"a"), Part.parse("bytes 0-0/900000000000000"))


async def test_second_writer_of_the_same_bytes_waits_for_the_first(staging: Staging) -> None:
    order: list[str] = []

    async def write(name: str) -> None:
        async with staging.hold("acme", SHA) as upload:
            order.append(name)
            await upload.receive(chunks(name.encode()), length=None)
            await asyncio.sleep(0)
            assert upload.path.read_text() == name
            order.append(name)
            await upload.discard()

    await asyncio.gather(write("first"), write("second"), write("third"))
    assert order[::2] == order[1::2]
    assert len(order) == 6


async def test_tenants_do_not_share_unfinished_uploads(staging: Staging) -> None:
    async with staging.hold("acme", SHA) as upload, staging.hold("other", SHA):
        await upload.receive(chunks(b"abc"), length=None)
    assert await staging.offset("other", SHA) == 0


async def test_only_old_uploads_that_nobody_writes_are_swept(staging: Staging) -> None:
    for tenant in ("left", "written"):
        async with staging.hold(tenant, SHA) as upload:
            await upload.receive(chunks(b"abc"), length=None)
    mtime_s = upload.path.stat().st_mtime
    assert await staging.sweep(before_s=mtime_s - 60) == 0
    async with staging.hold("written", SHA):
        assert await staging.sweep(before_s=mtime_s + 60) == 1
    assert await staging.offset("left", SHA) == 0
    assert await staging.offset("written", SHA) == 3


@pytest.mark.parametrize(
    "header",
    [
        "",
        "bytes",
        "bytes 0-1",
        "bytes 2-1/5",
        "bytes 0-5/5",
        "items 0-1/5",
        "bytes 0-1/*",
        "bytes -1-2/5",
        "bytes \u0660-\u0661/\u0665",
    ],
)
def test_content_range_that_makes_no_sense_is_refused(header: str) -> None:
    with pytest.raises(Invalid, match="Content-Range"):
        Part.parse(header)
