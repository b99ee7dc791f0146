"""Whether a process is ready for work, and what keeps it from being so."""

import json
from collections.abc import Callable

Check = Callable[[], str | None]


class Readiness:
    """Named checks, each None when all is well, else the reason. Not ready before `started` and once `draining`."""

    def __init__(self) -> None:
        self.started = False
        self.draining = False
        self._checks: dict[str, Check] = {}

    def add(self, name: str, check: Check) -> None:
        """`check` is asked from now on. It answers from memory: probes come often and must never wait."""
        self._checks[name] = check

    def reasons(self) -> dict[str, str]:
        """What keeps the process from being ready, by name; empty when it is."""
        found = {name: reason for name, check in self._checks.items() if (reason := check()) is not None}
        if self.draining:
            found["service"] = "draining"
        elif not self.started:
            found["service"] = "starting"
        return found

    def answer(self) -> tuple[int, bytes]:
        """Status and JSON body of `/health/ready`: 200, or 503 with the reasons."""
        reasons = self.reasons()
        if reasons:
            return 503, json.dumps({"status": "not ready", "reasons": reasons}).encode()
        return 200, b'{"status": "ready"}'
