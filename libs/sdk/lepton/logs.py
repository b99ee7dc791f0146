"""The platform's log files as one readable stream: parts merged by time, JSON lines as text."""

import contextlib
import heapq
import json
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_TIME = re.compile(r"\[?(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)([.,]\d+)?Z?\]?( UTC)? ?")
_POLL_S = 0.2
# Keys that have a place of their own in a line, by what the parts call them.
_MESSAGE, _LEVEL = ("event", "msg", "message"), ("level", "severity")
_HIDDEN = {"at", "ts", "timestamp", "service", "caller", "logger"}


@dataclass(frozen=True, slots=True, order=True)
class Line:
    """One line of a part's log. `at` is "YYYY-MM-DD HH:MM:SS.ffffff" or "" when the line has no time of its own."""

    at: str
    part: str
    level: str
    text: str


def log_files(folder: Path, service: str | None) -> dict[str, Path]:
    """The log files by part; those of `service` only, where `worker` means every worker."""
    files = {path.stem: path for path in sorted(folder.glob("*.log"))}
    if service is None:
        return files
    return {part: path for part, path in files.items() if part == service or part.startswith(f"{service}-")}


def last_lines(files: dict[str, Path], count: int) -> list[Line]:
    """The last `count` lines of each file, merged by time; a line without one stays behind the line before it."""
    return list(
        heapq.merge(*(_timed(part, _tail(path, count)) for part, path in files.items()), key=lambda line: line.at)
    )


def new_lines(files: dict[str, Path]) -> Iterator[Line]:
    """The lines that are written after this call, for ever."""
    return _follow(files, {part: _size(path) for part, path in files.items()})


def _follow(files: dict[str, Path], offsets: dict[str, int]) -> Iterator[Line]:
    while True:
        for part, path in files.items():
            size = _size(path)
            if size < offsets[part]:
                offsets[part] = 0  # The file was capped.
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                file.seek(offsets[part])
                data = file.read(size - offsets[part])
                whole, newline, _ = data.rpartition(b"\n")
                offsets[part] += len(whole) + len(newline)
                yield from (parse(part, line) for line in whole.decode(errors="replace").splitlines())
        time.sleep(_POLL_S)


def parse(part: str, text: str) -> Line:
    """A line of a log. Of a JSON object the message comes first, then the other fields as key=value."""
    found = _TIME.search(text[:200])
    at = f"{found[1]} {found[2]}{(found[3] or '').replace(',', '.')}" if found else ""
    fields = _json_object(text)
    if fields is None:
        # Its own time is shown once, at the start of the line.
        return Line(at, part, _level_in(text), text[found.end() :] if found and found.start() == 0 else text)
    message = next((str(fields.pop(key)) for key in _MESSAGE if key in fields), "")
    level = next((str(fields.pop(key)) for key in _LEVEL if key in fields), "info")
    traceback = str(fields.pop("exception", ""))
    rest = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in fields.items()
        if key not in _HIDDEN
    ]
    return Line(at, part, level.lower(), " ".join([message, *rest]) + (f"\n{traceback}" if traceback else ""))


def _json_object(text: str) -> dict[str, object] | None:
    if not text.startswith("{"):
        return None
    try:
        content = json.loads(text)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _level_in(text: str) -> str:
    """The level that a line of Kafka, PostgreSQL or Envoy names near its start."""
    found = re.search(r"\b(debug|info|warn(?:ing)?|error|critical|fatal|panic)\b", text[:120], re.IGNORECASE)
    return found[1].lower() if found else "info"


def _timed(part: str, lines: Iterable[str]) -> Iterator[Line]:
    at = ""
    for text in lines:
        line = parse(part, text)
        at = line.at or at
        yield Line(at, line.part, line.level, line.text)


def _tail(path: Path, count: int) -> list[str]:
    """The last `count` lines, of the last 2 MB at most."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(0, _size(path) - 2_000_000))
        return file.read().decode(errors="replace").splitlines()[-count:] if count else []
    return []


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0
