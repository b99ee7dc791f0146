"""What an operator can change of rollout."""

from pathlib import Path
from typing import Annotated, Literal

from lepton_common import settings
from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class Settings(settings.Settings):
    """rollout's environment variables."""

    mesh: Literal["envoy", "istio"] = "envoy"
    """what moves the traffic: envoy (one Envoy that reads files) or istio (objects in Kubernetes)"""
    mesh_dir: Path = Path()
    """with the mesh envoy: folder of Envoy's xDS files (cds.json, rds.json, eds/)"""
    envoy_admin: Annotated[str, Field(pattern=r"^([^:/]+:\d+)?$")] = ""
    """with the mesh envoy: host:port of Envoy's admin interface"""
    kubernetes_url: Annotated[str, Field(pattern=r"^https?://[^/]+$")] = "https://kubernetes.default.svc"
    """with the mesh istio: Kubernetes' API, https://host:port"""
    kubernetes_namespace: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")] = "lepton"
    """with the mesh istio: namespace of the VirtualServices and DestinationRules"""
    kubernetes_token: Path = _SERVICE_ACCOUNT / "token"
    """with the mesh istio: file with the token for Kubernetes' API"""
    kubernetes_ca: Path = _SERVICE_ACCOUNT / "ca.crt"
    """with the mesh istio: file with the certificate of who signs for an https API"""
    load_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 120.0
    """seconds a pool has to get a version ready; five more, for the workers' word of why not, and its rollout fails"""

    @field_validator("mesh_dir", "envoy_admin")
    @classmethod
    def _needed_by_envoy(cls, value: Path | str, info: ValidationInfo) -> Path | str:
        if info.data.get("mesh") == "envoy" and value in (Path(), ""):
            raise PydanticCustomError("missing", "Field required")
        return value
