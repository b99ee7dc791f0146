"""The logging extension: what the gateway writes to its log, changed while it runs."""

from collections.abc import MutableMapping
from datetime import datetime
from typing import Any

import structlog
from lepton_common.errors import Invalid

_FLAGS = {"info": "log_info", "warning": "log_warning", "error": "log_error", "critical": "log_error"}
_FORMATS = ("default", "ISO8601")


class LogSettings:
    """Which levels are written, how times look, and whether requests are logged (`log_verbose_level` of 1 or more)."""

    def __init__(self, level: str) -> None:
        """`level` is the least severe one that is written."""
        order = ("debug", "info", "warning", "error")
        self._values: dict[str, Any] = {
            "log_file": "",
            "log_info": order.index(level) <= order.index("info"),
            "log_warning": order.index(level) <= order.index("warning"),
            "log_error": True,
            "log_verbose_level": 0,
            "log_format": "ISO8601",
        }
        self.verbose_level = 0

    def install(self) -> None:
        """From now on every log line of this process obeys."""
        *steps, render = structlog.get_config()["processors"]
        structlog.configure(
            processors=[*steps, self._apply, render],
            wrapper_class=structlog.make_filtering_bound_logger("debug"),
        )

    def view(self) -> dict[str, Any]:
        return dict(self._values)

    def update(self, changes: dict[str, Any]) -> dict[str, Any]:
        """All settings after the changes. Raises Invalid, and changes nothing, when one of them is wrong."""
        for name, value in changes.items():
            self._check(name, value)
        self._values.update(changes)
        self.verbose_level = self._values["log_verbose_level"]
        return self.view()

    def _check(self, name: str, value: Any) -> None:
        match name:
            case "log_info" | "log_warning" | "log_error":
                if not isinstance(value, bool):
                    raise Invalid(f"{name} must be true or false")
            case "log_verbose_level":
                if type(value) is not int or not 0 <= value < 2**31:
                    raise Invalid("log_verbose_level must be a non-negative integer")
            case "log_format":
                if value not in _FORMATS:
                    raise Invalid(f"log_format must be one of {', '.join(_FORMATS)}")
            case "log_file":
                if value != "":
                    raise Invalid("log_file cannot be changed: the log goes to standard output")
            case _:
                raise Invalid(f"{name[:80]!r} is not a log setting")

    def _apply(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        level = event.get("level", method)
        if level == "debug" or not self._values[_FLAGS.get(level, "log_error")]:
            raise structlog.DropEvent
        if self._values["log_format"] == "default" and "at" in event:
            event["at"] = datetime.fromisoformat(event["at"]).strftime("%m%d %H:%M:%S.%f")
        return event
