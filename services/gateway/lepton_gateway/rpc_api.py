"""The gateway's gRPC: `inference.GRPCInferenceService`, health and reflection. Every call is asked of `Api` as the HTTP
request that means the same, so that keys, limits, counting and errors are one thing for both."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError, Message
from lepton_common.errors import Denied, Invalid, LeptonError, Unavailable, status_of
from lepton_common.health import Readiness
from lepton_common.http2 import Sink, Stream
from lepton_common.records import Scope

from lepton_gateway import inference_pb2 as pb
from lepton_gateway import rpc_reflection
from lepton_gateway.answers import Answer, Handle
from lepton_gateway.callers import Callers
from lepton_gateway.rpc import Refusal, Room, Share, Status, Unary, not_grpc, status_of_http
from lepton_gateway.rpc_codec import model_target, parameters_of
from lepton_gateway.rpc_health import Check, Watch
from lepton_gateway.rpc_infer import ModelInfer, ModelStreamInfer, ask, metadata_of

SERVICE = "inference.GRPCInferenceService"
_HEALTH = "grpc.health.v1.Health"
# Of a message that carries no tensors, which may come without a key.
_MAX_OTHER_BYTES = 16 << 10
_NOT_SHARED = "shared memory is not supported: send tensors as raw_input_contents"

Line = tuple[str, bytes, Any]  # method, target, and the JSON document or None


@dataclass(frozen=True, slots=True)
class Method:
    """A call with one message: the HTTP request that means the same, and the response in its answer's document.

    `also`: statuses beside 200 that are no errors.
    """

    request: type[Message]
    line: Callable[[Any], Line]
    response: Callable[[int, Any], Message]
    also: tuple[int, ...] = ()


def _named(request: Any, verb: str = "") -> bytes:
    return model_target(request.name, request.version, verb)


def _parsed(kind: type[Message]) -> Callable[[int, Any], Message]:
    return lambda status, document: ParseDict(document, kind(), ignore_unknown_fields=True)


def _statistics_line(request: Any) -> Line:
    target = _named(request, "/stats") if request.name else b"/v2/models/stats"
    return "GET", target, None


def _change_line(verb: str, request: Any) -> Line:
    if not request.model_name:
        raise Invalid("model_name is missing")
    target = model_target(request.model_name, "").replace(b"/v2/", b"/v2/repository/", 1) + b"/" + verb.encode()
    parameters = {
        name: value if not isinstance(value, bytes) else "" for name, value in parameters_of(request.parameters).items()
    }
    return "POST", target, {"parameters": parameters}


def _trace_line(request: Any) -> Line:
    target = model_target(request.model_name, "", "/trace/setting") if request.model_name else b"/v2/trace/setting"
    if not request.settings:
        return "GET", target, None
    # A setting without a value goes back to what it was.
    return "POST", target, {name: list(each.value) or None for name, each in request.settings.items()}


def _trace_response(status: int, document: Mapping[str, Any]) -> Message:
    response = pb.TraceSettingResponse()
    for name, value in document.items():
        response.settings[name].value.extend(value if isinstance(value, list) else [value])
    return response


def _log_line(request: Any) -> Line:
    if not request.settings:
        return "GET", b"/v2/logging", None
    return "POST", b"/v2/logging", parameters_of(request.settings)


def _log_response(status: int, document: Mapping[str, Any]) -> Message:
    response = pb.LogSettingsResponse()
    for name, value in document.items():
        match value:
            case bool():
                response.settings[name].bool_param = value
            case int():
                response.settings[name].uint32_param = value
            case _:
                response.settings[name].string_param = str(value)
    return response


def _index_response(status: int, document: list[dict[str, Any]]) -> Message:
    return pb.RepositoryIndexResponse(models=[pb.RepositoryIndexResponse.ModelIndex(**each) for each in document])


METHODS: Mapping[str, Method] = {
    "ServerLive": Method(
        pb.ServerLiveRequest,
        lambda request: ("GET", b"/v2/health/live", None),
        lambda status, document: pb.ServerLiveResponse(live=status == 200),
    ),
    "ServerReady": Method(
        pb.ServerReadyRequest,
        lambda request: ("GET", b"/v2/health/ready", None),
        lambda status, document: pb.ServerReadyResponse(ready=status == 200),
        also=(503,),
    ),
    "ModelReady": Method(
        pb.ModelReadyRequest,
        lambda request: ("GET", _named(request, "/ready"), None),
        lambda status, document: pb.ModelReadyResponse(ready=status == 200),
        also=(404, 503),
    ),
    "ServerMetadata": Method(
        pb.ServerMetadataRequest,
        lambda request: ("GET", b"/v2", None),
        _parsed(pb.ServerMetadataResponse),
    ),
    "ModelMetadata": Method(
        pb.ModelMetadataRequest,
        lambda request: ("GET", _named(request), None),
        _parsed(pb.ModelMetadataResponse),
    ),
    "ModelConfig": Method(
        pb.ModelConfigRequest,
        lambda request: ("GET", _named(request, "/config"), None),
        lambda status, document: _parsed(pb.ModelConfigResponse)(status, {"config": document}),
    ),
    "ModelStatistics": Method(pb.ModelStatisticsRequest, _statistics_line, _parsed(pb.ModelStatisticsResponse)),
    "RepositoryIndex": Method(
        pb.RepositoryIndexRequest,
        lambda request: ("POST", b"/v2/repository/index", {"ready": request.ready}),
        _index_response,
    ),
    "RepositoryModelLoad": Method(
        pb.RepositoryModelLoadRequest,
        partial(_change_line, "load"),
        lambda status, document: pb.RepositoryModelLoadResponse(),
    ),
    "RepositoryModelUnload": Method(
        pb.RepositoryModelUnloadRequest,
        partial(_change_line, "unload"),
        lambda status, document: pb.RepositoryModelUnloadResponse(),
    ),
    "TraceSetting": Method(pb.TraceSettingRequest, _trace_line, _trace_response),
    "LogSettings": Method(pb.LogSettingsRequest, _log_line, _log_response),
}


class Asked(Unary):
    """A call of one of `METHODS`."""

    def __init__(self, stream: Stream, handle: Handle, method: Method) -> None:
        super().__init__(stream, Share(Room(_MAX_OTHER_BYTES)))
        self._handle = handle
        self._method = method

    def asked(self, message: bytes | bytearray) -> None:
        method = self._method
        try:
            request = method.request.FromString(bytes(message))
        except DecodeError:
            raise Invalid(f"the message is not a {method.request.DESCRIPTOR.name}") from None
        verb, target, document = method.line(request)
        ask(self, self._handle, verb, target, b"" if document is None else orjson.dumps(document), self._answered)

    def _answered(self, answer: Answer) -> None:
        if answer.status != 200 and answer.status not in self._method.also:
            self.end(status_of_http(answer.status), answer.error, metadata_of(answer))
            return
        try:
            document = orjson.loads(answer.body) if answer.body else None
            self.answer([self._method.response(answer.status, document).SerializeToString()])
        except Exception as error:  # Of this answer only.
            self.refuse(error)


class RpcApi:
    """Answers calls. `handle` is the HTTP/2 server's handler; `api` answers HTTP requests."""

    def __init__(self, api: Handle, callers: Callers, readiness: Readiness, max_message_bytes: int) -> None:
        self._callers = callers
        self._readiness = readiness
        self._room = Room(max_message_bytes)
        self._infer: dict[bytes, Callable[[Stream, Share], Sink]] = {
            _path(SERVICE, "ModelInfer"): partial(ModelInfer, handle=api),
            _path(SERVICE, "ModelStreamInfer"): partial(ModelStreamInfer, handle=api),
        }
        services = {"", SERVICE}
        self._calls: dict[bytes, Callable[[Stream], Sink]] = {
            _path(_HEALTH, "Check"): partial(Check, readiness=readiness, services=services),
            _path(_HEALTH, "Watch"): partial(Watch, readiness=readiness, services=services),
            _path(rpc_reflection.SERVICE, "ServerReflectionInfo"): rpc_reflection.Reflection,
        }
        for name, method in METHODS.items():
            self._calls[_path(SERVICE, name)] = partial(Asked, handle=api, method=method)
        for kind in ("System", "Cuda"):
            for verb in ("Status", "Register", "Unregister"):
                self._calls[_path(SERVICE, f"{kind}SharedMemory{verb}")] = partial(
                    Refusal, status=Status.UNIMPLEMENTED, message=_NOT_SHARED
                )

    def handle(self, stream: Stream) -> Sink | None:
        """The call's messages go to what this returns."""
        head = stream.head
        if head.method != b"POST" or not head.headers.get(b"content-type", b"").startswith(b"application/grpc"):
            not_grpc(stream)
            return None
        if (infer := self._infer.get(head.path)) is not None:
            try:
                return infer(stream, self._room.of(self._tenant(stream)))
            except LeptonError as error:
                return Refusal(stream, status_of_http(status_of(error)), error.message)
        call = self._calls.get(head.path)
        if call is None:
            told = head.path[:200].decode("latin-1")
            return Refusal(stream, Status.UNIMPLEMENTED, f"no such method: {told}")
        return call(stream)

    def _tenant(self, stream: Stream) -> str:
        """Of the caller. Raises Denied for one who may infer nothing at all, and Unavailable where that cannot be said:
        before memory is spent on what they send."""
        head = stream.head
        try:
            return self._callers.check_head(head.headers, head.host, stream.peer, Scope.INFER).tenant
        except Denied as error:
            self._callers.refused(head.headers, stream.peer, error, head.path.decode("latin-1"))
            raise
        except Unavailable:
            if self._readiness.started:
                raise
            return ""  # The call itself waits for the table of keys.


def _path(service: str, method: str) -> bytes:
    return f"/{service}/{method}".encode()
