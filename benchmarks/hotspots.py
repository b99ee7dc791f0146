"""Where our own processes spend their CPU time under load, by py-spy."""

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 3
_TOP = 5

Hot = dict[str, list[tuple[str, float]]]


@contextmanager
def sampled(pids: dict[str, int]) -> Iterator[Hot]:
    """While the block runs, each named process is sampled; afterwards the dict has its busiest functions.

    A function's figure is the share (0 to 1) of the samples in which it held the interpreter, on top of the stack.
    """
    found: Hot = {}
    with tempfile.TemporaryDirectory() as folder:
        py_spy = Path(sys.executable).with_name("py-spy")
        options = ["--format", "raw", "--function", "--duration", str(SECONDS), "--rate", "200", "--gil"]
        recorders = [
            subprocess.Popen(
                [py_spy, "record", *options, "--output", str(Path(folder, name)), "--pid", str(pid)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for name, pid in pids.items()
        ]
        yield found
        for recorder in recorders:
            recorder.wait(10 * SECONDS)
        found |= {name: _top(Path(folder, name)) for name in pids}


def _top(stacks: Path) -> list[tuple[str, float]]:
    """py-spy writes `frame;frame;… count` a line."""
    own: Counter[str] = Counter()
    for line in stacks.read_text().splitlines() if stacks.exists() else []:
        stack, _, count = line.rpartition(" ")
        own[stack.rpartition(";")[2]] += int(count)
    total = sum(own.values()) or 1
    return [(name, count / total) for name, count in own.most_common(_TOP)]
