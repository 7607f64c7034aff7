"""Decisions about samples, in SQLite: one row per sample, on the disk before the caller goes on."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..core.artifacts import member

ACTIONS = ("keep", "relabel", "drop")
FILE = "decisions.sqlite"
_OURS, _VERSION = 0x646F7074, 1  # application_id and user_version of the file
_TABLE = """CREATE TABLE decisions (
    row INTEGER PRIMARY KEY,
    action TEXT NOT NULL CHECK (action IN ('keep', 'relabel', 'drop')),
    label INTEGER CHECK ((label IS NOT NULL) = (action = 'relabel')),
    given INTEGER NOT NULL,
    time TEXT NOT NULL,
    step INTEGER NOT NULL UNIQUE,
    before TEXT
)"""
_COLUMNS = ("row", "action", "label", "given", "time", "step", "before")


@dataclass(frozen=True)
class Decision:
    """What was decided about one sample.

    Attributes:
        row: number in the data set.
        action: "keep", "relabel" or "drop".
        label: the new one, with "relabel"; else None.
        given: the label that the sample had.
        time: ISO 8601, UTC.
    """

    row: int
    action: str
    label: int | None
    given: int
    time: str


class Decisions:
    """The store of one folder. Several processes may use the same file.

    Raises:
        ValueError: the file is damaged, of another program, of a newer dataopt, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._errors():
            # Servers call from the thread of their event loop, one call at a time.
            self._db = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")  # a commit returns after fsync
            with self._transaction():
                self._open_table()

    def all(self) -> dict[int, Decision]:
        """By row, oldest first."""
        with self._errors():
            found = self._db.execute("SELECT row, action, label, given, time FROM decisions ORDER BY step")
            return {values[0]: Decision(*values) for values in found}

    def get(self, row: int) -> Decision | None:
        with self._errors():
            query = "SELECT row, action, label, given, time FROM decisions WHERE row = ?"
            found = self._db.execute(query, (row,)).fetchone()
        return Decision(*found) if found else None

    def decide(self, row: int, given: int, action: str, label: int | None = None) -> Decision:
        """Write a decision; earlier ones about the same row are kept beside it, for :meth:`undo`.

        Deciding again what holds already changes nothing.

        Raises:
            ValueError: an unknown action, or a label where none belongs, or none where one does.
        """
        if action not in ACTIONS or (label is not None) != (action == "relabel") or label == given:
            raise ValueError(
                f"action={action!r} with label={label!r}; give keep or drop alone, or relabel with another label"
            )
        decision = Decision(row, action, label, given, datetime.now(UTC).isoformat(timespec="milliseconds"))
        with self._errors(), self._transaction():
            earlier = self._db.execute("SELECT * FROM decisions WHERE row = ?", (row,)).fetchone()
            if earlier is not None and earlier[1:4] == (action, label, given):
                return Decision(*earlier[:5])
            history = [] if earlier is None else [*_history(earlier[-1]), earlier[:-1]]
            (step,) = self._db.execute("SELECT coalesce(max(step), 0) + 1 FROM decisions").fetchone()
            self._put((row, action, label, given, decision.time, step), history)
        return decision

    def undo(self) -> int | None:
        """Take the newest decision back, and return its row; what it replaced holds again. None where there is none."""
        with self._errors(), self._transaction():
            newest = self._db.execute("SELECT row, before FROM decisions ORDER BY step DESC LIMIT 1").fetchone()
            if newest is None:
                return None
            row, before = newest
            history = _history(before)
            if history:
                self._put(history.pop(), history)
            else:
                self._db.execute("DELETE FROM decisions WHERE row = ?", (row,))
            return row

    def close(self) -> None:
        self._db.close()

    def _put(self, values: Sequence[Any], history: list[Any]) -> None:
        marks = ", ".join("?" * len(_COLUMNS))
        self._db.execute(
            f"INSERT OR REPLACE INTO decisions ({', '.join(_COLUMNS)}) VALUES ({marks})",
            (*values, json.dumps(history) if history else None),
        )

    def _open_table(self) -> None:
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (owner,) = self._db.execute("PRAGMA application_id").fetchone()
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if tables and owner != _OURS:
            raise ValueError(f"{self._path} is a database of another program; move it away")
        if version > _VERSION:
            raise ValueError(f"{self._path} is of a newer dataopt (version {version}, not {_VERSION}); update dataopt")
        if not tables:
            self._db.execute(_TABLE)
            self._db.execute(f"PRAGMA application_id = {_OURS}")
            self._db.execute(f"PRAGMA user_version = {_VERSION}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as e:
            raise ValueError(f"{self._path} cannot be used ({e}); make it writable, or move it away") from e


def _history(before: str | None) -> list[Any]:
    """What a row was before, oldest first, each without its own history."""
    found = json.loads(before) if before else []
    if not found or isinstance(found[0], list):
        return found
    return [*_history(found[-1]), found[:-1]]  # as it was kept at first, one inside the other


def open_decisions(folder: Path, given: dict[int, int]) -> Decisions:
    """The decisions of a folder, checked to be about its samples.

    Args:
        given: label of every row now.

    Raises:
        ValueError: as :class:`Decisions`, or decisions about other data, or a file that is a link out of the folder.
    """
    if os.path.lexists(folder / FILE):
        member(folder, FILE)
    decisions = Decisions(folder / FILE)
    for d in decisions.all().values():
        if d.action not in ACTIONS or (type(d.label) is int) != (d.action == "relabel"):
            decisions.close()
            raise ValueError(f"{folder / FILE} is damaged: row {d.row} has action {d.action!r:.40}; move it away")
        if given.get(d.row) != d.given:
            decisions.close()
            raise ValueError(
                f"{folder / FILE} is about other data: row {d.row} had label {d.given} and has {given.get(d.row)} now; "
                "move it away"
            )
    return decisions
