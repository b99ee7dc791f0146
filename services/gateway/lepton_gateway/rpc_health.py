"""grpc.health.v1.Health, as load balancers and Kubernetes ask for it."""

import asyncio
from collections.abc import Set

from google.protobuf.message import DecodeError
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from lepton_common.errors import Invalid
from lepton_common.health import Readiness
from lepton_common.http2 import Stream

from lepton_gateway.rpc import START, Room, Share, Status, Unary, framed

_MAX_MESSAGE_BYTES = 4096
_LOOK_EVERY_S = 0.5


class Check(Unary):
    """Whether the server, or one of its services, takes calls."""

    def __init__(self, stream: Stream, readiness: Readiness, services: Set[str]) -> None:
        super().__init__(stream, Share(Room(_MAX_MESSAGE_BYTES)))
        self._readiness = readiness
        self._services = services

    def asked(self, message: bytes | bytearray) -> None:
        service = _service_of(message)
        if service in self._services:
            self.answer([self._now()])
        else:
            self.end(Status.NOT_FOUND, f"no such service: {service[:80]}")

    def _now(self) -> bytes:
        states = HealthCheckResponse
        return states(status=states.NOT_SERVING if self._readiness.reasons() else states.SERVING).SerializeToString()


class Watch(Check):
    """The same, now and whenever it changes, until the caller leaves."""

    def asked(self, message: bytes | bytearray) -> None:
        service = _service_of(message)
        self.stream.start(START)
        if service in self._services:
            self._tell(b"")
        else:
            unknown = HealthCheckResponse(status=HealthCheckResponse.SERVICE_UNKNOWN)
            self._send(unknown.SerializeToString())

    def _tell(self, before: bytes) -> None:
        if not self.stream.closed:
            now = self._now()
            if now != before:
                self._send(now)
            asyncio.get_running_loop().call_later(_LOOK_EVERY_S, self._tell, now)

    def _send(self, message: bytes) -> None:
        for each in framed([message]):
            self.stream.send(each)


def _service_of(message: bytes | bytearray) -> str:
    try:
        return HealthCheckRequest.FromString(bytes(message)).service
    except DecodeError:
        raise Invalid("the message is not a HealthCheckRequest") from None
