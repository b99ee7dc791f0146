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
    labels_kept_days: Annotated[int, Field(ge=1, le=400)] = 90
    """days that labels are kept"""

    @property
    def kept_s(self) -> dict[str, int]:
        """Seconds that each partitioned table goes back."""
        days = {"minutes": self.minutes_kept_days, "labels": self.labels_kept_days}
        return {"seconds": self.seconds_kept_s, **{table: kept * 86_400 for table, kept in days.items()}}
