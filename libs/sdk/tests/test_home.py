import fcntl
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from lepton.errors import Conflict, LeptonError
from lepton.home import Home, Layout, PartState, State
from lepton.processes import Identity

LAYOUT = Layout("http://127.0.0.1:8080", "127.0.0.1:9092", {"front": 8080}, ["etcd", "envoy"], workers=2)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home.at(tmp_path / "home")
    home.create()
    return home


def test_folder_is_closed_to_other_accounts(home: Home) -> None:
    assert stat.S_IMODE(home.folder.stat().st_mode) == 0o700


def test_folder_that_cannot_be_made_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LeptonError, match="--home DIR"):
        Home.at(tmp_path / "file").create()


def test_layout_reads_back_as_saved(home: Home) -> None:
    assert home.layout() is None
    home.save_layout(LAYOUT)
    assert home.layout() == LAYOUT


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "{}", '{"url": 1}', '{"ports": [], "parts": 3}', "\x00\xff"]
)
def test_damaged_platform_file_counts_as_none(home: Home, content: str) -> None:
    (home.folder / "platform.json").write_text(content)
    assert home.layout() is None


def test_part_reads_back_as_saved(home: Home) -> None:
    state = PartState("etcd", State.READY, 123, 1.5, 0.4, 2, "")
    home.save_part(state)
    assert home.part("etcd") == state
    assert home.parts() == [state]
    home.forget_part("etcd")
    assert home.parts() == []


@pytest.mark.parametrize("content", ["", "{}", '{"name": "etcd", "state": "flying"}', '{"name": "etcd", "wings": 2}'])
def test_damaged_part_file_counts_as_none(home: Home, content: str) -> None:
    (home.folder / "run" / "etcd.json").write_text(content)
    assert home.part("etcd") is None
    assert home.parts() == []


def test_part_is_ready_only_while_its_process_lives(home: Home) -> None:
    mine = Identity.of(psutil.Process())
    assert PartState("etcd", State.READY, mine.pid, mine.started).is_ready
    assert not PartState("etcd", State.STARTING, mine.pid, mine.started).is_ready
    assert not PartState("etcd", State.READY, mine.pid, mine.started - 60).is_ready
    assert not PartState("etcd", State.READY).is_ready


def test_recorded_parts_that_still_run_are_leftovers(home: Home) -> None:
    mine = Identity.of(psutil.Process())
    home.save_part(PartState("etcd", State.READY, mine.pid, mine.started))
    home.save_part(PartState("kafka", State.READY, mine.pid, mine.started - 60))
    home.save_part(PartState("envoy", State.STOPPED))
    assert home.leftovers() == {"etcd": mine}


def test_only_one_process_at_a_time_runs_the_platform(home: Home) -> None:
    assert home.supervisor_pid() is None
    with home.locked():
        assert home.supervisor_pid() == os.getpid()
        with pytest.raises(Conflict, match="already"), home.locked():
            pass
    assert home.supervisor_pid() is None


def test_looking_for_the_supervisor_keeps_none_from_starting(home: Home) -> None:
    looking = (home.folder / "lock").open("a+")
    fcntl.flock(looking, fcntl.LOCK_SH)
    end = threading.Timer(0.02, looking.close)
    end.start()
    with home.locked():
        assert looking.closed
    end.join()


def test_lock_ends_with_the_process_that_held_it(home: Home) -> None:
    code = f"""
import os, signal
from pathlib import Path
from lepton.home import Home
with Home.at(Path({str(home.folder)!r})).locked():
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -9
    assert home.supervisor_pid() is None
    with home.locked():
        pass
