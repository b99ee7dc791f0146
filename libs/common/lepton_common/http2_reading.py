"""Bytes of one HTTP/2 peer as frames, header blocks whole (RFC 9113 §4)."""

from collections.abc import Callable

from lepton_common.http2_frames import (
    FRAME_HEAD,
    MAX_FRAME_BYTES,
    MAX_WINDOW,
    PREFACE,
    Code,
    ConnectionFailed,
    Flag,
    Kind,
    unpadded,
)

_HEAD_BYTES = FRAME_HEAD.size

Take = Callable[[int, int, int, bytes], None]  # kind, flags, stream, payload


class FrameReader:
    """Hands every frame to `take`. HEADERS come without padding, and with what follows them in CONTINUATIONs."""

    __slots__ = ("_block", "_block_flags", "_block_stream", "_max_block_bytes", "_rest", "_take", "began", "frames")

    def __init__(self, take: Take, max_block_bytes: int) -> None:
        self._take = take
        self._max_block_bytes = max_block_bytes
        self._rest = b""
        self._block: bytearray | None = None
        self._block_stream = 0
        self._block_flags = 0
        self.began = False  # the peer has said that it speaks HTTP/2
        self.frames = 0  # that were whole; a header block is one

    @property
    def in_frame(self) -> bool:
        return bool(self._rest)

    @property
    def in_headers(self) -> bool:
        return self._block is not None

    def feed(self, data: bytes) -> None:
        """Raises ConnectionFailed when the bytes are not HTTP/2's."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        start, end = 0, len(data)
        if not self.began:
            if not data.startswith(PREFACE):
                if not PREFACE.startswith(data):
                    raise ConnectionFailed(Code.PROTOCOL_ERROR, "only HTTP/2 with prior knowledge is spoken here")
                self._rest = data
                return
            self.began = True
            start = len(PREFACE)
        while end - start >= _HEAD_BYTES:
            high, low, kind, flags, number = FRAME_HEAD.unpack_from(data, start)
            length = high << 8 | low
            if length > MAX_FRAME_BYTES:
                raise ConnectionFailed(Code.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
            stop = start + _HEAD_BYTES + length
            if stop > end:
                break
            payload = data[start + _HEAD_BYTES : stop]
            start = stop
            number &= MAX_WINDOW
            if self._block is not None or kind == Kind.CONTINUATION:
                self._continue(kind, flags, number, payload)
                continue
            if kind == Kind.HEADERS:
                payload = unpadded(payload, flags)
                if not flags & Flag.END_HEADERS:
                    self._block, self._block_stream, self._block_flags = bytearray(payload), number, flags
                    continue
            self.frames += 1
            self._take(kind, flags, number, payload)
        if start < end:
            self._rest = data[start:]

    def _continue(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if self._block is None:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "CONTINUATION: of nothing")
        if kind != Kind.CONTINUATION or number != self._block_stream:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "headers: broken off by another frame")
        self._block += payload
        if len(self._block) > self._max_block_bytes:
            raise ConnectionFailed(Code.ENHANCE_YOUR_CALM, f"headers: more than {self._max_block_bytes} bytes")
        if flags & Flag.END_HEADERS:
            block, self._block = bytes(self._block), None
            self.frames += 1
            self._take(Kind.HEADERS, self._block_flags, number, block)
        elif not payload:
            self._take(kind, flags, number, b"")  # It carries nothing, and counts.
