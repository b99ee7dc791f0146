"""ModelInfer and ModelStreamInfer: each message is the same request as over HTTP, and goes the same way."""

import asyncio
from collections import deque
from collections.abc import Callable
from math import inf

from lepton_common.errors import Invalid, LeptonError
from lepton_common.http2 import Stream, literal
from lepton_common.http11_request import Buffer, Request

from lepton_gateway import inference_pb2 as pb
from lepton_gateway.answers import Answer, Handle, request
from lepton_gateway.rpc import (
    PREFIX_BYTES,
    START,
    Call,
    Share,
    Status,
    Unary,
    framed,
    last_of,
    size_of,
    status_of_http,
    trailers,
)
from lepton_gateway.rpc_answers import encode_response, tagged
from lepton_gateway.rpc_codec import encode_request

# Of one stream: messages that are being answered, and bytes of answers that the caller does not take.
_MAX_UNDER_WAY = 64
_MAX_UNSENT_BYTES = 8 << 20
_GRAIN_S = 0.02

_INFER_RESPONSE = pb.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER

_TOLD = (b"x-lepton-version", b"retry-after", b"x-lepton-reason", b"x-request-id", b"traceparent")


def metadata_of(answer: Answer) -> bytes:
    """What a caller hears beside the message, as a header block."""
    headers = answer.headers
    return b"".join([literal(name, headers[name]) for name in _TOLD if name in headers])


def ask(
    call: Call,
    handle: Handle,
    method: str,
    target: bytes,
    body: bytes,
    then: Callable[[Answer], None],
    header_length: int | None = None,
) -> Request:
    """The request is on its way; `then` is called once with its answer. `header_length` is of OIP's binary form."""
    headers = call.metadata()
    if header_length is not None:
        headers[b"inference-header-content-length"] = b"%d" % header_length
    asked = request(method, target, headers, body, then, call.stream.peer)
    handle(asked)
    return asked


def _ask_infer(
    call: Call, handle: Handle, data: bytes | bytearray, then: Callable[[Answer, bool, bool], None]
) -> Request:
    """`then` gets the answer, whether it is wanted in typed contents, and whether a final one is to be marked."""
    wanted, header_length, body = encode_request(data)
    return ask(
        call,
        handle,
        "POST",
        wanted.target,
        body,
        lambda answer: then(answer, wanted.typed, wanted.final),
        header_length,
    )


def _response(answer: Answer, *, typed: bool, final: bool) -> list[Buffer]:
    """A ModelInferResponse in pieces."""
    header_length = int(answer.headers[b"inference-header-content-length"])
    return encode_response(answer.body, header_length, typed=typed, final=final)


class ModelInfer(Unary):
    """One inference."""

    def __init__(self, stream: Stream, room: Share, handle: Handle) -> None:
        super().__init__(stream, room)
        self._handle = handle
        self._request: Request | None = None

    def asked(self, message: bytes | bytearray) -> None:
        self._request = _ask_infer(self, self._handle, message, self._answered)

    def _answered(self, answer: Answer, typed: bool, final: bool) -> None:
        if answer.status != 200:
            self.end(status_of_http(answer.status), answer.error, metadata_of(answer))
            return
        try:
            self.answer(_response(answer, typed=typed, final=False), metadata_of(answer))
        except Exception as error:  # Of this answer only.
            self.refuse(error)

    def lost(self) -> None:
        """The caller left: the mesh and the worker hear of it."""
        super().lost()
        if self._request is not None and self._request.on_disconnect is not None:
            self._request.on_disconnect()


class ModelStreamInfer(Call):
    """Inferences one after the other; their answers come in the same order. An error ends one inference only."""

    def __init__(self, stream: Stream, room: Share, handle: Handle) -> None:
        super().__init__(stream, room)
        self._handle = handle
        self._buffer = bytearray()
        self._unpaid = 0  # bytes that came and that the peer was not told to send more for
        self._size: int | None = None  # of the message that comes in, once it is known
        self._under_way: deque[_Turn] = deque()
        self._ended = False
        self._started = False
        self._finished = False

    def received(self, data: bytes) -> None:
        if self._finished:
            return
        try:
            self.room.take(len(data))
        except LeptonError as error:
            self._finish(error)
            return
        self._buffer += data
        self._unpaid += len(data)
        self._take()

    def ended(self) -> None:
        self._ended = True
        self._take()

    def lost(self) -> None:
        self._leave()

    def _leave(self) -> None:
        """Nothing more is asked or answered: what is under way is given up, and all room is free again."""
        self._finished = True
        for turn in tuple(self._under_way):
            if turn.request is not None and turn.request.on_disconnect is not None:
                turn.request.on_disconnect()
        self.room.give_back(sum(turn.size for turn in self._under_way) + len(self._buffer))
        self._size = None
        self._under_way.clear()
        self._buffer.clear()

    def _take(self) -> None:
        """Messages that are whole are asked, as long as the caller takes the answers."""
        while not self._finished and not self.stream.closed and len(self._under_way) < _MAX_UNDER_WAY:
            if self.stream.unsent_bytes > _MAX_UNSENT_BYTES:
                asyncio.get_running_loop().call_later(_GRAIN_S, self._take)
                return
            try:
                if not self._take_one():
                    break
            except LeptonError as error:
                self._finish(error)
                return
        if self._ended and not self._under_way and not self._finished and not self.stream.closed:
            self._finish(Invalid("the last message is not whole") if self._buffer else None)

    def _take_one(self) -> bool:
        """Whether there was a whole message. Raises what ends the stream."""
        if not self._under_way or self.room.fits(self._unpaid):  # Else the answers make room, and lead back to here.
            self.stream.credit(self._unpaid)
            self._unpaid = 0
        if self._size is None and len(self._buffer) >= PREFIX_BYTES:
            self._size = size_of(self._buffer, self.room.most)
        if self._size is None or len(self._buffer) < PREFIX_BYTES + self._size:
            if self._buffer and self.stream.body_deadline == inf:
                self.stream.await_body()
            return False
        self.stream.body_deadline = inf
        turn = _Turn(PREFIX_BYTES + self._size)
        self._size = None
        self._under_way.append(turn)
        message = self._pop(turn.size)
        if (more := len(message) - turn.size) > 0:  # It was compressed.
            self.room.take(more)
            turn.size += more

        def answered(answer: Answer, typed: bool, final: bool) -> None:
            turn.answer = _stream_response(self, answer, typed=typed, final=final)
            self._send_answers()

        try:
            turn.request = _ask_infer(self, self._handle, message, answered)
        except Exception as error:  # It ends this inference, not the others.
            turn.answer = _stream_error(self.guarded(error).message)
            self._send_answers()
        return True

    def _pop(self, end: int) -> bytes | bytearray:
        """The first message, out of the buffer. Raises Invalid."""
        if len(self._buffer) == end:
            message, self._buffer = self._buffer, bytearray()
        else:
            message = self._buffer[:end]
            del self._buffer[:end]
        compressed = message[0]
        del message[:PREFIX_BYTES]
        return self.message_of(compressed, message)

    def _send_answers(self) -> None:
        """What is answered is sent, up to the first that is not."""
        moved = False
        while not self._finished and self._under_way and (answer := self._under_way[0].answer) is not None:
            self.room.give_back(self._under_way.popleft().size)
            if not self._started:
                self._started = True
                self.stream.start(START)
            for each in framed(answer):
                self.stream.send(each)
            moved = True
        if moved:
            # Not from here: answers that come at once would nest as deep as there are messages.
            asyncio.get_running_loop().call_soon(self._take)

    def _finish(self, error: LeptonError | None) -> None:
        self._leave()
        if error is not None and not self._started:
            self.refuse(error)
        elif not self._started:
            self.end(Status.OK)
        else:
            self.stream.end(trailers(Status.OK) if error is None else last_of(error))


class _Turn:
    """One message of a stream."""

    __slots__ = ("answer", "request", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.request: Request | None = None
        self.answer: list[Buffer] | None = None  # a ModelStreamInferResponse in pieces


def _stream_response(call: Call, answer: Answer, *, typed: bool, final: bool) -> list[Buffer]:
    if answer.status != 200:
        return _stream_error(answer.error)
    try:
        response = _response(answer, typed=typed, final=final)
    except Exception as error:  # Of this answer only.
        return _stream_error(call.guarded(error).message)
    return [tagged(_INFER_RESPONSE, sum(map(len, response))), *response]


def _stream_error(message: str) -> list[Buffer]:
    return [pb.ModelStreamInferResponse(error_message=message).SerializeToString()]
