"""Sending an artifact: hashed first, not sent when it is stored already, resumed where a broken connection left it."""

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from lepton.errors import Conflict, Invalid, Unavailable
from lepton.flow import Ask, Flow, OnProgress, Progress, Reply, ask, pause, work

_CHUNK_BYTES = 1 << 20
# Breaks in a row, none of which got a byte further, until an upload is given up.
_MAX_BREAKS = 6
# How long the platform may take for the next chunk, and for checking the artifact at the end.
_TIMEOUT_S = 120.0


class Content:
    """The bytes to send, from a file or from memory, never read as a whole."""

    def __init__(self, source: Path | bytes) -> None:
        self._source = source
        self.size_bytes = len(source) if isinstance(source, bytes) else source.stat().st_size

    def chunks(self, offset: int = 0) -> Iterator[bytes]:
        if isinstance(self._source, bytes):
            for start in range(offset, self.size_bytes, _CHUNK_BYTES):
                yield self._source[start : start + _CHUNK_BYTES]
            return
        with self._source.open("rb") as file:
            file.seek(offset)
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk

    def reported(self, offset: int, progress: OnProgress) -> Iterator[bytes]:
        """The chunks from the offset on; each is reported when the next one is asked for, so when it is on its way."""
        for chunk in self.chunks(offset):
            yield chunk
            offset += len(chunk)
            progress(Progress("upload", offset, self.size_bytes))

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()


def upload(source: Path | bytes, *, progress: OnProgress | None = None) -> Flow[str]:
    """The artifact is stored, checked to be a model; its sha256 is returned. Bytes that are there already are not sent.

    Raises Invalid when the platform cannot serve it, TooLarge, or Unavailable when the connection broke too often.
    """
    content = Content(source)
    if not content.size_bytes:
        raise Invalid("The model is empty.")
    report = progress or (lambda _: None)
    sha256 = yield from work(content.sha256)
    furthest, breaks = -1, 0
    while True:
        try:
            offset = yield from _offset(sha256)
            if offset is None:
                break
            if offset > furthest:
                furthest, breaks = offset, 0
            reply = yield from ask(_put(content, sha256, offset, report))
            if reply.status == 202:
                raise Unavailable("Only a part of the model arrived.")
        except (Conflict, Unavailable) as error:
            breaks += 1
            if furthest < 0 or breaks > _MAX_BREAKS:
                raise
            yield from pause(error.retry_after_s or 0.1 * 2**breaks)
    report(Progress("upload", content.size_bytes, content.size_bytes))
    return sha256


def _offset(sha256: str) -> Flow[int | None]:
    """The first byte the platform has not got, None when it has them all."""
    path = f"/v1/artifacts/{sha256}"
    request = Ask(method="HEAD", path=path, timeout_s=_TIMEOUT_S, repeatable=True, accepts=frozenset({404}))
    reply: Reply = yield from ask(request)
    return int(reply.headers.get("upload-offset", 0)) if reply.status == 404 else None


def _put(content: Content, sha256: str, offset: int, report: OnProgress) -> Ask:
    size = content.size_bytes
    # Nothing left to send, but not stored: the answer to the last byte was lost, so the platform is asked for it again.
    span = f"{offset}-{size - 1}" if offset < size else "*"
    headers = {
        "content-type": "application/octet-stream",
        "content-length": str(size - offset),
        "content-range": f"bytes {span}/{size}",
    }
    return Ask(
        method="PUT",
        path=f"/v1/artifacts/{sha256}",
        headers=headers,
        body=partial(content.reported, offset, report),
        timeout_s=_TIMEOUT_S,
    )
