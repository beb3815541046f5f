"""Reads a run's outbox beside the process that writes it.

The connection is read-only, so a reader can neither lock the journal's writer out nor change a published row; SQLite's
write-ahead log lets both go on at once (docs/delivery.md, section 3).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from sidestep.worker.home import INDEX_FILE
from sidestep.worker.outbox import StoredEntry


class OutboxReader:
    """Entries of one run, by position.

    A journal that has no index yet is an empty outbox. A reader belongs to the thread that made it.
    """

    def __init__(self, journal: Path, run_id: str, *, busy_seconds: float = 5.0) -> None:
        """Wait up to ``busy_seconds`` for a writer that has the index to itself (while it recovers)."""
        self.run_id = run_id
        self._busy_seconds = busy_seconds
        self._index = Path(journal).resolve() / INDEX_FILE
        self._connection: sqlite3.Connection | None = None

    def after(self, position: int, limit: int, *, from_row: int = 0) -> list[StoredEntry]:
        """Return up to ``limit`` entries whose position is greater than ``position`` (-1: from the start), ascending.

        Rows and tables below row number ``from_row`` are left out. Kinds that a newer version wrote come as they are.
        Raises sqlite3.Error where the index is broken.
        """
        connection = self._connected()
        if connection is None:
            return []
        query = (
            "SELECT position, kind, row_number, payload FROM outbox WHERE run_id = ? AND position > ? "
            "AND (row_number IS NULL OR row_number >= ?) ORDER BY position LIMIT ?"
        )
        with closing(connection.execute(query, (self.run_id, position, from_row, limit))) as rows:
            return [
                StoredEntry(run_id=self.run_id, position=at, kind=kind, row_number=number, payload=bytes(payload))
                for at, kind, number, payload in rows
            ]

    def newest_position(self) -> int:
        """Return the position of the newest entry, -1 where there is none."""
        return self._number("SELECT MAX(position) FROM outbox WHERE run_id = ?", -1)

    def num_rows(self) -> int:
        """Return how many rows and tables the run has, which is the ``row_number`` of the next one."""
        query = (
            "SELECT row_number + 1 FROM outbox WHERE run_id = ? AND row_number IS NOT NULL "
            "ORDER BY position DESC LIMIT 1"
        )
        return self._number(query, 0)

    def newest_position_of(self, kind: str) -> int:
        """Return the position of the newest entry of a kind, -1 where there is none."""
        return self._number("SELECT MAX(position) FROM outbox WHERE run_id = ? AND kind = ?", -1, kind)

    def position_of_row(self, row_number: int) -> int:
        """Return where a row or table stands, -1 where there is no such row."""
        return self._number("SELECT MAX(position) FROM outbox WHERE run_id = ? AND row_number = ?", -1, row_number)

    def tables(self, from_row: int = 0) -> Iterator[StoredEntry]:
        """Yield the tables from a row number on, ascending, one by one: they may be large."""
        query = (
            "SELECT position, row_number, payload FROM outbox WHERE run_id = ? AND position >= ? AND kind = 'table' "
            "ORDER BY position"
        )
        connection, position = self._connected(), self.position_of_row(from_row)
        if connection is None or position < 0:
            return
        with closing(connection.execute(query, (self.run_id, position))) as rows:
            for at, number, payload in rows:
                yield StoredEntry(
                    run_id=self.run_id, position=at, kind="table", row_number=number, payload=bytes(payload)
                )

    def close(self) -> None:
        """Close the connection; a later call opens it again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _number(self, query: str, absent: int, *values: int | str) -> int:
        connection = self._connected()
        if connection is None:
            return absent
        with closing(connection.execute(query, (self.run_id, *values))) as rows:
            found: tuple[int | None] | None = rows.fetchone()
        return absent if found is None or found[0] is None else found[0]

    def _connected(self) -> sqlite3.Connection | None:
        if self._connection is not None:
            return self._connection
        if not self._index.is_file():
            return None
        connection = sqlite3.connect(f"file:{quote(str(self._index))}?mode=ro", uri=True, timeout=self._busy_seconds)
        try:
            known = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'outbox'").fetchone()
        except sqlite3.Error:
            connection.close()
            raise
        if known is None:
            connection.close()  # the writer is still making its tables
            return None
        self._connection = connection
        return connection
