"""The folder of a local platform: what is where in it, and the small files that say what runs.

platform.json   URL and ports: chosen once, so that every part finds the others after any restart
key             the admin key (mode 0600)
lock            held by the supervisor; has its pid
run/<part>.json how the part is: pid, state, restarts
logs/<part>.log what the part writes
<part>/         everything else the part keeps
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

from lepton.errors import Conflict, LeptonError
from lepton.processes import Identity, marked
from lepton.servers import kept_secret

# Who only looks whether there is a supervisor has the lock too, for an instant; that must not keep one from starting.
_LOOKING_S = 0.2


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting"  # it ended; it is started again after a pause
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class PartState:
    """How a part is. `started_s` is its process's start, in seconds since the epoch; `ready_after_s` what it took."""

    name: str
    state: State
    pid: int | None = None
    started_s: float | None = None
    ready_after_s: float | None = None
    restarts: int = 0
    reason: str = ""

    @property
    def is_ready(self) -> bool:
        """Its record says so, and the process it speaks of still runs."""
        return self.state is State.READY and self.identity is not None and self.identity.find() is not None

    @property
    def identity(self) -> Identity | None:
        return Identity(self.pid, self.started_s) if self.pid and self.started_s else None


@dataclass(frozen=True, slots=True)
class Layout:
    """What the platform consists of: the front door's URL, Kafka's address, the ports by role, and the parts in the
    order in which they depend on each other. `pools` are the workers of other pools than the usual one."""

    url: str
    kafka: str
    ports: dict[str, int]
    parts: list[str]
    workers: int
    pools: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Home:
    """A local platform's folder. Its path is absolute."""

    folder: Path

    @classmethod
    def at(cls, folder: Path) -> "Home":
        return cls(folder.expanduser().resolve())

    def create(self) -> None:
        """The folder is there and closed to other accounts. Raises LeptonError when it cannot be."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.folder.chmod(0o700)
            for name in ("run", "logs"):
                (self.folder / name).mkdir(exist_ok=True)
        except OSError as error:
            raise LeptonError(
                f"The data folder {self.folder} cannot be used: {error.strerror}.",
                hint="Choose another with --home DIR.",
            ) from error

    def key(self) -> str:
        """The platform's admin key, made on the first call."""
        return kept_secret(self.folder / "key", "lp_")

    def log(self, part: str) -> Path:
        return self.folder / "logs" / f"{part}.log"

    # --- the supervisor's lock ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """This process is the only one that starts or stops parts. Raises Conflict when another one is."""
        with self._lock_file() as lock:
            deadline = time.monotonic() + _LOOKING_S
            while not _try_lock(lock, fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    raise Conflict(f"A platform is already being run in {self.folder}.")
                time.sleep(_LOOKING_S / 10)
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def supervisor_pid(self) -> int | None:
        """The process that holds the lock, or None when none does."""
        if not self.folder.is_dir():
            return None
        with self._lock_file() as lock:
            if _try_lock(lock, fcntl.LOCK_SH):
                return None
            lock.seek(0)
            return int(lock.read() or 0) or None

    def _lock_file(self) -> IO[str]:
        return (self.folder / "lock").open("a+")

    # --- what runs ------------------------------------------------------------------------------------------------

    def layout(self) -> Layout | None:
        """What platform.json says; None when there is none that can be read."""
        content = _read_json(self.folder / "platform.json")
        try:
            ports = {str(role): int(port) for role, port in content["ports"].items()}
            parts = [str(name) for name in content["parts"]]
            pools = {str(pool): int(count) for pool, count in content.get("pools", {}).items()}
            return Layout(str(content["url"]), str(content["kafka"]), ports, parts, int(content["workers"]), pools)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def save_layout(self, layout: Layout) -> None:
        _write_json(self.folder / "platform.json", asdict(layout))

    def leftovers(self) -> dict[str, Identity]:
        """The parts that run now, by name: those on record, and those whose record was lost."""
        recorded = {state.name: state.identity for state in self.parts() if state.identity}
        alive = {name: identity for name, identity in recorded.items() if identity.find()}
        return marked(self.folder) | alive

    def part(self, name: str) -> PartState | None:
        """The part's last known state; None when there is no record that can be read."""
        try:
            content = _read_json(self.folder / "run" / f"{name}.json")
            return replace(PartState(**content), state=State(content["state"]))
        except (KeyError, TypeError, ValueError):
            return None

    def parts(self) -> list[PartState]:
        """Every part that has a record, by name."""
        names = sorted(path.stem for path in (self.folder / "run").glob("*.json"))
        return [state for name in names if (state := self.part(name))]

    def save_part(self, state: PartState) -> None:
        _write_json(self.folder / "run" / f"{state.name}.json", asdict(state))

    def forget_part(self, name: str) -> None:
        (self.folder / "run" / f"{name}.json").unlink(missing_ok=True)


def _try_lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_json(path: Path) -> dict[str, Any]:
    """The object in the file; empty when the file is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Readers see the old content or the new one, whole."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=2))
    draft.replace(path)
