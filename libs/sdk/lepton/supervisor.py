"""Keeps every part of a local platform running.

A part that ends is started again, after a pause that grows while it keeps ending. The parts do not need the supervisor
to live: one that comes after a killed supervisor takes over what still runs.
"""

import contextlib
import os
import resource
import shutil
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from lepton.errors import Conflict
from lepton.home import Home, PartState, State
from lepton.parts import choose_ports, make_parts
from lepton.ports import is_free
from lepton.processes import Identity, Process, Recipe, end, tail

_STOP_TIMEOUT_S = 20.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
# A part that ran for so long was well: it is started again at once.
_WELL_AFTER_S = 30.0
_PROBE_S = 0.1
_LOG_BYTES = 16 * 1024 * 1024
_LOG_CHECK_S = 5.0
_OPEN_FILES = 65_536


def supervise(
    home: Home, front_port: int | None, workers: int | None, pools: Mapping[str, int], stop: threading.Event
) -> None:
    """The platform in `home` ran until `stop` was set; now nothing of it runs.

    A front door or a number of workers that is not given stays what it was; at first 8080 and one a core, at most two.
    `pools` are other pools by their number of workers; one that is not given stays what it was, and 0 ends it.
    Raises Conflict when someone else runs it or something else listens on the front door's port.
    """
    _allow_open_files()
    with home.locked():
        before = home.layout()
        running = home.leftovers()
        workers = workers or (before.workers if before else min(2, os.cpu_count() or 1))
        if before is None:
            # On which addresses these listen is not known any more.
            _end_all(home, running)
            running = {}
        if front_port and not running and not is_free(front_port):
            raise Conflict(f"Something else listens on port {front_port}.", hint="Choose another one with --port.")
        pools = {name: count for name, count in ({**(before.pools if before else {}), **pools}).items() if count}
        ports = choose_ports(front_port, workers, before.ports if before else {}, keep=bool(running), pools=pools)
        layout, stages = make_parts(home, ports, workers, pools)
        strangers = running.keys() - set(layout.parts)
        _end_all(home, {name: running[name] for name in strangers})
        for state in home.parts():
            if state.name not in running or state.name in strangers:
                home.forget_part(state.name)
        home.save_layout(layout)
        Supervisor(home, stages, running).run(stop)


def stop_leftovers(home: Home) -> list[str]:
    """No part runs any more; returns the names of those that still did, without a supervisor. Raises Conflict when
    there is one."""
    with home.locked():
        running = home.leftovers()
        if layout := home.layout():
            _, stages = make_parts(home, layout.ports, layout.workers, layout.pools)
            _stop_stages(home, [[p for part in stage if (p := _adopt(home, part, running))] for stage in stages])
        _end_all(home, home.leftovers())
        return list(running)


class Supervisor:
    """Keeps the parts running, given in stages that depend on each other; `running` are those to take over.

    Whoever makes one holds the home's lock."""

    def __init__(self, home: Home, stages: list[list[Recipe]], running: dict[str, Identity]) -> None:
        self._home = home
        self._stages = stages
        self._stopping = threading.Event()
        self._spawning = threading.Lock()
        self._processes = {
            part.name: process for stage in stages for part in stage if (process := _adopt(home, part, running))
        }

    def run(self, stop: threading.Event) -> None:
        """Every part is kept running until `stop` is set; then all have ended, those that depend on others first."""
        parts = [part for stage in self._stages for part in stage]
        keepers = [threading.Thread(target=self._keep, args=(part,), name=part.name) for part in parts]
        for keeper in keepers:
            keeper.start()
        while not stop.wait(_LOG_CHECK_S):
            for part in parts:
                cap_log(self._home.log(part.name))
        with self._spawning:
            self._stopping.set()
        names = [[part.name for part in stage] for stage in self._stages]
        _stop_stages(self._home, [[self._processes[n] for n in stage if n in self._processes] for stage in names])
        for keeper in keepers:
            keeper.join()

    def _keep(self, part: Recipe) -> None:
        """The part runs, again and again, until the supervisor stops."""
        restarts = 0
        pause_s = _FIRST_PAUSE_S
        process = self._processes.get(part.name)
        while not self._stopping.is_set():
            begun = time.monotonic()
            reason = ""
            try:
                process = process or self._spawn(part, restarts)
                if process is not None:
                    self._watch(process, restarts)
                    reason = f"it ended: {tail(process.log, lines=1)}"
            except Exception as error:  # Whatever it was, the part must be tried again: nobody else does.
                reason = str(error) or type(error).__name__
            if time.monotonic() - begun > _WELL_AFTER_S:
                pause_s = _FIRST_PAUSE_S
            process = None
            restarts += 1
            if not self._stopping.is_set():
                self._record(PartState(part.name, State.WAITING, restarts=restarts, reason=reason))
                self._stopping.wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _spawn(self, part: Recipe, restarts: int) -> Process | None:
        """A new process of the part; None when the supervisor is stopping."""
        self._record(PartState(part.name, State.STARTING, restarts=restarts))
        part.folder.mkdir(parents=True, exist_ok=True)
        part.prepare()
        with self._spawning:
            if self._stopping.is_set():
                return None
            process = self._processes[part.name] = Process.spawn(part, self._home.log(part.name))
            return process

    def _watch(self, process: Process, restarts: int) -> None:
        """Returns when the process has ended; until then its record says whether it became ready."""
        identity = process.identity
        state = PartState(process.recipe.name, State.STARTING, identity.pid, identity.started, restarts=restarts)
        # A part that takes long is not ended for it: it may be waiting for another one.
        while (reason := process.recipe.not_ready()) is not None:
            if reason != state.reason:
                state = replace(state, reason=reason)
                self._record(state)
            if process.wait(_PROBE_S):
                return
        known = self._home.part(state.name)
        # One that was taken over may have been ready long before.
        taken = known.ready_after_s if known and known.identity == identity else None
        ready_after_s = taken or round(time.time() - identity.started, 2)
        self._record(replace(state, state=State.READY, reason="", ready_after_s=ready_after_s))
        process.wait()

    def _record(self, state: PartState) -> None:
        # Records are for looking at: a full disk must not end the supervision.
        with contextlib.suppress(OSError):
            self._home.save_part(state)


def _adopt(home: Home, part: Recipe, running: dict[str, Identity]) -> Process | None:
    identity = running.get(part.name)
    return Process.adopt(part, identity, home.log(part.name)) if identity else None


def _stop_stages(home: Home, stages: list[list[Process]]) -> None:
    """All have ended, each stage after those that come later, side by side within a stage."""

    def stop(process: Process) -> None:
        process.stop(_STOP_TIMEOUT_S)
        with contextlib.suppress(OSError):
            home.save_part(PartState(process.recipe.name, State.STOPPED))

    with ThreadPoolExecutor() as threads:
        for stage in reversed(stages):
            list(threads.map(stop, stage))


def _end_all(home: Home, running: dict[str, Identity]) -> None:
    """These parts, for which there is no recipe, have ended."""
    with ThreadPoolExecutor() as threads:
        list(threads.map(end, filter(None, (identity.find() for identity in running.values()))))
    for name in running:
        home.forget_part(name)


def _allow_open_files() -> None:
    """This process and the parts it starts may have as many files and connections open as the machine allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def cap_log(log: Path, limit_bytes: int = _LOG_BYTES) -> None:
    """A log over the limit is moved to `<log>.1`. Its writer holds it open to append, so it is copied and emptied."""
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > limit_bytes:
            shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            os.truncate(log, 0)
