"""Server reflection: grpcurl, Postman and the like find the services and messages without a .proto file."""

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.reflection_pb2 import (
    ErrorResponse,
    FileDescriptorResponse,
    ListServiceResponse,
    ServerReflectionRequest,
    ServerReflectionResponse,
    ServiceResponse,
)
from lepton_common.errors import Invalid, LeptonError, NotFound, TooLarge
from lepton_common.http2 import Code, Stream

from lepton_gateway import inference_pb2
from lepton_gateway.rpc import PREFIX_BYTES, START, Call, Room, Share, Status, framed, trailers

SERVICE = "grpc.reflection.v1alpha.ServerReflection"

_DESCRIPTORS: tuple[FileDescriptor, ...] = (inference_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR)  # type: ignore[assignment]
_FILES = {each.name: each for each in _DESCRIPTORS}
_MAX_MESSAGE_BYTES = 64 << 10
_MAX_UNSENT_BYTES = 1 << 20


class Reflection(Call):
    """Questions and answers in turn."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream, Share(Room(_MAX_MESSAGE_BYTES)))
        self._buffer = b""
        self._started = False
        self._finished = False

    def received(self, data: bytes) -> None:
        if self._finished:
            return
        self._buffer += data
        self.stream.credit(len(data))
        if self.stream.unsent_bytes > _MAX_UNSENT_BYTES:  # Asked, and the answers not taken.
            self.stream.reset(Code.ENHANCE_YOUR_CALM)
            return
        try:
            while len(self._buffer) >= PREFIX_BYTES:
                prefix = self._buffer[:PREFIX_BYTES]
                end = PREFIX_BYTES + int.from_bytes(prefix[1:], "big")
                if end > _MAX_MESSAGE_BYTES:
                    raise TooLarge(f"message: {end} bytes, at most {_MAX_MESSAGE_BYTES} are taken")
                if len(self._buffer) < end:
                    return
                message = self.message_of(prefix[0], self._buffer[PREFIX_BYTES:end])
                self._buffer = self._buffer[end:]
                self._start()
                for each in framed([_answer(message).SerializeToString()]):
                    self.stream.send(each)
        except LeptonError as error:
            self._finish(trailers(Status.INVALID_ARGUMENT, error.message))

    def ended(self) -> None:
        if not self._finished:
            self._finish(trailers(Status.OK))

    def _finish(self, last: bytes) -> None:
        self._finished = True
        self._start()
        self.stream.end(last)

    def lost(self) -> None:
        """Nothing to undo."""

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self.stream.start(START)


def _answer(message: bytes | bytearray) -> ServerReflectionResponse:
    try:
        request = ServerReflectionRequest.FromString(bytes(message))
    except DecodeError:
        raise Invalid("the message is not a ServerReflectionRequest") from None
    response = ServerReflectionResponse(valid_host=request.host, original_request=request)
    try:
        match request.WhichOneof("message_request"):
            case "list_services":
                names = [name for file in _FILES.values() for name in _services_of(file)]
                services = [ServiceResponse(name=name) for name in (*names, SERVICE)]
                response.list_services_response.CopyFrom(ListServiceResponse(service=services))
            case "file_by_filename":
                response.file_descriptor_response.CopyFrom(_file(_FILES.get(request.file_by_filename)))
            case "file_containing_symbol":
                response.file_descriptor_response.CopyFrom(_file(_file_with(request.file_containing_symbol)))
            case _:
                raise NotFound("there are no extensions here")
    except NotFound as error:
        response.error_response.CopyFrom(ErrorResponse(error_code=Status.NOT_FOUND, error_message=error.message))
    return response


def _services_of(file: FileDescriptor) -> list[str]:
    return [service.full_name for service in file.services_by_name.values()]


def _file(file: FileDescriptor | None) -> FileDescriptorResponse:
    if file is None:
        raise NotFound("no such file or symbol")
    return FileDescriptorResponse(file_descriptor_proto=[file.serialized_pb])


def _file_with(symbol: str) -> FileDescriptor | None:
    """The file that defines a service, one of its methods, or a message, nested ones included."""
    for file in _FILES.values():
        package, _, rest = symbol.partition(file.package + ".")
        name = rest.partition(".")[0]
        known = (*file.services_by_name, *file.message_types_by_name, *file.enum_types_by_name)
        if not package and name in known:
            return file
    return None
