"""Where bytes may come from that a producer names by URI: what is under a prefix that the operator allows."""

import asyncio
import os
import re
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import BinaryIO, Self
from urllib.parse import unquote_to_bytes

from lepton_common.errors import Forbidden, Invalid
from lepton_common.outbound import Outbound

_URI = re.compile(
    r"(?:https://(?P<host>[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?)(?::(?P<port>[0-9]{1,5}))?|file://)"
    r"(?P<path>(?:/[A-Za-z0-9._~!$&'()*+,;=:@%-]*)*)(?P<query>\?[A-Za-z0-9._~!$&'()*+,;=:@/?%-]*)?"
)
_ESCAPES = re.compile(r"(?:[^%]|%[0-9A-Fa-f]{2})*")
_CHUNK_BYTES = 1 << 20
_FOLDER = os.O_RDONLY | os.O_DIRECTORY
_SAY_HOW = "expected https://host/path or file:///path, plain characters or %XX, no . or .. in it, no user, no fragment"

Chunks = AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class Location:
    """A URI that can mean one thing only. `host` is empty for a file. Its text form leaves out what may be a secret."""

    host: str
    port: int
    path: str
    query: str
    segments: tuple[str, ...]

    @classmethod
    def parse(cls, uri: str) -> Self:
        """Raises Invalid for what two readers could read in two ways. Nothing is decoded twice."""
        found = _URI.fullmatch(uri)
        if found is None or not _ESCAPES.fullmatch(uri):
            raise Invalid(f"uri: {_SAY_HOW}")
        host, path, query = found["host"] or "", found["path"], found["query"] or ""
        port = int(found["port"] or 443)
        segments = tuple(_decoded(each) for each in path.removesuffix("/").split("/")[1:])
        if not 0 < port < 65536 or (not host and query):
            raise Invalid(f"uri: {_SAY_HOW}")
        return cls(host, port, path, query, segments)

    def holds(self, other: "Location") -> bool:
        """Whether the other is below this one, taken as a folder."""
        return (self.host, self.port) == (other.host, other.port) and (
            other.segments[: len(self.segments)] == self.segments and len(other.segments) > len(self.segments)
        )

    def __str__(self) -> str:
        return f"https://{self.host}:{self.port}{self.path}" if self.host else f"file://{self.path}"


class Sources:
    """Opens what is under the allowed prefixes, and nothing else. Without any it opens nothing."""

    def __init__(self, allowed: Sequence[str], outbound: Outbound) -> None:
        """Raises Invalid for a prefix that is no URI."""
        self._allowed = [Location.parse(each) for each in allowed]
        self._outbound = outbound

    def check(self, uri: str) -> Location:
        """Where that is. Raises Invalid, and Forbidden for what is not under any prefix."""
        location = Location.parse(uri)
        if self._prefix(location) is None:
            raise Forbidden(f"uri: {location} is not below any prefix that the operator allows (LEPTON_INGEST_FROM)")
        return location

    @asynccontextmanager
    async def open(self, uri: str) -> AsyncIterator[tuple[Chunks, int | None]]:
        """The bytes there, and how many they say they are. Raises as `check`, and as `Outbound.get`."""
        location = self.check(uri)
        if location.host:
            async with self._outbound.get(location.host, location.port, location.path + location.query) as answer:
                length = answer.headers.get("content-length", "")
                yield answer.aiter_raw(_CHUNK_BYTES), int(length) if length.isdecimal() else None
        else:
            prefix = self._prefix(location)
            assert prefix is not None
            with await asyncio.to_thread(_open_below, prefix, location) as file:
                yield _read(file), os.fstat(file.fileno()).st_size

    def _prefix(self, location: Location) -> Location | None:
        return next((each for each in self._allowed if each.holds(location)), None)


def _decoded(segment: str) -> str:
    """One part of a path. Raises Invalid for one that could lead elsewhere, also when it is decoded once more."""
    try:
        text = unquote_to_bytes(segment).decode()
    except UnicodeDecodeError:
        raise Invalid(f"uri: {_SAY_HOW}") from None
    if text in ("", ".", "..") or not text.isprintable() or any(each in text for each in "/\\%"):
        raise Invalid(f"uri: {_SAY_HOW}")
    return text


def _open_below(prefix: Location, location: Location) -> BinaryIO:
    """The regular file, reached from the prefix's folder without following a single link."""
    *between, name = location.segments[len(prefix.segments) :]
    with ExitStack() as open_folders:
        try:
            folder = os.open("/" + "/".join(prefix.segments), _FOLDER)
            open_folders.callback(os.close, folder)
            for each in between:
                folder = os.open(each, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
                open_folders.callback(os.close, folder)
            # Not to be held up by a pipe that nobody writes to.
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        except OSError as error:
            raise Invalid(f"uri: there is no file {location}, or a link is on the way to it") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Invalid(f"uri: {location} is not a file")
    return os.fdopen(descriptor, "rb")


async def _read(file: BinaryIO) -> Chunks:
    while chunk := await asyncio.to_thread(file.read, _CHUNK_BYTES):
        yield chunk
