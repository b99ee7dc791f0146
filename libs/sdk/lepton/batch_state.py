"""What a batch job knows of itself beside its output: what was answered, and how far the answers were read.

One SQLite file; every step is one transaction, so a job that was killed goes on from the last of them.
"""

import json
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lepton.errors import Conflict, LeptonError

# By topic and partition: the offset of the first message that was not read yet.
Positions = Mapping[tuple[str, int], int]

_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answers (
    piece INTEGER PRIMARY KEY, status INTEGER NOT NULL, head_bytes INTEGER NOT NULL, body BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS positions (
    topic TEXT, number INTEGER, next INTEGER NOT NULL, PRIMARY KEY (topic, number)
);
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request, which asks for the rows of one piece, came to. `head_bytes` is the length of the JSON before
    binary tensors, 0 where there are none."""

    piece: int
    status: int
    head_bytes: int
    body: bytes


class State:
    """A job's file, which this process alone has open."""

    def __init__(self, path: Path) -> None:
        """Raises Conflict when another process has it, LeptonError when it is something else."""
        self._db = sqlite3.connect(path, isolation_level=None, timeout=0.5)
        try:
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("BEGIN EXCLUSIVE")
            self._db.execute("COMMIT")
            self._db.executescript(_TABLES)
        except sqlite3.OperationalError as error:
            self._db.close()
            raise Conflict(f"Another `lepton batch` works on {path} ({error}).", hint="Let it finish.") from error
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise LeptonError(f"{path} is no batch job's file: {error}.", hint="Remove it to start anew.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._db.close()

    def fact(self, name: str) -> Any:
        """What `note` was told under the name; None when it was not."""
        found = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if found is None else json.loads(found[0])

    def note(self, **facts: object) -> None:
        """They are remembered, all or none."""
        self._db.execute("BEGIN")
        values = [(name, json.dumps(value)) for name, value in facts.items()]
        self._db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", values)
        self._db.execute("COMMIT")

    def begin(self, positions: Positions, **facts: object) -> None:
        """A new job, of which nothing is answered yet."""
        self._db.execute("BEGIN")
        for table in ("facts", "answers", "positions"):
            self._db.execute(f"DELETE FROM {table}")  # noqa: S608 - own names
        values = [(name, json.dumps(value)) for name, value in facts.items()]
        self._db.executemany("INSERT INTO facts VALUES (?, ?)", values)
        self._move_to(positions)
        self._db.execute("COMMIT")

    def keep(self, answers: Iterable[Answer], positions: Positions) -> None:
        """The answers are kept, the first to each piece, and the positions are where reading goes on."""
        self._db.execute("BEGIN")
        rows = [(each.piece, each.status, each.head_bytes, each.body) for each in answers]
        self._db.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", rows)
        self._move_to(positions)
        self._db.execute("COMMIT")

    def positions(self) -> dict[tuple[str, int], int]:
        found = self._db.execute("SELECT topic, number, next FROM positions")
        return {(topic, number): following for topic, number, following in found}

    def answered(self) -> set[int]:
        return {piece for (piece,) in self._db.execute("SELECT piece FROM answers")}

    def get(self, piece: int) -> Answer:
        """The answer to a piece that has one."""
        found = self._db.execute("SELECT piece, status, head_bytes, body FROM answers WHERE piece = ?", (piece,))
        return Answer(*found.fetchone())

    def forget_failures(self, attempt: int) -> None:
        """What failed is asked again, under this attempt's number."""
        self._db.execute("BEGIN")
        self._db.execute("DELETE FROM answers WHERE status <> 200")
        self._db.executemany(
            "INSERT OR REPLACE INTO facts VALUES (?, ?)", [("attempt", json.dumps(attempt)), ("summary", "null")]
        )
        self._db.execute("COMMIT")

    def forget_answers(self) -> None:
        """The facts are left: the answers are in the output."""
        self._db.execute("DELETE FROM answers")
        self._db.execute("VACUUM")

    def _move_to(self, positions: Positions) -> None:
        rows = [(topic, number, following) for (topic, number), following in positions.items()]
        self._db.executemany("INSERT OR REPLACE INTO positions VALUES (?, ?, ?)", rows)
