"""What an operator can change of a worker."""

import math
import os
import platform
from pathlib import Path
from typing import Annotated
from uuid import uuid4

from lepton_common.settings import Settings as CommonSettings
from pydantic import Field

_CGROUP = Path("/sys/fs/cgroup")


class Settings(CommonSettings):
    pool: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")] = "cpu"
    """name of the pool whose versions this worker runs"""
    worker_id: str = Field(default_factory=lambda: f"{platform.node()}-{uuid4().hex[:8]}")
    """this worker's name, unique among all workers"""
    advertise_host: str = ""
    """host that others reach this worker at; empty for LEPTON_HOST"""
    blobs: str
    """where artifacts lie: a folder, or an s3://, gs:// or az:// URL"""
    cache: Path
    """folder for artifacts fetched from there"""
    cache_bytes: Annotated[int, Field(gt=0)] = 20 << 30
    """bytes the artifacts in that folder may take"""
    instances: Annotated[int, Field(ge=0, le=1024)] = 0
    """runs of one version at the same time; 0 for as many as there are cores, or two on a GPU"""
    intra_op_threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """threads of one run"""
    load_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """seconds that the first load of an artifact may take"""
    max_body_bytes: Annotated[int, Field(gt=0)] = 257 << 20
    """bytes of a request's body, decompressed"""
    max_buffered_bytes: Annotated[int, Field(gt=0)] = 1 << 30
    """bytes that large bodies over HTTP may take together until they are answered; one has room in any case"""


def available_cores(cgroup: Path = _CGROUP) -> int:
    """The cores this process may use: its affinity, and the quota of its container (cgroup v2 or v1)."""
    cores = float(len(os.sched_getaffinity(0)))
    quota = _words(cgroup / "cpu.max") or _words(cgroup / "cpu/cpu.cfs_quota_us", cgroup / "cpu/cpu.cfs_period_us")
    if len(quota) == 2 and quota[0] not in ("max", "-1"):
        cores = min(cores, int(quota[0]) / int(quota[1]))
    return max(1, math.ceil(cores))


def _words(*files: Path) -> list[str]:
    try:
        return [word for file in files for word in file.read_text().split()]
    except OSError:
        return []
