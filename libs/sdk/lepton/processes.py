"""One process of the local platform: started from a recipe, recognised later by pid and start time, always stopped."""

import contextlib
import http.client
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

# Every process says in its environment which part it is, so that it is found even when the record of its pid is lost.
_MARK = "LEPTON_PART"


class StartFailed(Exception):
    """A part did not become ready. The message says which, why, and ends with the last lines of its log."""


class Recipe(Protocol):
    """How to run one part. Everything it writes lives under `folder`."""

    @property
    def name(self) -> str: ...
    @property
    def folder(self) -> Path: ...
    @property
    def stop_signal(self) -> signal.Signals:
        """Asks the process to end cleanly."""
        ...

    def prepare(self) -> None:
        """Everything on disk that the process needs is there. Repeating it changes nothing. Raises StartFailed."""
        ...

    def argv(self) -> list[str]: ...
    def environment(self) -> dict[str, str]:
        """Added to the environment of the caller."""
        ...

    def not_ready(self) -> str | None:
        """None when the part answers now, else what is missing. Takes a second at most."""
        ...


@dataclass(frozen=True, slots=True)
class Identity:
    """A process that cannot be confused with a later one of the same pid. `started` is in seconds since the epoch."""

    pid: int
    started: float

    @classmethod
    def of(cls, process: psutil.Process) -> "Identity":
        return cls(process.pid, process.create_time())

    def find(self) -> psutil.Process | None:
        """The process, or None when it has ended, be it that another has its pid now."""
        try:
            process = psutil.Process(self.pid)
            # A clock that was set moves every start time a little, so equality would be too strict.
            same = abs(process.create_time() - self.started) < 1
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


class Process:
    """A running part: a child of this process, or one adopted from a supervisor that died."""

    def __init__(self, recipe: Recipe, process: psutil.Process, log: Path) -> None:
        self.recipe = recipe
        self.log = log
        self._process = process
        self.identity = Identity.of(process)

    @classmethod
    def start(cls, recipe: Recipe, log: Path | None = None) -> "Process":
        """The recipe's process, prepared and spawned but not yet ready. Its output is appended to `log`,
        by default `<folder>/<name>.log`. Raises StartFailed."""
        recipe.folder.mkdir(parents=True, exist_ok=True)
        recipe.prepare()
        return cls.spawn(recipe, log or recipe.folder / f"{recipe.name}.log")

    @classmethod
    def spawn(cls, recipe: Recipe, log: Path) -> "Process":
        """The process of a prepared recipe. Raises StartFailed when the program cannot be run."""
        try:
            with log.open("ab") as out:
                # A session of its own: Ctrl-C in the terminal is the supervisor's to handle, in order.
                process = psutil.Popen(
                    recipe.argv(),
                    env={**os.environ, **recipe.environment(), _MARK: _mark(recipe)},
                    cwd=recipe.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise StartFailed(f"{recipe.name} cannot be run: {error}") from error
        return cls(recipe, process, log)

    @classmethod
    def adopt(cls, recipe: Recipe, identity: Identity, log: Path) -> "Process | None":
        """The recipe's process that someone else started; None when it has ended."""
        process = identity.find()
        return cls(recipe, process, log) if process else None

    @property
    def pid(self) -> int:
        return self.identity.pid

    def alive(self) -> bool:
        return self.identity.find() is not None

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        """The part answers. Raises StartFailed when it ends before or `timeout_s` passes."""
        deadline = time.monotonic() + timeout_s
        while (reason := self.recipe.not_ready()) is not None:
            # Waiting for the process itself is the pause between two probes.
            if self.wait(0.03):
                raise StartFailed(f"{self.recipe.name} ended while starting\n{tail(self.log)}")
            if time.monotonic() > deadline:
                raise StartFailed(f"{self.recipe.name} not ready after {timeout_s:g} s: {reason}\n{tail(self.log)}")

    def wait(self, timeout_s: float | None = None) -> bool:
        """True when the process has ended, within `timeout_s`."""
        return ended(self._process, timeout_s)

    def stop(self, timeout_s: float = 10.0) -> None:
        """The process has ended: cleanly when it managed to in `timeout_s`, else killed with its children."""
        end(self._process, self.recipe.stop_signal, timeout_s)

    def kill(self) -> None:
        """The process and its children have ended by SIGKILL."""
        end(self._process, signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        """The signal was delivered, unless the process has ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._process.send_signal(number)

    def freeze(self) -> None:
        """No thread of the process runs until it gets SIGCONT. Raises TimeoutError when one goes on."""
        if not freeze(self._process):
            raise TimeoutError(f"{self.recipe.name} does not stop")


def freeze(process: psutil.Process, timeout_s: float = 2.0) -> bool:
    """True once no thread of the process runs any more, until it gets SIGCONT; False when one still may after
    `timeout_s`, as one that waits for a disk. SIGSTOP alone returns before they stop. Raises psutil.NoSuchProcess."""
    process.suspend()
    deadline = time.monotonic() + timeout_s
    for thread in Path(f"/proc/{process.pid}/task").glob("*/stat"):  # None where there is no /proc.
        with contextlib.suppress(OSError):  # The thread has ended.
            while thread.read_text().rpartition(") ")[2][0] not in "TtZX":
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.001)
    return True


def end(process: psutil.Process, number: signal.Signals = signal.SIGTERM, timeout_s: float = 10.0) -> None:
    """The process has ended by the signal, or, when it did not in `timeout_s` or `number` is SIGKILL, with its children
    by SIGKILL."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if number != signal.SIGKILL:
            process.send_signal(number)
            if ended(process, timeout_s):
                return
        freeze(process)  # From here it makes no more children.
        doomed = [process, *process.children(recursive=True)]
        for each in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        for each in doomed:
            ended(each, timeout_s)


def ended(process: psutil.Process, timeout_s: float | None = None) -> bool:
    """True when the process ends, or has ended, within `timeout_s`."""
    if isinstance(process, psutil.Popen) or not hasattr(os, "pidfd_open"):
        try:
            process.wait(timeout_s)
        except psutil.TimeoutExpired:
            return False
        return True
    # psutil would wait until someone has reaped it, which the first process of many containers never does.
    if not process.is_running():
        return True
    try:
        file = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(file, select.POLLIN)
        return bool(poll.poll(None if timeout_s is None else 1000 * timeout_s))
    finally:
        os.close(file)


def _mark(recipe: Recipe) -> str:
    return f"{recipe.name} {recipe.folder}"


def marked(folder: Path) -> dict[str, Identity]:
    """Every running part whose own folder is in `folder`, by name, whoever started it."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            name, _, part_folder = process.environ().get(_MARK, "").partition(" ")
            # Its children inherited the mark, but only the process we spawned leads a session.
            if name and Path(part_folder).parent == folder and os.getsid(process.pid) == process.pid:
                found[name] = Identity.of(process)
    return found


@contextlib.contextmanager
def running(recipe: Recipe, timeout_s: float = 30.0) -> Iterator[Process]:
    """The recipe's process, ready, and stopped at the end of the block."""
    process = Process.start(recipe)
    try:
        process.wait_ready(timeout_s)
        yield process
    finally:
        process.stop()


def http_get(port: int, path: str, timeout_s: float = 1.0) -> tuple[int, bytes]:
    """Status and body of a GET on loopback. Raises OSError when nobody answers properly."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except http.client.HTTPException as error:
        raise ConnectionError(str(error)) from error
    finally:
        connection.close()


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log file, for an error message."""
    with contextlib.suppress(FileNotFoundError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16_384))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    return ""
