"""What an operator can change of rollout."""

from pathlib import Path
from typing import Annotated

from lepton_common import settings
from pydantic import Field


class Settings(settings.Settings):
    """rollout's environment variables."""

    mesh_dir: Path
    """folder of Envoy's xDS files (cds.json, rds.json, eds/)"""
    envoy_admin: Annotated[str, Field(pattern=r"^[^:/]+:\d+$")]
    """host:port of Envoy's admin interface"""
    load_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 120.0
    """seconds a pool has to get a version ready before its rollout fails"""
