"""What leaves on one HTTP/2 connection: frames of one turn of the loop in one write, bodies as far as the peer lets
them (RFC 9113 §5.2)."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from math import inf
from typing import TYPE_CHECKING

from lepton_common.http2_frames import (
    DEFAULT_WINDOW,
    FRAME_HEAD,
    MAX_FRAME_BYTES,
    MAX_WINDOW,
    Code,
    ConnectionFailed,
    Flag,
    Kind,
    frame,
)
from lepton_common.http2_stream import Stream

if TYPE_CHECKING:
    from lepton_common.http2 import Server

_JOIN_BYTES = 4096  # below, copying is cheaper than another write


class Sender:
    """The answers of one connection. `over` is called with each stream that is answered."""

    __slots__ = (
        "_closed",
        "_flushing",
        "_out",
        "_over",
        "_queue",
        "_server",
        "_transport",
        "stream_window",
        "window",
        "writable",
    )

    def __init__(self, server: "Server", transport: asyncio.Transport, over: Callable[[Stream], None]) -> None:
        self._server = server
        self._transport = transport
        self._over = over
        self._out: list[bytes] = []
        self._flushing = False
        self._closed = False
        self._queue: dict[int, Stream] = {}  # what has a body to send, and a window of its own to do it
        self.writable = True
        self.window = DEFAULT_WINDOW
        self.stream_window = DEFAULT_WINDOW  # with which the peer's new streams begin

    def write(self, *pieces: bytes) -> None:
        """The frames leave with all others of this turn of the loop."""
        self._out += pieces
        if not self._flushing:
            self._flushing = True
            self._server.loop.call_soon(self.flush)

    def flush(self) -> None:
        self._flushing = False
        if self._out and not self._closed:
            self._transport.write(b"".join(self._out))
        self._out.clear()

    def close(self) -> None:
        """Nothing leaves after what was written."""
        self.flush()
        self._closed = True

    def reply(self, stream: Stream, head: bytes, body: bytes, trailers: bytes) -> None:
        """The whole answer, if possible at once."""
        size, number = len(body), stream.id
        if size <= MAX_FRAME_BYTES and size <= self.window and size <= stream.send_window and self.writable:
            self.window -= size
            last = Flag.END_HEADERS | Flag.END_STREAM
            self.write(
                FRAME_HEAD.pack(len(head) >> 8, len(head) & 0xFF, Kind.HEADERS, Flag.END_HEADERS, number),
                head,
                FRAME_HEAD.pack(size >> 8, size & 0xFF, Kind.DATA, 0, number),
                body,
                FRAME_HEAD.pack(len(trailers) >> 8, len(trailers) & 0xFF, Kind.HEADERS, last, number),
                trailers,
            )
            self._over(stream)
        else:
            self.headers(number, head, last=False)
            self.send(stream, body, trailers)

    def headers(self, number: int, block: bytes, *, last: bool) -> None:
        """A header block, in as many frames as it takes."""
        flags = Flag.END_STREAM if last else 0
        kind = Kind.HEADERS
        while len(block) > MAX_FRAME_BYTES:
            self.write(frame(kind, flags, number, block[:MAX_FRAME_BYTES]))
            kind, flags, block = Kind.CONTINUATION, 0, block[MAX_FRAME_BYTES:]
        self.write(frame(kind, flags | Flag.END_HEADERS, number, block))

    def send(self, stream: Stream, data: bytes | bytearray | memoryview, trailers: bytes | None) -> None:
        """The data is sent as far as the peer lets it, the rest when it does; then the trailers end the stream."""
        stream._trailers = trailers
        if data:
            if stream._out is None:
                stream._out = deque()
            stream._out.append(memoryview(data))
            self._hold(stream, len(data))
            if stream.send_window > 0:
                self._queue[stream.id] = stream
                self.pump()
            if stream.unsent_bytes and stream.write_deadline == inf:
                stream.write_deadline = self._server.now + self._server.limits.write_timeout_s
        elif not stream.unsent_bytes:
            self._finish(stream)

    def pump(self) -> None:
        """What is held back is sent, a frame of each stream in turn."""
        queue = self._queue
        while queue and self.window > 0 and self.writable:
            number = next(iter(queue))
            stream = queue.pop(number)
            self._send_frame(stream)
            if stream.unsent_bytes and stream.send_window > 0:
                queue[number] = stream

    def widen(self, stream: Stream, size: int) -> None:
        """The peer takes so much more of this stream."""
        stream.send_window += size
        if stream.unsent_bytes and stream.send_window > 0:
            self._queue[stream.id] = stream
            self.pump()

    def resize(self, window: int, streams: Iterable[Stream]) -> None:
        """The peer changed the window with which its streams began, those that are open too. Raises
        ConnectionFailed."""
        change = window - self.stream_window
        self.stream_window = window
        for stream in streams if change else ():
            stream.send_window += change
            if stream.send_window > MAX_WINDOW:
                raise ConnectionFailed(Code.FLOW_CONTROL_ERROR, "SETTINGS: a window that is too large")
            if stream.send_window <= 0:
                self._queue.pop(stream.id, None)
            elif stream.unsent_bytes:
                self._queue[stream.id] = stream
        self.pump()

    def forget(self, stream: Stream) -> None:
        self._queue.pop(stream.id, None)
        self._hold(stream, -stream.unsent_bytes)

    def _send_frame(self, stream: Stream) -> None:
        out = stream._out
        assert out, "a stream in the queue has something to send"
        data = out[0]
        size = min(len(data), MAX_FRAME_BYTES, self.window, stream.send_window)
        if size == len(data):
            out.popleft()
        else:
            out[0] = data[size:]
        self.window -= size
        stream.send_window -= size
        self._hold(stream, -size)
        head = FRAME_HEAD.pack(size >> 8, size & 0xFF, Kind.DATA, 0, stream.id)
        if size <= _JOIN_BYTES:
            self.write(head + data[:size])
        else:
            self.flush()
            self._transport.writelines((head, data[:size]))
        if stream.unsent_bytes:
            stream.write_deadline = self._server.now + self._server.limits.write_timeout_s
        else:
            stream.write_deadline = inf
            self._finish(stream)

    def _hold(self, stream: Stream, size: int) -> None:
        stream.unsent_bytes += size
        self._server.unsent_bytes += size

    def _finish(self, stream: Stream) -> None:
        if stream._trailers is not None:
            self.headers(stream.id, stream._trailers, last=True)
            self._over(stream)
