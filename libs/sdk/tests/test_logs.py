import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from lepton.logs import Line, last_lines, log_files, new_lines, parse
from lepton.supervisor import cap_log


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "kafka.log").write_text("2026-01-02T10:00:01,500 WARN Broker: slow\n\tat some.Frame\n")
    (tmp_path / "worker-1.log").write_text('{"at": "2026-01-02T10:00:01.000000Z", "level": "info", "event": "one"}\n')
    (tmp_path / "worker-2.log").write_text('{"at": "2026-01-02T10:00:02.000000Z", "level": "error", "event": "two"}\n')
    return tmp_path


def test_parts_are_merged_by_time_and_frames_stay_with_their_line(folder: Path) -> None:
    lines = last_lines(log_files(folder, None), 10)
    assert [(line.part, line.text) for line in lines] == [
        ("worker-1", "one"),
        ("kafka", "WARN Broker: slow"),
        ("kafka", "\tat some.Frame"),
        ("worker-2", "two"),
    ]


def test_one_part_is_chosen_by_name_and_every_worker_by_worker(folder: Path) -> None:
    assert list(log_files(folder, "kafka")) == ["kafka"]
    assert list(log_files(folder, "worker")) == ["worker-1", "worker-2"]
    assert log_files(folder, "work") == {}


def test_only_the_last_lines_are_shown(folder: Path) -> None:
    (folder / "kafka.log").write_text("".join(f"line {number}\n" for number in range(1000)))
    assert [line.text for line in last_lines(log_files(folder, "kafka"), 2)] == ["line 998", "line 999"]
    assert last_lines(log_files(folder, "kafka"), 0) == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            '{"at": "2026-01-02T10:00:01.5Z", "level": "warning", "event": "slow", "model": "m", "ms": 3}',
            Line("2026-01-02 10:00:01.5", "p", "warning", "slow model=m ms=3"),
        ),
        (
            '{"level":"warn","ts":"2026-01-02T10:00:01.5+0100","caller":"a.go:1","msg":"took long"}',
            Line("2026-01-02 10:00:01.5", "p", "warn", "took long"),
        ),
        ('{"event": "failed", "exception": "Trace\\nback"}', Line("", "p", "info", "failed\nTrace\nback")),
        (
            "2026-01-02 10:00:01.5 UTC [7] ERROR:  relation",
            Line("2026-01-02 10:00:01.5", "p", "error", "[7] ERROR:  relation"),
        ),
        (
            "[2026-01-02 10:00:01.5][7][warning][main] x",
            Line("2026-01-02 10:00:01.5", "p", "warning", "[7][warning][main] x"),
        ),
        ("{not json", Line("", "p", "info", "{not json")),
        ("", Line("", "p", "info", "")),
    ],
)
def test_line_of_any_part_is_readable(text: str, line: Line) -> None:
    assert parse("p", text) == line


def test_following_shows_what_is_written_also_after_the_log_was_capped(folder: Path) -> None:
    log = folder / "kafka.log"
    lines = new_lines(log_files(folder, "kafka"))
    first = Awaited(lines)
    with log.open("a") as out:
        out.write("new\n")
    assert first() == "new"
    os.truncate(log, 0)
    second = Awaited(lines)
    with log.open("a") as out:
        out.write("short\n")
    assert second() == "short"


def test_long_log_is_kept_once_and_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"before")
        cap_log(log, limit_bytes=100)
        assert log.read_bytes() == b"before"
        cap_log(log, limit_bytes=5)
        writer.write(b"after")
    assert (tmp_path / "a.log.1").read_bytes() == b"before"
    assert log.read_bytes() == b"after"
    cap_log(tmp_path / "missing.log")


class Awaited:
    """The next line's text, awaited in a thread of its own."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._found: list[str] = []
        self._thread = threading.Thread(target=lambda: self._found.append(next(lines).text), daemon=True)
        self._thread.start()

    def __call__(self) -> str:
        self._thread.join(20)
        return self._found[0]
