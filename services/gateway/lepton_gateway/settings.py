"""What an operator can change of the gateway."""

import secrets
import socket
from typing import Annotated

from lepton_common.settings import Settings as CommonSettings
from pydantic import Field

_ADDRESS = r"^[^:/\s]+:\d{1,5}$"


def _own_id() -> str:
    # Names of hosts need not be unique, and several gateways may share one.
    return f"{socket.gethostname()[:60]}-{secrets.token_hex(4)}"


class Settings(CommonSettings):
    mesh: Annotated[str, Field(pattern=_ADDRESS)]
    """where the mesh listens, host:port"""
    rollout_url: Annotated[str, Field(pattern=r"^https?://\S+$")]
    """the rollout service, http://host:port"""
    gateway_id: Annotated[str, Field(default_factory=_own_id, pattern=r"^[^\s/]{1,80}$")]
    """what tells this gateway from the others, 1 to 80 characters without / and blanks"""
    admin_host: str = "127.0.0.1"
    """address on which /metrics is served, apart from callers"""
    admin_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """port on which /metrics is served, 0 for any free one"""
    keyless_loopback: bool = False
    """whether callers on this machine may infer for the tenant `default` without a key"""
    grpc_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """port to listen on for gRPC, 0 for any free one"""
    max_body_bytes: Annotated[int, Field(gt=0)] = 256 << 20
    """bytes of a request's body, or of a gRPC message, as sent"""
    max_buffered_bytes: Annotated[int, Field(gt=0)] = 1 << 30
    """bytes that large bodies over HTTP may take together until they are answered; one has room in any case"""
    cache_bytes: Annotated[int, Field(ge=0)] = 256 << 20
    """bytes that the answers kept for all models whose cache is on may take together"""
    async_concurrency: Annotated[int, Field(ge=1, le=10_000)] = 256
    """most requests over Kafka that are worked on at a time"""
    async_timeout_s: Annotated[float, Field(gt=0, le=604_800)] = 3600.0
    """seconds from its writing that a request over Kafka is tried which says nothing of it"""
    reply_topics: Annotated[str, Field(pattern=r"^[A-Za-z0-9._*?,-]*$")] = ""
    """topics beside lepton.inference.results that answers may be asked for on, patterns like team-*,audit"""
