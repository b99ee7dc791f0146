"""The requests that one HTTP/2 peer makes: begun, filled as far as their takers let it, ended, given up (RFC 9113
§5)."""

from math import inf
from typing import TYPE_CHECKING

from lepton_common.errors import Invalid, TooLarge
from lepton_common.http2_frames import (
    DEFAULT_WINDOW,
    MAX_WINDOW,
    Code,
    ConnectionFailed,
    Flag,
    reset_frame,
    unpadded,
    window_frame,
)
from lepton_common.http2_headers import HeaderDecoder
from lepton_common.http2_stream import Stream

if TYPE_CHECKING:
    from lepton_common.http2_connection import Connection

_MAX_GIVEN_UP = 1024
# What frames cost that the peer gets for nothing: one by itself, and one that makes work or undoes it.
FRAME, WORK = 1, 8


class Receiver:
    """One connection's streams, by number."""

    __slots__ = ("_connection", "_decoder", "_given_up", "_owed", "_server", "_window", "last", "streams", "told")

    def __init__(self, connection: "Connection") -> None:
        self._connection = connection
        self._server = connection.server
        self._decoder = HeaderDecoder(self._server.limits.max_header_bytes)
        self._given_up: dict[int, None] = {}  # of which frames may still be on their way
        self._window = DEFAULT_WINDOW
        self._owed = 0
        self.streams: dict[int, Stream] = {}
        self.last = 0  # the highest that the peer began
        self.told = MAX_WINDOW  # the highest that is looked at

    def open_window(self) -> None:
        """The peer may send as much of all streams together as the limits allow."""
        self._widen(self._server.limits.connection_window - DEFAULT_WINDOW)

    # --- frames ---

    def headers(self, flags: int, number: int, block: bytes) -> None:
        ends = bool(flags & Flag.END_STREAM)
        if number <= self.last:
            self._trailers(number, block, ends)
            return
        if number % 2 == 0:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, f"headers: stream {number} is none of a client's")
        self.last = number
        try:
            head = self._decoder.request(block)
        except Invalid as error:
            self._refuse(number, Code.ENHANCE_YOUR_CALM if isinstance(error, TooLarge) else Code.PROTOCOL_ERROR)
            return
        if number > self.told:
            return  # The peer knows that nobody looks at it.
        if len(self.streams) >= self._server.limits.max_streams:
            self._refuse(number, Code.REFUSED_STREAM)
            return
        connection = self._connection
        stream = self.streams[number] = Stream(connection, number, head, connection.sender.stream_window)
        stream._ended = ends
        try:
            sink = self._server.handler(stream)
            if not stream.closed:
                stream.sink = sink
                if ends:
                    self._end(stream)
        except Exception as error:  # A handler's mistake costs its own request only.
            connection.failed(stream, error)

    def data(self, flags: int, number: int, payload: bytes) -> None:
        size = len(payload)
        self._window -= size
        if self._window < 0:
            raise ConnectionFailed(Code.FLOW_CONTROL_ERROR, "DATA: more than the connection's window")
        self._owed += size
        if self._owed >= self._server.limits.connection_window // 2:
            self._widen(self._owed)
            self._owed = 0
        stream = self.streams.get(number)
        if stream is None or stream._ended:
            self._stray_data(number, stream, size)
            return
        stream.receive_window -= size
        if stream.receive_window < 0:
            self._connection.reset(stream, Code.FLOW_CONTROL_ERROR)
            return
        if flags & Flag.PADDED:
            payload = unpadded(payload, flags & ~Flag.PRIORITY)
            stream.credit(size - len(payload))
        ends = flags & Flag.END_STREAM
        try:
            if payload:
                stream.received_bytes += len(payload)
                if stream.sink is not None:
                    stream.sink.received(payload)
            elif not ends:
                self._connection.charge(FRAME)
            if ends and not stream.closed:
                self._end(stream)
        except ConnectionFailed:
            raise
        except Exception as error:  # A sink's mistake costs its own request only.
            self._connection.failed(stream, error)

    def reset(self, number: int) -> None:
        """The peer gave the stream up."""
        if number == 0 or number > self.last:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, f"RST_STREAM: stream {number} was never begun")
        stream = self.streams.get(number)
        if stream is None:
            self._connection.charge(FRAME)
        else:
            self._connection.lose(stream)
            self._connection.charge(WORK)  # Beginning and giving up costs the peer nothing (CVE-2023-44487).

    # --- streams ---

    def _trailers(self, number: int, block: bytes, ends: bool) -> None:
        """A second header block, of which nobody asks."""
        fields = self._decoder.fields(block)
        stream = self.streams.get(number)
        if stream is None:
            if self._is_over(number):
                raise ConnectionFailed(Code.STREAM_CLOSED, f"headers: stream {number} is over, or was left out")
            self._connection.charge(FRAME)
        elif stream._ended:
            self._connection.reset(stream, Code.STREAM_CLOSED)
        elif not ends or any(name.startswith(b":") for name, _ in fields):
            self._connection.reset(stream, Code.PROTOCOL_ERROR)
        else:
            try:
                self._end(stream)
            except Exception as error:  # As above.
                self._connection.failed(stream, error)

    def _stray_data(self, number: int, stream: Stream | None, size: int) -> None:
        """No stream takes it. It may have been on its way when the stream was given up: that is no mistake."""
        if stream is not None:
            self._connection.reset(stream, Code.STREAM_CLOSED)
        elif number == 0 or number > self.last:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, f"DATA: stream {number} was never begun")
        elif self._is_over(number):
            self._refuse(number, Code.STREAM_CLOSED)
        elif not size:
            self._connection.charge(FRAME)

    def _is_over(self, number: int) -> bool:
        """The peer knows that it may send nothing more of the stream."""
        return number not in self._given_up and number <= self.told

    def _end(self, stream: Stream) -> None:
        stream._ended = True
        stream.body_deadline = inf
        if stream.head.length not in (-1, stream.received_bytes):
            self._connection.reset(stream, Code.PROTOCOL_ERROR)
        elif stream.sink is not None:
            stream.sink.ended()

    def _refuse(self, number: int, code: Code) -> None:
        self.give_up(number, code)
        self._connection.charge(WORK)

    def give_up(self, number: int, code: Code) -> None:
        """The stream is over before the peer has ended it."""
        self._connection.sender.write(reset_frame(number, code))
        if len(self._given_up) >= _MAX_GIVEN_UP:
            del self._given_up[next(iter(self._given_up))]
        self._given_up[number] = None

    # --- flow control ---

    def widen(self, stream: Stream, size: int) -> None:
        """The peer may send so much more of this stream."""
        stream.receive_window += size
        self._connection.sender.write(window_frame(stream.id, size))

    def _widen(self, size: int) -> None:
        self._window += size
        self._connection.sender.write(window_frame(0, size))
