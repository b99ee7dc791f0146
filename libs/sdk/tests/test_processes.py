import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from lepton.processes import Identity, Process, StartFailed, marked, running, tail
from lepton.servers import Etcd


@dataclass(frozen=True)
class Script:
    """A part that is a few lines of Python; it is ready when it has made the file `ready`."""

    folder: Path
    code: str
    name: str = "script"
    stop_signal: signal.Signals = signal.SIGTERM
    settings: dict[str, str] = field(default_factory=dict)

    def prepare(self) -> None: ...

    def argv(self) -> list[str]:
        return [sys.executable, "-c", self.code]

    def environment(self) -> dict[str, str]:
        return self.settings

    def not_ready(self) -> str | None:
        return None if (self.folder / "ready").exists() else "no file yet"


SLEEPS = "import pathlib, time; pathlib.Path('ready').touch(); time.sleep(600)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPS}"
PARENT = (
    "import pathlib, subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    "pathlib.Path('child').write_text(str(child.pid)); pathlib.Path('ready').touch(); child.wait()"
)
BUSY = """
import pathlib, threading
def write():
    with open('written', 'ab', buffering=0) as file:
        while True: file.write(b'x')
for _ in range(4): threading.Thread(target=write, daemon=True).start()
pathlib.Path('ready').touch()
threading.Event().wait(600)
"""


@contextlib.contextmanager
def ready(recipe: Script) -> Iterator[Process]:
    process = Process.start(recipe)
    try:
        process.wait_ready(20)
        yield process
    finally:
        process.kill()


def test_stop_ends_a_process_that_ignores_its_signal(tmp_path: Path) -> None:
    with ready(Script(tmp_path, DEAF)) as process:
        process.stop(timeout_s=0.2)
        assert not process.alive()


def test_kill_takes_the_children_along(tmp_path: Path) -> None:
    with ready(Script(tmp_path, PARENT)) as process:
        child = psutil.Process(int((tmp_path / "child").read_text()))
        process.kill()
        child.wait(5)
        assert not process.alive()


def test_frozen_process_does_nothing_from_that_moment(tmp_path: Path) -> None:
    with ready(Script(tmp_path, BUSY)) as process:
        for _ in range(20):
            process.freeze()
            written = (tmp_path / "written").stat().st_size
            time.sleep(0.01)
            assert (tmp_path / "written").stat().st_size == written
            process.send(signal.SIGCONT)


def test_end_while_starting_is_told_with_the_last_words(tmp_path: Path) -> None:
    process = Process.start(Script(tmp_path, "raise SystemExit('no disk left')"))
    with pytest.raises(StartFailed, match="script ended while starting\nno disk left"):
        process.wait_ready(20)


def test_program_that_does_not_exist_is_told_by_name(tmp_path: Path) -> None:
    class Missing(Script):
        def argv(self) -> list[str]:
            return ["/nowhere/at/all"]

    with pytest.raises(StartFailed, match=r"script cannot be run: .*/nowhere/at/all"):
        Process.start(Missing(tmp_path, ""))


def test_slow_start_is_told_with_its_reason(tmp_path: Path) -> None:
    process = Process.start(Script(tmp_path, "import time; time.sleep(600)"))
    try:
        with pytest.raises(StartFailed, match=r"script not ready after 0\.1 s: no file yet"):
            process.wait_ready(0.1)
    finally:
        process.kill()


def test_identity_is_not_taken_for_a_later_process_of_the_same_pid() -> None:
    mine = Identity.of(psutil.Process())
    assert mine.find() is not None
    assert Identity(mine.pid, mine.started - 60).find() is None


def test_part_of_a_starter_that_died_is_found_by_its_mark_and_taken_over(tmp_path: Path) -> None:
    etcd = Etcd(tmp_path / "etcd")
    starter = (
        "import sys; from pathlib import Path; from lepton.processes import Process; from lepton.servers import Etcd;"
        f"Process.start(Etcd(Path({str(etcd.folder)!r}), {etcd.port}, {etcd.peer_port})).wait_ready()"
    )
    subprocess.run([sys.executable, "-c", starter], check=True, timeout=60)
    assert marked(tmp_path / "elsewhere") == {}
    found = marked(tmp_path)
    assert list(found) == ["etcd"]
    adopted = Process.adopt(etcd, found["etcd"], tmp_path / "log")
    assert adopted is not None
    assert not adopted.wait(0.05)
    adopted.stop()
    assert Process.adopt(etcd, found["etcd"], tmp_path / "log") is None


def test_settings_of_the_recipe_win_over_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEPTON_PORT", "1")
    code = "import os, pathlib; pathlib.Path('ready').write_text(os.environ['LEPTON_PORT'])"
    process = Process.start(Script(tmp_path, code, settings={"LEPTON_PORT": "2"}))
    assert process.wait(20)
    assert (tmp_path / "ready").read_text() == "2"


def test_running_stops_its_process_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError), running(Script(tmp_path, SLEEPS)) as process:
        raise KeyError
    assert not process.alive()


def test_tail_of_a_missing_log_is_empty_and_of_a_long_one_its_end(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    assert tail(log) == ""
    log.write_text("".join(f"line {number}\n" for number in range(10_000)))
    assert tail(log, lines=2) == "line 9998\nline 9999"
