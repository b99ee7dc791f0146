"""What an operator can change of monitor."""

from typing import Annotated

from lepton_common import settings
from pydantic import Field


class Settings(settings.Settings):
    """monitor's environment variables."""

    seconds_kept_s: Annotated[int, Field(ge=1800, le=7 * 24 * 3600)] = 3600
    """seconds that a model's history by the second is kept"""
    minutes_kept_days: Annotated[int, Field(ge=1, le=400)] = 30
    """days that a model's history by the minute is kept"""
