"""What `lepton up`, `down` and `status` do: start a supervisor, follow it, end it, and look at what it runs.

`python -m lepton.local HOME PORT WORKERS [POOL=WORKERS …]` is the supervisor of a detached platform; 0 stands for "not
given".
"""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import psutil

from lepton.errors import LeptonError, Unavailable
from lepton.home import Home, PartState, State
from lepton.parts import make_parts
from lepton.processes import Recipe, StartFailed, end, http_get, tail
from lepton.supervisor import cap_log, stop_leftovers, supervise

SUPERVISOR = "supervisor"
NO_POOLS: Mapping[str, int] = MappingProxyType({})
_POLL_S = 0.1
_CPU_SAMPLE_S = 0.3
# The supervisor itself gives each of three stages 20 s.
_DOWN_TIMEOUT_S = 75.0


@dataclass(frozen=True, slots=True)
class PartStatus:
    """How a part is now. Memory is None when it cannot be measured; `pss_bytes` counts shared pages by their share."""

    name: str
    state: State
    address: str | None
    pid: int | None
    uptime_s: float | None
    cpu_percent: float | None
    rss_bytes: int | None
    pss_bytes: int | None
    restarts: int
    reason: str


@dataclass(frozen=True, slots=True)
class PlatformStatus:
    """How the platform is now; `ready` when every part answers."""

    url: str
    home: str
    kafka: str
    ready: bool
    rss_bytes: int
    pss_bytes: int
    parts: list[PartStatus]


class Background:
    """A supervisor in this process, beside the terminal that shows it."""

    def __init__(self, home: Home, port: int | None, workers: int | None, pools: Mapping[str, int] = NO_POOLS) -> None:
        self._stop = threading.Event()
        self._ended = threading.Event()
        self._failure: LeptonError | None = None
        self._thread = threading.Thread(target=self._run, args=(home, port, workers, pools), name=SUPERVISOR)
        self._thread.start()

    def _run(self, home: Home, port: int | None, workers: int | None, pools: Mapping[str, int]) -> None:
        try:
            supervise(home, port, workers, pools, self._stop)
        except StartFailed as error:
            self._failure = LeptonError(str(error), hint="`lepton doctor` says what is missing.")
        except LeptonError as error:
            self._failure = error
        finally:
            self._ended.set()

    def failure(self) -> LeptonError | None:
        """Why it ended by itself; None while it runs."""
        return (self._failure or LeptonError("The supervisor ended.")) if self._ended.is_set() else None

    def wait(self) -> None:
        """It has ended. A signal may interrupt this, unlike `Thread.join`, which takes the thread for ended then."""
        self._ended.wait()

    def stop(self) -> None:
        """It has ended, and every part before it."""
        self._stop.set()
        self._thread.join()


class Detached:
    """A supervisor in a process of its own, which outlives this one."""

    def __init__(self, home: Home, port: int | None, workers: int | None, pools: Mapping[str, int] = NO_POOLS) -> None:
        self._log = home.log(SUPERVISOR)
        cap_log(self._log)
        given = [str(home.folder), str(port or 0), str(workers or 0), *(f"{pool}={n}" for pool, n in pools.items())]
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lepton.local", *given],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def failure(self) -> LeptonError | None:
        """Why it ended; None while it runs."""
        if self._process.poll() is None:
            return None
        return LeptonError(
            f"The platform did not start.\n{tail(self._log)}", hint="`lepton doctor` says what is missing."
        )


def follow(home: Home, failure: Callable[[], LeptonError | None], timeout_s: float) -> Iterator[list[PartState]]:
    """How the parts are, again and again, until every one is ready and the front door answers.

    Raises what `failure` returns, or Unavailable when `timeout_s` passes before.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        if error := failure():
            raise error
        states = _states(home)
        yield states
        if states and all(state.is_ready for state in states) and _front_door_answers(home):
            return
        if time.monotonic() > deadline:
            waiting = ", ".join(_why(state) for state in states if not state.is_ready) or "the front door"
            raise Unavailable(
                f"Not ready after {timeout_s:g} s: {waiting}.",
                hint="`lepton status` and `lepton logs` show why; it goes on starting. `lepton down` ends it.",
            )
        time.sleep(_POLL_S)


def _why(state: PartState) -> str:
    return f"{state.name} ({state.reason})" if state.reason else state.name


def _states(home: Home) -> list[PartState]:
    """The layout's parts, once the supervisor has the lock."""
    layout = home.layout() if home.supervisor_pid() else None
    names = layout.parts if layout else []
    return [home.part(name) or PartState(name, State.STARTING) for name in names]


def _front_door_answers(home: Home) -> bool:
    layout = home.layout()
    try:
        return layout is not None and http_get(layout.ports["front"], "/v2/health/live")[0] == 200
    except OSError:
        return False


def down(home: Home) -> list[str]:
    """Nothing of the platform runs any more; returns the parts that did. The data stays."""
    names = sorted(home.leftovers()) if home.folder.is_dir() else []
    if pid := home.supervisor_pid():
        try:
            supervisor = psutil.Process(pid)
            end(supervisor, signal.SIGTERM, _DOWN_TIMEOUT_S)
        except psutil.NoSuchProcess:
            pass  # It ended between the two lines.
    if names:
        stop_leftovers(home)
    return names


def status(home: Home) -> PlatformStatus | None:
    """How the platform in `home` is; None when nothing of it runs. Takes about half a second."""
    layout, running = home.layout(), home.leftovers() if home.folder.is_dir() else {}
    if layout is None or not running:
        return None
    _, stages = make_parts(home, layout.ports, layout.workers, layout.pools)
    recipes = {part.name: part for stage in stages for part in stage}
    with ThreadPoolExecutor(max_workers=16) as threads:
        parts = list(threads.map(lambda name: _part_status(home, name, recipes.get(name), layout.ports), layout.parts))
        parts.append(_supervisor_status(home))
    return PlatformStatus(
        url=layout.url,
        home=str(home.folder),
        kafka=layout.kafka,
        ready=all(part.state is State.READY for part in parts if part.name != SUPERVISOR),
        rss_bytes=sum(part.rss_bytes or 0 for part in parts),
        pss_bytes=sum(part.pss_bytes or 0 for part in parts),
        parts=parts,
    )


def _part_status(home: Home, name: str, recipe: Recipe | None, ports: dict[str, int]) -> PartStatus:
    record = home.part(name) or PartState(name, State.STOPPED)
    process = record.identity.find() if record.identity else None
    state, reason = record.state, record.reason
    if process is None and state in {State.READY, State.STARTING} and record.pid:
        state, reason = State.STOPPED, "it ended and nobody starts it again: `lepton up` does"
    elif process and recipe and (trouble := recipe.not_ready()):
        state, reason = State.STARTING, trouble
    address = f"127.0.0.1:{ports['front' if name == 'envoy' else name]}"
    return _measured(name, state, address, process, record.restarts, reason)


def _supervisor_status(home: Home) -> PartStatus:
    process = None
    if pid := home.supervisor_pid():
        with contextlib.suppress(psutil.NoSuchProcess):  # It may end at any moment.
            process = psutil.Process(pid)
    state, reason = (
        (State.READY, "") if process else (State.STOPPED, "`lepton up` starts one; parts that end stay ended")
    )
    return _measured(SUPERVISOR, state, None, process, 0, reason)


def _measured(
    name: str, state: State, address: str | None, process: psutil.Process | None, restarts: int, reason: str
) -> PartStatus:
    """With CPU and memory of the process and its children."""
    cpu = rss = pss = uptime = pid = None
    if process:
        try:
            before = _cpu_seconds(process)
            time.sleep(_CPU_SAMPLE_S)
            cpu = round(100 * (_cpu_seconds(process) - before) / _CPU_SAMPLE_S, 1)
            pid, uptime = process.pid, round(time.time() - process.create_time(), 1)
            # The parts are the supervisor's children, but they are counted by themselves.
            children = [] if name == SUPERVISOR else process.children(recursive=True)
            rss, pss = _memory([process, *children])
        except psutil.Error:
            pass  # It ended meanwhile, or belongs to another account.
    return PartStatus(name, state, address, pid, uptime, cpu, rss, pss, restarts, reason)


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _memory(processes: list[psutil.Process]) -> tuple[int, int]:
    """Resident and proportional bytes of the processes together."""
    rss = pss = 0
    for process in processes:
        full = process.memory_full_info()
        rss += full.rss
        # Only Linux knows the share; elsewhere what is the process's alone comes nearest.
        pss += getattr(full, "pss", full.uss)
    return rss, pss


def main() -> None:
    """The supervisor of a detached platform, until SIGTERM."""
    folder, port, workers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    pools = {pool: int(count) for pool, _, count in (each.partition("=") for each in sys.argv[4:])}
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    try:
        supervise(Home.at(Path(folder)), port or None, workers or None, pools, stop)
    except (LeptonError, StartFailed) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
