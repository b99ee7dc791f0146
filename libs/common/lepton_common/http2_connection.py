"""One peer of the HTTP/2 server: what concerns all its requests, its deadlines, and its end (RFC 9113)."""

import asyncio
from enum import Enum, auto
from typing import TYPE_CHECKING, cast

from lepton_common.http2_frames import (
    MAX_WINDOW,
    Code,
    ConnectionFailed,
    Flag,
    Kind,
    Setting,
    frame,
    goaway_frame,
    settings_frame,
    settings_of,
    word,
)
from lepton_common.http2_reading import FrameReader
from lepton_common.http2_receiving import FRAME, WORK, Receiver
from lepton_common.http2_sending import Sender
from lepton_common.http2_stream import Sink, Stream

if TYPE_CHECKING:
    from lepton_common.http2 import Server

_SMALL_UPDATE_BYTES = 256
_LINGER_S = 2.0  # how long a peer may take to read the last answer, or to hear that it should leave
_ANSWER_S = 20.0  # how long it may take to say that it is there
_LEAVING = b"leaving\0"  # a ping: what comes before its answer may have been sent before the farewell was read
_ASKING = b"asking\0\0"


class State(Enum):
    """What a connection waits for."""

    HEADERS = auto()  # the rest of a preface or of headers
    WORK = auto()  # its requests
    NOTHING = auto()
    FAREWELL = auto()  # the answer to `_LEAVING`
    ROOM = auto()  # the peer to read
    END = auto()  # the peer to close


class Connection(asyncio.Protocol):
    """One peer. `receiver` has its requests, `sender` their answers."""

    __slots__ = (
        *("_asked", "_cost", "_deadline", "_deaf", "_frames", "_half_closed", "_leaving", "_reader", "_state"),
        *("_transport", "_unsent", "peer", "receiver", "sender", "server"),
    )

    _transport: asyncio.Transport
    sender: Sender

    def __init__(self, server: "Server") -> None:
        self.server = server
        self.receiver = Receiver(self)
        self._reader = FrameReader(self._frame, 2 * server.limits.max_header_bytes)
        self._cost = 0
        self._leaving = False
        self._half_closed = False
        self._deaf = False
        self._asked = False
        self._state = State.HEADERS
        self._deadline = server.now + server.limits.header_timeout_s
        self._frames = 0  # as they were when the deadline was set
        self._unsent = 0
        self.peer = ""

    # --- the transport's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        limits = self.server.limits
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self.peer = str((transport.get_extra_info("peername") or ("",))[0])
        self.sender = Sender(self.server, self._transport, self._answered)
        self.server.connections.add(self)
        self.sender.write(
            settings_frame(
                {
                    Setting.MAX_CONCURRENT_STREAMS: limits.max_streams,
                    Setting.INITIAL_WINDOW_SIZE: limits.stream_window,
                    Setting.MAX_HEADER_LIST_SIZE: limits.max_header_bytes,
                }
            )
        )
        self.receiver.open_window()
        if self.server.draining:
            self.leave()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deaf = True
        self.server.lost(self)
        for stream in tuple(self.receiver.streams.values()):
            self.lose(stream)

    def eof_received(self) -> bool:
        """A peer that only said it has nothing more to send is answered."""
        receiver = self.receiver
        if self._deaf or not receiver.streams:
            return False
        self._half_closed = True
        receiver.told = min(receiver.told, receiver.last)
        for stream in tuple(receiver.streams.values()):
            if not stream._ended:
                self.lose(stream)
        return not self._deaf

    def pause_writing(self) -> None:
        self.sender.writable = False

    def resume_writing(self) -> None:
        self.sender.writable = True
        self.sender.pump()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        try:
            self._reader.feed(data)
        except ConnectionFailed as error:
            self._fail(error)

    # --- frames ---

    def _frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        match kind:
            case Kind.DATA:
                self.receiver.data(flags, number, payload)
            case Kind.HEADERS:
                self.receiver.headers(flags, number, payload)
            case Kind.WINDOW_UPDATE:
                self._window_update(number, word(payload, "WINDOW_UPDATE"))
            case Kind.RST_STREAM:
                word(payload, "RST_STREAM")
                self.receiver.reset(number)
            case Kind.SETTINGS:
                self._settings(flags, number, payload)
            case Kind.PING:
                self._ping(flags, number, payload)
            case Kind.PRIORITY:
                if number == 0 or len(payload) != 5:
                    code = Code.FRAME_SIZE_ERROR if number else Code.PROTOCOL_ERROR
                    raise ConnectionFailed(code, "PRIORITY: malformed")
                self.charge(FRAME)  # Nobody heeds it any more.
            case Kind.PUSH_PROMISE:
                raise ConnectionFailed(Code.PROTOCOL_ERROR, "PUSH_PROMISE: from a client")
            case Kind.GOAWAY:
                if number or len(payload) < 8:
                    code = Code.PROTOCOL_ERROR if number else Code.FRAME_SIZE_ERROR
                    raise ConnectionFailed(code, "GOAWAY: malformed")
                self.charge(FRAME)  # The peer begins nothing more, and closes when it is done.
            case _:
                self.charge(FRAME)

    def charge(self, cost: int) -> None:
        """The peer made us do something that brings nobody anything. Raises ConnectionFailed when that is too much."""
        self._cost += cost
        if self._cost > self.server.limits.max_cost:
            raise ConnectionFailed(Code.ENHANCE_YOUR_CALM, "too many frames that carry nothing")

    def _settings(self, flags: int, number: int, payload: bytes) -> None:
        if number:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, "SETTINGS: on a stream")
        if flags & Flag.ACK:
            if payload:
                raise ConnectionFailed(Code.FRAME_SIZE_ERROR, "SETTINGS: an acknowledgement carries nothing")
            self.charge(FRAME)
            return
        self.charge(WORK)
        window = settings_of(payload).get(Setting.INITIAL_WINDOW_SIZE, self.sender.stream_window)
        self.sender.write(frame(Kind.SETTINGS, Flag.ACK, 0))
        self.sender.resize(window, self.receiver.streams.values())

    def _ping(self, flags: int, number: int, payload: bytes) -> None:
        if number or len(payload) != 8:
            raise ConnectionFailed(Code.PROTOCOL_ERROR if number else Code.FRAME_SIZE_ERROR, "PING: malformed")
        self.charge(FRAME)
        if not flags & Flag.ACK:
            self.sender.write(frame(Kind.PING, Flag.ACK, 0, payload))
        elif payload == _LEAVING and self._leaving:
            self._part()

    def _window_update(self, number: int, size: int) -> None:
        if size < _SMALL_UPDATE_BYTES:
            self.charge(FRAME)
        sender, receiver = self.sender, self.receiver
        if number == 0:
            sender.window += size
            if size == 0 or sender.window > MAX_WINDOW:
                code = Code.FLOW_CONTROL_ERROR if size else Code.PROTOCOL_ERROR
                raise ConnectionFailed(code, f"WINDOW_UPDATE: {size} bytes more")
            sender.pump()
        elif (stream := receiver.streams.get(number)) is not None:
            if size == 0 or stream.send_window + size > MAX_WINDOW:
                self.reset(stream, Code.FLOW_CONTROL_ERROR if size else Code.PROTOCOL_ERROR)
            else:
                sender.widen(stream, size)
        elif number > receiver.last:
            raise ConnectionFailed(Code.PROTOCOL_ERROR, f"WINDOW_UPDATE: stream {number} was never begun")

    # --- the ends of streams ---

    def reset(self, stream: Stream, code: Code) -> None:
        """The request is not answered, and its taker hears of it unless it said so itself."""
        self.receiver.give_up(stream.id, code)
        self.lose(stream)

    def lose(self, stream: Stream) -> None:
        """The request is not wanted any more."""
        sink = self._forget(stream)
        if sink is not None:
            try:
                sink.lost()
            except Exception as error:  # A sink's mistake costs nobody else anything.
                self.server.failed(stream, error)

    def failed(self, stream: Stream, error: Exception) -> None:
        """A handler or sink raised."""
        self.server.failed(stream, error)
        if not stream.closed:
            self.reset(stream, Code.INTERNAL_ERROR)

    def _answered(self, stream: Stream) -> None:
        if not stream._ended:
            self.receiver.give_up(stream.id, Code.NO_ERROR)  # What the peer still sends of it is not wanted.
        self._forget(stream)

    def _forget(self, stream: Stream) -> Sink | None:
        """The stream is closed; who took its body, and leads back to it, stands in it no more."""
        stream.closed = True
        sink, stream.sink = stream.sink, None
        self.receiver.streams.pop(stream.id, None)
        if stream.unsent_bytes:
            self.sender.forget(stream)
        if not self.receiver.streams and self.receiver.told != MAX_WINDOW and not self._deaf:
            self._close()
        return sink

    # --- the server's side, and the end ---

    def sweep(self, now: float) -> None:
        """Called now and then: the deadlines of the connection, of bodies on their way, and of answers not taken."""
        limits = self.server.limits
        self._cost = max(0, self._cost - limits.max_cost // 10)
        state = self._waits_for()
        unsent = self._transport.get_write_buffer_size()
        moved = unsent < self._unsent if state in (State.ROOM, State.END) else self._reader.frames != self._frames
        if moved or state is not self._state:
            self._state, self._frames, self._unsent, self._asked = state, self._reader.frames, unsent, False
            self._deadline = now + self._patience_s(state)
        elif self._deadline <= now:
            self._expire(now)
        for stream in tuple(self.receiver.streams.values()):
            if stream.body_deadline <= now or stream.write_deadline <= now:
                self.reset(stream, Code.CANCEL)

    def _waits_for(self) -> State:
        if self._deaf:
            return State.END
        if not self.sender.writable:
            return State.ROOM
        reader, streams = self._reader, self.receiver.streams
        if not reader.began or reader.in_headers or (reader.in_frame and not streams):
            return State.HEADERS
        if streams:
            return State.WORK
        return State.FAREWELL if self._leaving else State.NOTHING

    def _patience_s(self, state: State) -> float:
        limits = self.server.limits
        match state:
            case State.HEADERS:
                return limits.header_timeout_s
            case State.WORK:
                return limits.quiet_timeout_s
            case State.NOTHING:
                return limits.idle_timeout_s
            case State.ROOM:
                return limits.write_timeout_s
            case _:
                return _LINGER_S

    def _expire(self, now: float) -> None:
        match self._state:
            case State.NOTHING:
                self.leave()
            case State.WORK if not self._asked:
                self._asked = True
                self._deadline = now + _ANSWER_S
                self.sender.write(frame(Kind.PING, 0, 0, _ASKING))
            case State.FAREWELL:
                self._part()
            case _:
                self._transport.abort()

    def leave(self) -> None:
        """The peer begins nothing more here. What it has begun is answered, also what is on its way."""
        if not self._leaving:
            self._leaving = True
            self.sender.write(goaway_frame(MAX_WINDOW, Code.NO_ERROR, "") + frame(Kind.PING, 0, 0, _LEAVING))

    def _part(self) -> None:
        """What the peer begins from now on is not looked at: it knew."""
        receiver = self.receiver
        if receiver.told == MAX_WINDOW:
            receiver.told = receiver.last
            self.sender.write(goaway_frame(receiver.told, Code.NO_ERROR, ""))
            if not receiver.streams:
                self._close()

    def _fail(self, error: ConnectionFailed) -> None:
        """The connection ends here, and the peer hears why."""
        self.server.rejected += 1
        receiver = self.receiver
        self.sender.write(goaway_frame(min(receiver.last, receiver.told), error.code, str(error)))
        self._deaf = True
        for stream in tuple(receiver.streams.values()):
            self.lose(stream)
        self._close()

    def _close(self) -> None:
        """Say that nothing more comes and wait for the peer to close: closing first could destroy the last answer."""
        self._deaf = True
        self.sender.close()
        if self._half_closed or not self._transport.can_write_eof():
            self._transport.close()
        else:
            self._transport.write_eof()

    def abort(self) -> None:
        self._transport.abort()
