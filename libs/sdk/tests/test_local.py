"""The whole platform, started, broken and ended as a person would: by the `lepton` command and by kill -9."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from lepton.errors import Conflict, Unavailable
from lepton.home import Home, Layout, PartState, State
from lepton.local import follow
from lepton.ports import free_port
from lepton.supervisor import stop_leftovers

pytestmark = pytest.mark.timeout(240)

_LEPTON = Path(sys.executable).with_name("lepton")


class Platform:
    """A home folder and the commands on it."""

    def __init__(self, folder: Path) -> None:
        self.home = Home.at(folder)
        self.port = free_port()

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        line = [str(_LEPTON), *command, "--home", str(self.home.folder)]
        return subprocess.run(line, capture_output=True, text=True, timeout=150, check=check)

    def up(self, *options: str) -> str:
        return self.run("up", "--detach", "--workers", "1", *options).stdout

    def pids(self) -> dict[str, int | None]:
        return {state.name: state.pid for state in self.home.parts()}

    def part(self, name: str) -> PartState:
        state = self.home.part(name)
        assert state is not None
        return state

    def kill_supervisor(self) -> None:
        pid = self.home.supervisor_pid()
        assert pid is not None
        psutil.Process(pid).kill()
        eventually(lambda: self.home.supervisor_pid() is None)

    def front_door_answers(self) -> bool:
        layout = self.home.layout()
        assert layout is not None
        with urllib.request.urlopen(f"{layout.url}/v2/health/live", timeout=10) as answer:
            return bool(answer.status == 200)


def eventually(holds: Callable[[], bool], within_s: float = 60.0) -> None:
    """Fails unless it holds in time."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    platform = Platform(tmp_path_factory.mktemp("platform") / "home")
    try:
        platform.up("--port", str(platform.port))
        yield platform
    finally:
        platform.run("down")


@pytest.fixture
def platform(started: Platform) -> Platform:
    """The platform, which runs whatever the test before has done to it."""
    started.up()
    return started


def test_platform_answers_at_the_port_it_was_asked_for(platform: Platform) -> None:
    layout = platform.home.layout()
    assert layout is not None
    assert layout.url == f"http://127.0.0.1:{platform.port}"
    assert platform.front_door_answers()


def test_every_part_listens_on_loopback_only(platform: Platform) -> None:
    for name, pid in platform.pids().items():
        assert pid is not None, name
        listening = [c.laddr for c in psutil.Process(pid).net_connections() if c.status == psutil.CONN_LISTEN]
        assert listening, name
        assert {address.ip for address in listening} <= {"127.0.0.1", "::ffff:127.0.0.1"}, name


def test_second_up_says_so_and_changes_nothing(platform: Platform) -> None:
    before = platform.pids()
    assert "running already" in platform.up()
    assert platform.pids() == before


@pytest.mark.parametrize("name", ["etcd", "postgres", "kafka", "registry", "worker-1", "envoy"])
def test_killed_part_comes_back(platform: Platform, name: str) -> None:
    before = platform.part(name)
    assert before.pid is not None
    os.kill(before.pid, signal.SIGKILL)
    eventually(lambda: platform.part(name).is_ready and platform.part(name).pid != before.pid)
    assert platform.part(name).restarts == before.restarts + 1


def test_killed_supervisor_leaves_everything_running_and_the_next_one_takes_it_over(platform: Platform) -> None:
    before = platform.pids()
    platform.kill_supervisor()
    assert platform.front_door_answers()
    platform.up()
    assert platform.pids() == before
    # It is watched again: what ends is started.
    os.kill(platform.part("etcd").pid or 0, signal.SIGKILL)
    eventually(lambda: platform.part("etcd").is_ready and platform.part("etcd").pid != before["etcd"])


def test_part_that_died_with_the_supervisor_is_started_beside_those_that_live(platform: Platform) -> None:
    before = platform.pids()
    platform.kill_supervisor()
    os.kill(before["registry"] or 0, signal.SIGKILL)
    platform.up()
    changed = {name for name, pid in platform.pids().items() if pid != before[name]}
    assert changed == {"registry"}
    assert platform.front_door_answers()


def test_lost_records_of_running_parts_are_found_again(platform: Platform) -> None:
    before = platform.pids()
    platform.kill_supervisor()
    for name in before:
        platform.home.forget_part(name)
    platform.up()
    assert platform.pids() == before


def test_damaged_platform_file_costs_a_restart_and_no_data(platform: Platform) -> None:
    key = platform.home.key()
    platform.kill_supervisor()
    (platform.home.folder / "platform.json").write_text('{"url": "http://12')
    platform.up("--port", str(platform.port))
    assert platform.home.key() == key
    assert platform.front_door_answers()


def test_status_tells_every_part_with_its_memory(platform: Platform) -> None:
    status = json.loads(platform.run("status", "--json").stdout)
    assert status["ready"]
    assert [part["name"] for part in status["parts"]][-2:] == ["envoy", "supervisor"]
    assert all(part["pss_bytes"] > 0 for part in status["parts"])
    assert status["pss_bytes"] == sum(part["pss_bytes"] for part in status["parts"])
    table = platform.run("status").stdout
    assert "worker-1" in table
    assert f"http://127.0.0.1:{platform.port} is ready" in table


def test_status_tells_what_runs_without_a_supervisor(platform: Platform) -> None:
    platform.kill_supervisor()
    os.kill(platform.part("worker-1").pid or 0, signal.SIGKILL)
    eventually(lambda: not platform.part("worker-1").is_ready)
    status = json.loads(platform.run("status", "--json").stdout)
    states = {part["name"]: part["state"] for part in status["parts"]}
    assert (states["worker-1"], states["supervisor"], states["etcd"]) == ("stopped", "stopped", "ready")
    assert not status["ready"]


def test_logs_of_one_part_and_of_all_can_be_read(platform: Platform) -> None:
    assert "ready to accept connections" in platform.run("logs", "postgres").stdout
    assert "worker-1" in platform.run("logs").stdout
    unknown = platform.run("logs", "nothing", check=False)
    assert unknown.returncode == 1
    assert "postgres" in unknown.stderr


def test_two_platforms_run_side_by_side(platform: Platform, tmp_path: Path) -> None:
    second = Platform(tmp_path / "second")
    try:
        refused = second.run("up", "--detach", "--port", str(platform.port), check=False)
        assert refused.returncode == 1
        assert f"Something else listens on port {platform.port}" in refused.stderr
        second.up("--port", str(second.port))
        assert second.front_door_answers()
        assert platform.front_door_answers()
    finally:
        second.run("down")


def test_running_platform_cannot_be_stopped_behind_its_supervisors_back(platform: Platform) -> None:
    with pytest.raises(Conflict, match="already"):
        stop_leftovers(platform.home)


def test_down_ends_everything_also_without_a_supervisor(platform: Platform) -> None:
    platform.kill_supervisor()
    assert "etcd" in platform.run("down").stdout
    assert platform.home.leftovers() == {}
    assert platform.run("status", check=False).returncode == 3
    assert "Nothing was running" in platform.run("down").stdout


def test_data_and_addresses_survive_down_and_up(platform: Platform) -> None:
    layout, key = platform.home.layout(), platform.home.key()
    blob = platform.home.folder / "blobs" / "kept"
    blob.parent.mkdir(exist_ok=True)
    blob.write_text("kept")
    platform.run("down")
    with in_the_foreground(platform):
        assert platform.front_door_answers()
        assert platform.home.layout() == layout
        assert platform.home.key() == key
        assert blob.read_text() == "kept"
    assert platform.home.leftovers() == {}


@contextlib.contextmanager
def in_the_foreground(platform: Platform) -> Iterator[None]:
    """`lepton up` as in a terminal: ready at the start of the block, and ended by SIGTERM at its end."""
    command = [str(_LEPTON), "up", "--home", str(platform.home.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            assert "Lepton is ready" in process.stdout.readline()
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0


def test_a_platform_that_does_not_get_ready_says_which_part_keeps_it_and_why(tmp_path: Path) -> None:
    home = Home.at(tmp_path / "waiting")
    home.create()
    home.save_layout(Layout("http://127.0.0.1:1", "", {}, ["etcd", "gateway"], workers=1))
    home.save_part(PartState("gateway", State.WAITING, reason="it ended: address already in use"))
    message = r"Not ready after 0 s: etcd, gateway \(it ended: address already in use\)\."
    with home.locked(), pytest.raises(Unavailable, match=message):
        list(follow(home, lambda: None, 0))
