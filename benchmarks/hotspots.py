"""What limits a path: how much of a core each process burns under load, and where our own processes spend it."""

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

_SECONDS = 3


def sample(pids: dict[str, int]) -> dict[str, list[tuple[str, float]]]:
    """The functions in which each named process spends its own CPU time (top of the stack), by py-spy, as shares of 1."""
    with tempfile.TemporaryDirectory() as folder:
        py_spy = Path(sys.executable).with_name("py-spy")
        options = ["--format", "raw", "--duration", str(_SECONDS), "--rate", "200", "--threads", "--nonblocking"]
        running = {
            name: subprocess.Popen(
                [py_spy, "record", *options, "--output", str(Path(folder, name)), "--pid", str(pid)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for name, pid in pids.items()
        }
        for child in running.values():
            child.wait(_SECONDS * 10)
        return {name: _top(Path(folder, name)) for name in running}


def _top(stacks: Path) -> list[tuple[str, float]]:
    """The five functions with the most samples of their own; py-spy writes `frame;frame;… count` a line."""
    own: Counter[str] = Counter()
    for line in stacks.read_text().splitlines() if stacks.exists() else []:
        stack, _, count = line.rpartition(" ")
        own[stack.rpartition(";")[2]] += int(count)
    total = sum(own.values()) or 1
    return [(name, count / total) for name, count in own.most_common(5)]
