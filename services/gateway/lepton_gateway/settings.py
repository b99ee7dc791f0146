"""What an operator can change of the gateway."""

from typing import Annotated

from lepton_common.settings import Settings as CommonSettings
from pydantic import Field

_ADDRESS = r"^[^:/\s]+:\d{1,5}$"


class Settings(CommonSettings):
    mesh: Annotated[str, Field(pattern=_ADDRESS)]
    """where the mesh listens, host:port"""
    rollout_url: Annotated[str, Field(pattern=r"^https?://\S+$")]
    """the rollout service, http://host:port"""
    keyless_loopback: bool = False
    """whether callers on this machine may infer for the tenant `default` without a key"""
    max_body_bytes: Annotated[int, Field(gt=0)] = 64 << 20
    """bytes of a request's body, as sent"""
