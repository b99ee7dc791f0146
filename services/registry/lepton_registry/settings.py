"""What an operator can change of the registry."""

from pathlib import Path
from typing import Annotated

from lepton_common.errors import Invalid
from lepton_common.settings import Settings as CommonSettings
from pydantic import Field, field_validator

from lepton_registry.sources import Location


class Settings(CommonSettings):
    blobs: str
    """where artifacts are kept: a folder, or an s3://, gs:// or az:// URL"""
    staging: Path
    """folder for unfinished uploads, with room for the largest artifact"""
    max_artifact_bytes: Annotated[int, Field(ge=1)] = 2**31 - 1
    """largest artifact in bytes; ONNX itself ends at 2 GiB"""
    ingest_from: str = ""
    """prefixes of what pushes by Kafka may fetch, https://host/path/ or file:///folder/, separated by spaces"""
    ingest_private: bool = False
    """whether the hosts of these prefixes may have addresses that are not public"""
    bootstrap_key_sha256: Annotated[str, Field(repr=False, pattern=r"^([0-9a-f]{64})?$")] = ""
    """sha256 (hex) of a key that always exists, with every scope, for the tenant default"""
    inspection_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 120.0
    """seconds that checking an uploaded model may take"""
    staging_max_age_s: Annotated[float, Field(ge=60)] = 24 * 3600.0
    """seconds after which an upload that nobody continues is thrown away"""

    @field_validator("ingest_from")
    @classmethod
    def _are_uris(cls, prefixes: str) -> str:
        try:
            for each in prefixes.split():
                Location.parse(each)
        except Invalid as error:
            raise ValueError(error.message) from None
        return prefixes
