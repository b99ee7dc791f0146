"""The `lepton` command as a person or a script runs it: a process, its output, its exit code."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Lepton = Callable[..., Ended]


def command(home: Path, cwd: Path) -> Lepton:
    """Runs `lepton` in `cwd`; in the platform's folder it finds URL and key: `lepton("models", "--json")`."""

    def run(*arguments: object, stdin: str = "", **environment: str) -> Ended:
        own = {name: value for name, value in os.environ.items() if not name.startswith("LEPTON_")}
        ended = subprocess.run(
            [Path(sys.executable).with_name("lepton"), *map(str, arguments)],
            env={**own, "LEPTON_HOME": str(home), "COLUMNS": "200", "NO_COLOR": "1", **environment},
            input=stdin,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert "Traceback" not in ended.stderr
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    return run
