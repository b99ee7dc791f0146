"""One peer of the HTTP/2 server: frames in, frames out, flow control, and what a peer may cost (RFC 9113)."""

import asyncio
from collections import deque
from math import inf
from typing import TYPE_CHECKING, cast

from lepton_common.errors import Invalid
from lepton_common.http2_frames import (
    DEFAULT_WINDOW,
    FRAME_HEAD,
    MAX_FRAME_BYTES,
    MAX_WINDOW,
    PREFACE,
    Code,
    ConnectionFailed,
    Flag,
    HeaderDecoder,
    Kind,
    Setting,
    frame,
    settings_frame,
    settings_of,
    unpadded,
    word,
)
from lepton_common.http2_stream import Stream

if TYPE_CHECKING:
    from lepton_common.http2 import Server

_HEAD_BYTES = FRAME_HEAD.size


class Connection(asyncio.Protocol):
    """One peer and its streams."""

    __slots__ = (
        *("_block", "_block_ends", "_block_stream", "_blocked", "_cheap", "_decoder", "_flushing", "_goaway", "_last"),
        *("_out", "_owed", "_peer_window", "_preface", "_rest", "_send_window", "_server", "_transport", "_unsent"),
        *("_writable", "deadline", "limits", "peer", "receive_window", "streams"),
    )

    _transport: asyncio.Transport

    def __init__(self, server: "Server") -> None:
        self._server = server
        self.limits = server.limits
        self._decoder = HeaderDecoder(server.limits.max_header_bytes)
        self._preface = False
        self._rest = b""
        self._block: bytearray | None = None  # of headers that go on in the next frame
        self._block_stream = 0
        self._block_ends = False
        self._last = 0  # the highest stream that the peer began
        self._goaway = False
        self._cheap = 0  # frames since the last sweep that cost the peer nothing and carry nothing
        self._send_window = DEFAULT_WINDOW
        self._peer_window = DEFAULT_WINDOW  # with which its new streams begin
        self.receive_window = DEFAULT_WINDOW
        self._owed = 0
        self._out: list[bytes] = []
        self._flushing = False
        self._writable = True
        self._unsent = 0
        self._blocked: dict[int, Stream] = {}
        self.streams: dict[int, Stream] = {}
        self.deadline = inf
        self.peer = ""

    # --- the transport's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        limits = self.limits
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self.peer = str((transport.get_extra_info("peername") or ("",))[0])
        self._server.connections.add(self)
        self.deadline = self._server.now + limits.header_timeout_s
        self._write(
            settings_frame(
                {
                    Setting.MAX_CONCURRENT_STREAMS: limits.max_streams,
                    Setting.INITIAL_WINDOW_SIZE: limits.stream_window,
                    Setting.MAX_HEADER_LIST_SIZE: limits.max_header_bytes,
                }
            )
        )
        self._widen_connection(limits.connection_window - DEFAULT_WINDOW)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.lost(self)
        self._out.clear()
        self._blocked.clear()
        for stream in tuple(self.streams.values()):
            self._forget(stream)
            if stream.sink is not None:
                stream.sink.lost()

    def pause_writing(self) -> None:
        self._writable = False
        self._unsent = self._transport.get_write_buffer_size()
        self.deadline = self._server.now + self.limits.write_timeout_s

    def resume_writing(self) -> None:
        self._writable = True
        self._rest_or_work()
        self._pump()

    def data_received(self, data: bytes) -> None:
        if self._goaway and not self.streams:
            return  # Given up; what still comes is not read.
        if self._rest:
            data = self._rest + data
        start, end = 0, len(data)
        if not self._preface:
            if end < len(PREFACE) and PREFACE.startswith(data):
                self._rest = data
                return
            if not data.startswith(PREFACE):
                self._transport.abort()
                return
            self._preface = True
            self._rest_or_work()
            start = len(PREFACE)
        try:
            while end - start >= _HEAD_BYTES:
                high, low, kind, flags, number = FRAME_HEAD.unpack_from(data, start)
                length = high << 8 | low
                if length > MAX_FRAME_BYTES:
                    raise ConnectionFailed(Code.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
                stop = start + _HEAD_BYTES + length
                if stop > end:
                    break
                self._frame(kind, flags, number & MAX_WINDOW, data[start + _HEAD_BYTES : stop])
                start = stop
        except ConnectionFailed as error:
            self.fail(error.code, str(error))
            return
        self._rest = data[start:] if start < end else b""

    # --- frames ---

    def _frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if self._block is not None and (kind != Kind.CONTINUATION or number != self._block_stream):
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "headers: broken off by another frame")
        match kind:
            case Kind.DATA:
                self._data(flags, number, payload)
            case Kind.HEADERS:
                self._headers(flags, number, payload)
            case Kind.WINDOW_UPDATE:
                self._window_update(number, word(payload, "WINDOW_UPDATE"))
            case Kind.RST_STREAM:
                self._reset_by_peer(number, word(payload, "RST_STREAM"))
            case Kind.SETTINGS:
                self._settings(flags, number, payload)
            case Kind.PING:
                self._ping(flags, number, payload)
            case Kind.CONTINUATION:
                self._continuation(flags, payload)
            case Kind.PRIORITY:
                self._count_cheap()  # Nobody heeds it any more.
            case Kind.PUSH_PROMISE:
                raise ConnectionFailed(Code.PROTOCOL_ERROR, "PUSH_PROMISE: from a client")
            case Kind.GOAWAY:
                pass  # It begins nothing more, and closes when it is done
            case _:
                self._count_cheap()

    def _headers(self, flags: int, number: int, payload: bytes) -> None:
        payload = unpadded(payload, flags)
        ends = bool(flags & Flag.END_STREAM)
        if flags & Flag.END_HEADERS:
            self._head(number, payload, ends)
            return
        self._block = bytearray(payload)
        self._block_stream = number
        self._block_ends = ends
        self.deadline = self._server.now + self.limits.header_timeout_s

    def _continuation(self, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "CONTINUATION: of nothing")
        self._block += payload
        if not payload:
            self._count_cheap()
        if len(self._block) > self.limits.max_header_bytes:
            raise ConnectionFailed(Code.ENHANCE_YOUR_CALM, f"headers: more than {self.limits.max_header_bytes} bytes")
        if flags & Flag.END_HEADERS:
            block, self._block = bytes(self._block), None
            self._rest_or_work()
            self._head(self._block_stream, block, self._block_ends)

    def _head(self, number: int, block: bytes, ends: bool) -> None:
        stream = self.streams.get(number)
        if stream is not None:
            self._decoder.fields(block)  # trailers, of which nobody asks
            if not ends or stream._ended:
                raise ConnectionFailed(Code.PROTOCOL_ERROR, "headers: twice for one stream")
            self._end(stream)
            return
        if number % 2 == 0 or number <= self._last:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, f"headers: stream {number} cannot be begun")
        self._last = number
        try:
            head = self._decoder.request(block)
        except Invalid:
            self._write(frame(Kind.RST_STREAM, 0, number, Code.PROTOCOL_ERROR.to_bytes(4, "big")))
            return
        if self._goaway:
            return  # The peer was told that nobody looks at it.
        if len(self.streams) >= self.limits.max_streams:
            self._write(frame(Kind.RST_STREAM, 0, number, Code.REFUSED_STREAM.to_bytes(4, "big")))
            self._count_cheap()
            return
        stream = self.streams[number] = Stream(self, number, head, self._peer_window)
        self.deadline = inf if self._writable else self.deadline
        stream.sink = self._server.handler(stream)
        if ends:
            self._end(stream)

    def _data(self, flags: int, number: int, payload: bytes) -> None:
        size = len(payload)
        self.receive_window -= size
        if self.receive_window < 0:
            raise ConnectionFailed(Code.FLOW_CONTROL_ERROR, "DATA: more than the connection's window")
        self._owed += size
        if self._owed >= self.limits.connection_window // 2:
            self._widen_connection(self._owed)
            self._owed = 0
        stream = self.streams.get(number)
        if stream is None or stream._ended:
            if number == 0 or number > self._last or stream is not None:
                raise ConnectionFailed(Code.STREAM_CLOSED, f"DATA: stream {number} takes none")
            self._count_cheap()  # It may have been on its way when the stream was reset.
            return
        stream.receive_window -= size
        if stream.receive_window < 0:
            self.reset(stream, Code.FLOW_CONTROL_ERROR, lost=True)
            return
        if flags & Flag.PADDED:
            payload = unpadded(payload, flags & ~Flag.PRIORITY)
        if payload and stream.sink is not None:
            stream.sink.received(payload)
        elif not flags & Flag.END_STREAM:
            self._count_cheap()
        if flags & Flag.END_STREAM and not stream.closed:
            self._end(stream)

    def _end(self, stream: Stream) -> None:
        stream._ended = True
        stream.body_deadline = inf
        if stream.sink is not None:
            stream.sink.ended()

    def _reset_by_peer(self, number: int, code: int) -> None:
        if number == 0 or number > self._last:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, f"RST_STREAM: stream {number} was never begun")
        stream = self.streams.get(number)
        # Beginning and giving up is free for the peer, not for us (CVE-2023-44487).
        self._count_cheap()
        if stream is not None:
            self._forget(stream)
            if stream.sink is not None:
                stream.sink.lost()

    def _settings(self, flags: int, number: int, payload: bytes) -> None:
        if number:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "SETTINGS: on a stream")
        if flags & Flag.ACK:
            return
        self._count_cheap()
        for setting, value in settings_of(payload):
            if setting == Setting.INITIAL_WINDOW_SIZE:
                if value > MAX_WINDOW:
                    raise ConnectionFailed(Code.FLOW_CONTROL_ERROR, "SETTINGS: a window that is too large")
                for stream in self.streams.values():
                    stream.send_window += value - self._peer_window
                self._peer_window = value
            elif setting == Setting.MAX_FRAME_SIZE and not MAX_FRAME_BYTES <= value < 2**24:
                raise ConnectionFailed(Code.PROTOCOL_ERROR, "SETTINGS: a frame size that cannot be")
            elif setting == Setting.ENABLE_PUSH and value > 1:
                raise ConnectionFailed(Code.PROTOCOL_ERROR, "SETTINGS: push is on or off")
        self._write(frame(Kind.SETTINGS, Flag.ACK, 0))
        self._pump()

    def _ping(self, flags: int, number: int, payload: bytes) -> None:
        if number or len(payload) != 8:
            raise ConnectionFailed(Code.FRAME_SIZE_ERROR if not number else Code.PROTOCOL_ERROR, "PING: malformed")
        if not flags & Flag.ACK:
            self._count_cheap()
            self._write(frame(Kind.PING, Flag.ACK, 0, payload))

    def _window_update(self, number: int, size: int) -> None:
        if number == 0:
            self._send_window += size
            if size == 0 or self._send_window > MAX_WINDOW:
                raise ConnectionFailed(Code.FLOW_CONTROL_ERROR, "WINDOW_UPDATE: out of range")
            self._pump()
        elif (stream := self.streams.get(number)) is not None:
            stream.send_window += size
            if size == 0 or stream.send_window > MAX_WINDOW:
                self.reset(stream, Code.FLOW_CONTROL_ERROR, lost=True)
            elif number in self._blocked:
                self._pump()
        elif number > self._last:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, f"WINDOW_UPDATE: stream {number} was never begun")

    def _count_cheap(self) -> None:
        self._cheap += 1
        if self._cheap > self.limits.max_cheap_frames:
            raise ConnectionFailed(Code.ENHANCE_YOUR_CALM, "too many frames that carry nothing")

    # --- answering ---

    def reply(self, stream: Stream, head: bytes, body: bytes, trailers: bytes) -> None:
        size, number = len(body), stream.id
        if size <= MAX_FRAME_BYTES and size <= self._send_window and size <= stream.send_window and self._writable:
            self._send_window -= size
            ending = Flag.END_HEADERS | Flag.END_STREAM
            self._write(
                b"%b%b%b%b%b"
                % (
                    frame(Kind.HEADERS, Flag.END_HEADERS, number, head),
                    FRAME_HEAD.pack(size >> 8, size & 0xFF, Kind.DATA, 0, number),
                    body,
                    FRAME_HEAD.pack(len(trailers) >> 8, len(trailers) & 0xFF, Kind.HEADERS, ending, number),
                    trailers,
                )
            )
            self._over(stream)
        else:
            self.write_headers(number, head, last=False)
            self.send(stream, body, trailers)

    def write_headers(self, number: int, block: bytes, *, last: bool) -> None:
        """A header block, in as many frames as it takes."""
        flags = Flag.END_STREAM if last else 0
        kind = Kind.HEADERS
        while len(block) > MAX_FRAME_BYTES:
            self._write(frame(kind, flags, number, block[:MAX_FRAME_BYTES]))
            kind, flags, block = Kind.CONTINUATION, 0, block[MAX_FRAME_BYTES:]
        self._write(frame(kind, flags | Flag.END_HEADERS, number, block))

    def send(self, stream: Stream, data: bytes, trailers: bytes | None) -> None:
        """The data is sent as far as the peer lets it, the rest when it does; then the trailers end the stream."""
        if stream._out is None:
            stream._out = deque()
        if data:
            stream._out.append(memoryview(data))
        stream._trailers = trailers
        self._blocked[stream.id] = stream
        self._pump()

    def reset(self, stream: Stream, code: Code, *, lost: bool = False) -> None:
        self._write(frame(Kind.RST_STREAM, 0, stream.id, code.to_bytes(4, "big")))
        self._forget(stream)
        if lost and stream.sink is not None:
            stream.sink.lost()

    def widen(self, stream: Stream, size: int) -> None:
        stream.receive_window += size
        self._write(frame(Kind.WINDOW_UPDATE, 0, stream.id, size.to_bytes(4, "big")))

    def _widen_connection(self, size: int) -> None:
        self.receive_window += size
        self._write(frame(Kind.WINDOW_UPDATE, 0, 0, size.to_bytes(4, "big")))

    def _pump(self) -> None:
        """What was held back is sent, a frame of each stream in turn."""
        moved = True
        while moved and self._blocked:
            moved = sum(self._send_some(each) for each in tuple(self._blocked.values())) > 0

    def _send_some(self, stream: Stream) -> bool:
        out = stream._out
        assert out is not None
        moved = False
        if out:
            size = min(len(out[0]), MAX_FRAME_BYTES, self._send_window, stream.send_window)
            if size <= 0 or not self._writable:
                return False
            self._send_window -= size
            stream.send_window -= size
            # At once: what the transport cannot take is what `pause_writing` is about.
            self._flush()
            self._transport.write(frame(Kind.DATA, 0, stream.id, bytes(out[0][:size])))
            out[0] = out[0][size:]
            if not out[0]:
                out.popleft()
            moved = True
        if not out:
            del self._blocked[stream.id]
            if stream._trailers is not None:
                self.write_headers(stream.id, stream._trailers, last=True)
                self._over(stream)
        return moved

    def _over(self, stream: Stream) -> None:
        """It is answered. What the peer still sends of it is not wanted."""
        if not stream._ended:
            self._write(frame(Kind.RST_STREAM, 0, stream.id, Code.NO_ERROR.to_bytes(4, "big")))
        self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        stream.closed = True
        self.streams.pop(stream.id, None)
        self._blocked.pop(stream.id, None)
        if not self.streams:
            if self._goaway:
                self._flush()
                self._transport.close()
            else:
                self._rest_or_work()

    def _write(self, data: bytes) -> None:
        """Answers of one turn of the loop leave in one write."""
        self._out.append(data)
        if not self._flushing:
            self._flushing = True
            self._server.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self._out:
            self._transport.write(b"".join(self._out))
            self._out.clear()

    # --- the server's side ---

    def _rest_or_work(self) -> None:
        if self._writable and self._block is None:
            self.deadline = inf if self.streams else self._server.now + self.limits.idle_timeout_s

    def sweep(self, now: float) -> None:
        """Called now and then: the deadlines of the connection and of the bodies that are on their way."""
        self._cheap = 0
        if self.deadline <= now:
            self._expire(now)
        for stream in tuple(self.streams.values()):
            if stream.body_deadline <= now:
                self.reset(stream, Code.CANCEL, lost=True)

    def _expire(self, now: float) -> None:
        unsent = self._transport.get_write_buffer_size()
        if 0 < unsent < self._unsent:
            self._unsent = unsent
            self.deadline = now + self.limits.write_timeout_s
        elif self._writable and self._preface and self._block is None and not self.streams:
            self.leave()
        else:
            self._transport.abort()

    def leave(self) -> None:
        """The peer begins no more requests here; those under way are answered."""
        if not self._goaway:
            self._say_goaway(Code.NO_ERROR, "")
        if not self.streams:
            self._flush()
            self._transport.close()

    def fail(self, code: Code, message: str) -> None:
        """The connection ends here, and the peer hears why."""
        self._server.rejected += 1
        self._say_goaway(code, message)
        self._flush()
        self._transport.close()
        for stream in tuple(self.streams.values()):
            stream.closed = True
            del self.streams[stream.id]
            if stream.sink is not None:
                stream.sink.lost()

    def _say_goaway(self, code: Code, message: str) -> None:
        self._goaway = True
        told = message.encode()[:200]
        self._write(frame(Kind.GOAWAY, 0, 0, self._last.to_bytes(4, "big") + code.to_bytes(4, "big") + told))

    def abort(self) -> None:
        self._transport.abort()
