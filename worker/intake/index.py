"""The journal's index: who spoke, what closed, the projection's state and the outbox (docs/delivery.md, 3 and 7).

One SQLite file, one connection, shared by the worker's threads under a lock; every writing method is one transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidestep.worker.errors import JournalDamageError, JournalError
from sidestep.worker.intake.database import Database, damage_text, is_damage
from sidestep.worker.intake.decision_tables import DECISION_TABLES, write_decision
from sidestep.worker.intake.decisions import (
    Closure,
    ContextRecord,
    Decision,
    Ending,
    Incarnation,
    Loss,
    Rewind,
    State,
    context_of_row,
    ending_of_row,
    loss_of_row,
    rewind_of_row,
    step_closing_of_row,
)
from sidestep.worker.intake.schema import ADD_LAST_ARRIVALS, INDEX_SCHEMA, READABLE_SCHEMAS, SCHEMA_VERSION
from sidestep.worker.intake.segment_table import SegmentTable
from sidestep.worker.intake.state_history import PIECES_QUERY, SNAPSHOT_MARK, write_pieces
from sidestep.worker.outbox import NUMBERED_KINDS, OutboxEntry, StoredEntry
from sidestep.worker.records import StepClosing


@dataclass(slots=True)
class _Counters:
    position: int = 0
    row_number: int = 0
    closed_number: int = 0


class Index:
    """The index of one journal."""

    def __init__(self, path: Path, *, read_only: bool = False, shared_log: bool = True) -> None:
        """Open or make it; ``shared_log`` as ``connect`` has it.

        Raises:
            JournalDamageError: it is broken; the text says what to do.
            JournalError: it cannot be opened, or is of a schema that this version does not know.
        """
        self.path = path
        try:
            self.database = Database(path, read_only=read_only, shared_log=shared_log)
        except JournalDamageError as error:
            raise JournalDamageError(damage_text(path, error)) from error
        self._lock = self.database.lock
        self._connection = self.database.connection
        self._counters: dict[str, _Counters] = {}
        try:
            self._open(is_writer=not read_only)
            self._tables = {str(name) for (name,) in self._rows("SELECT name FROM sqlite_master")}
            self.segments = SegmentTable(self.database)
        except BaseException as error:
            self.database.close()
            if isinstance(error, sqlite3.Error) and is_damage(error):
                raise JournalDamageError(damage_text(path, error)) from error
            if isinstance(error, (sqlite3.Error, TypeError)):
                raise JournalError(f"{path} is not a journal's index: {error}") from error
            raise

    def _open(self, *, is_writer: bool) -> None:
        tables = {name for (name,) in self._connection.execute("SELECT name FROM sqlite_master")}
        version = SCHEMA_VERSION
        if "meta" in tables or not is_writer:
            (version,) = self._connection.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
        if version not in READABLE_SCHEMAS:
            raise JournalError(
                f"{self.path} has schema {version}, this version of sidestep knows {' and '.join(READABLE_SCHEMAS)}"
            )
        if is_writer:
            if version == "1" and "stream_range" in tables:
                self._connection.execute(ADD_LAST_ARRIVALS)
            self._connection.executescript(f"BEGIN; {INDEX_SCHEMA} COMMIT;")  # one commit, not one for each table
            self._connection.execute(
                "UPDATE meta SET value = ? WHERE key = 'schema' AND value <> ?1", (SCHEMA_VERSION,)
            )

    @property
    def shared_log(self) -> bool:
        """Whether it has a write-ahead log."""
        return str(self._connection.execute("PRAGMA journal_mode").fetchone()[0]) == "wal"

    def close(self) -> None:
        """Close the file; the last one to do so folds the write-ahead log in."""
        self.database.close()

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        return self.database.rows(query, *values)

    # ------------------------------------------------------------------------------------------------ who spoke

    def add_hello(self, made: Incarnation, rank: int, received_at: float, body: bytes) -> Incarnation:
        """Store a rank's Hello; the first of an incarnation gives it the run's next attempt. Idempotent.

        Raises:
            JournalWriteError: nothing was stored.
        """

        def block(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT OR IGNORE INTO run(run_id, created_at) VALUES (?, ?)", (made.run_id, made.first_seen)
            )
            connection.execute(
                "INSERT OR IGNORE INTO incarnation SELECT ?, ?, COUNT(*), ?, ?, ? FROM incarnation WHERE run_id = ?",
                (made.incarnation, made.run_id, made.first_seen, made.world_size, made.start_step, made.run_id),
            )
            connection.execute(
                "INSERT OR IGNORE INTO hello VALUES (?, ?, ?, ?)", (made.incarnation, rank, received_at, body)
            )

        self.database.write(block)
        return next(each for each in self.incarnations(made.run_id) if each.incarnation == made.incarnation)

    def add_blob(self, digest: str, content: bytes, received_at: float) -> None:
        """Store a table. Idempotent.

        Raises:
            JournalWriteError: nothing was stored.
        """
        values = (digest, content, received_at)
        self.database.write(lambda made: made.execute("INSERT OR IGNORE INTO blob VALUES (?, ?, ?)", values))

    def runs(self) -> list[str]:
        """Return the runs, the oldest first."""
        return [str(run_id) for (run_id,) in self._rows("SELECT run_id FROM run ORDER BY rowid")]

    def incarnations(self, run_id: str | None = None) -> list[Incarnation]:
        """Return the incarnations of a run, or of all, by attempt."""
        rows = self._rows(
            "SELECT incarnation, run_id, attempt, first_seen, world_size, start_step FROM incarnation"
            " WHERE run_id = ? OR ? IS NULL ORDER BY run_id, attempt",
            run_id,
            run_id,
        )
        names = ("incarnation", "run_id", "attempt", "first_seen", "world_size", "start_step")
        return [Incarnation(**dict(zip(names, row, strict=True))) for row in rows]

    def hellos(self, incarnation: str) -> dict[int, bytes]:
        """Return rank to the frame of its Hello."""
        rows = self._rows("SELECT rank, body FROM hello WHERE incarnation = ? ORDER BY rank", incarnation)
        return {int(rank): bytes(body) for rank, body in rows}

    def num_hellos(self, incarnation: str) -> int:
        """Return how many ranks' Hellos are here; they are not read."""
        return int(self._rows("SELECT COUNT(*) FROM hello WHERE incarnation = ?", incarnation)[0][0])

    def hello_arrivals(self, incarnation: str) -> dict[int, tuple[float, bytes]]:
        """Return rank to when its Hello came, in unix seconds, and the frame of it."""
        query = "SELECT rank, received_at, body FROM hello WHERE incarnation = ? ORDER BY rank"
        return {int(rank): (float(at), bytes(body)) for rank, at, body in self._rows(query, incarnation)}

    def blob(self, digest: str) -> bytes | None:
        """Return a table's bytes, or None where it has not come yet."""
        rows = self._rows("SELECT content FROM blob WHERE digest = ?", digest)
        return bytes(rows[0][0]) if rows else None

    def blob_digests(self) -> set[str]:
        """Return the digests of all tables that are here."""
        return {str(digest) for (digest,) in self._rows("SELECT digest FROM blob")}

    # ------------------------------------------------------------------------------------------------ what closed

    def _counters_of(self, run_id: str) -> _Counters:
        if run_id not in self._counters:
            rows = self._rows(
                "SELECT COALESCE(MAX(position) + 1, 0), COUNT(row_number) FROM outbox WHERE run_id = ?", run_id
            )
            tables = [name for name in DECISION_TABLES if name in self._tables]
            each = " UNION ALL ".join(f"SELECT closed_number AS n FROM {name} WHERE run_id = ?1" for name in tables)  # noqa: S608
            numbers = self._rows(f"SELECT COALESCE(MAX(n) + 1, 0) FROM ({each})", run_id)  # noqa: S608
            (position, row_number), ((closed_number,),) = rows[0], numbers
            self._counters[run_id] = _Counters(int(position), int(row_number), int(closed_number))
        return self._counters[run_id]

    def next_closed_number(self, run_id: str) -> int:
        """Return the number that the run's next closing gets."""
        with self._lock:
            return self._counters_of(run_id).closed_number

    def write(self, run_id: str, closures: Sequence[Closure], state: bytes | None = None) -> list[StoredEntry]:
        """Store closings, their entries and the projection's state after the last one, in ONE transaction.

        Returns the entries with their places. Raises JournalWriteError: nothing was stored, try again.
        """
        with self._lock:
            before = self._counters_of(run_id)

            def block(connection: sqlite3.Connection) -> tuple[_Counters, list[StoredEntry]]:
                counters = _Counters(before.position, before.row_number, before.closed_number)
                stored: list[StoredEntry] = []
                for closure in closures:
                    write_decision(connection, run_id, counters.closed_number, closure)
                    write_pieces(connection, run_id, counters.closed_number, closure.pieces)
                    counters.closed_number += 1
                    stored += self._write_entries(connection, run_id, counters, closure.entries)
                if state is not None:
                    _write_state(connection, run_id, closures[-1].closing, counters.closed_number - 1, state)
                return counters, stored

            self._counters[run_id], entries = self.database.write(block)
            return list(entries)

    @staticmethod
    def _write_entries(
        connection: sqlite3.Connection, run_id: str, counters: _Counters, entries: Sequence[OutboxEntry]
    ) -> list[StoredEntry]:
        stored = []
        for made in entries:
            row_number = counters.row_number if made.kind in NUMBERED_KINDS else None
            stored.append(
                StoredEntry(
                    run_id=run_id,
                    position=counters.position,
                    kind=made.kind,
                    row_number=row_number,
                    payload=made.payload,
                )
            )
            counters.position += 1
            counters.row_number += row_number is not None
        connection.executemany(
            "INSERT INTO outbox VALUES (?, ?, ?, ?, ?)",
            [(e.run_id, e.position, e.kind, e.row_number, e.payload) for e in stored],
        )
        return stored

    def closings(self, run_id: str, first: int = 0, last: int = 1 << 62) -> list[Decision]:
        """Return the run's recorded decisions from number ``first`` to ``last``, in the order they were made."""
        condition = "WHERE run_id = ? AND closed_number BETWEEN ? AND ?"
        made: list[Decision] = []
        for table, decision_of in DECISION_TABLES.items():
            if table not in self._tables:
                continue  # of an older version, opened for reading
            rows = self._rows(f"SELECT * FROM {table} {condition}", run_id, first, last)  # noqa: S608  (the names above)
            made += [decision_of(row) for row in rows]
        return sorted(made, key=lambda each: each.closed_number)

    def last_step_closing(self, run_id: str, attempt: int) -> StepClosing | None:
        """Return the attempt's newest closing of a step."""
        rows = self._rows(
            "SELECT * FROM step_closed WHERE run_id = ? AND attempt = ? AND reason <> 'tail'"
            " ORDER BY step DESC LIMIT 1",
            run_id,
            attempt,
        )
        return step_closing_of_row(rows[0]) if rows else None

    def pending_arrival(self, run_id: str) -> int:
        """Return the arrival number before which all of the run's messages are accounted for."""
        rows = self._rows(
            "SELECT closed_number, pending_arrival FROM step_closed WHERE run_id = ?1 UNION ALL"
            " SELECT closed_number, pending_arrival FROM ending WHERE run_id = ?1 ORDER BY closed_number DESC LIMIT 1",
            run_id,
        )
        return int(rows[0][1]) if rows else 0

    def closings_using(self, run_id: str, arrival: int) -> list[StepClosing]:
        """Return the closings that used a message of this arrival number or a later one."""
        rows = self._rows(
            "SELECT * FROM step_closed WHERE run_id = ? AND last_arrival >= ? ORDER BY closed_number", run_id, arrival
        )
        return [step_closing_of_row(row) for row in rows]

    def contexts(self, run_id: str) -> list[ContextRecord]:
        """Return the contexts that the run was projected with, in the order they were taken up."""
        rows = self._rows("SELECT * FROM context WHERE run_id = ? ORDER BY closed_number", run_id)
        return [context_of_row(row) for row in rows]

    def endings(self, run_id: str) -> list[Ending]:
        """Return the recorded ends of the run's attempts, in the order they were recorded."""
        rows = self._rows("SELECT * FROM ending WHERE run_id = ? ORDER BY closed_number", run_id)
        return [ending_of_row(row) for row in rows]

    def losses(self, run_id: str) -> list[Loss]:
        """Return what the run was told of broken files, in the order it was told."""
        if "loss" not in self._tables:
            return []
        rows = self._rows("SELECT * FROM loss WHERE run_id = ? ORDER BY closed_number", run_id)
        return [loss_of_row(row) for row in rows]

    def ended_attempts(self) -> set[tuple[str, int]]:
        """Return (run, attempt) of all recorded ends."""
        return {(str(run_id), int(attempt)) for run_id, attempt in self._rows("SELECT run_id, attempt FROM ending")}

    def state(self, run_id: str) -> State | None:
        """Return the run's projection as it was after the newest closing, None where there was none."""
        rows = self._rows(
            "SELECT closed_number, attempt, step, body FROM state WHERE run_id = ? AND name = 'projection'", run_id
        )
        return State(**dict(zip(("closed_number", "attempt", "step", "body"), rows[0], strict=True))) if rows else None

    def pieces(self, run_id: str, closed_number: int = 1 << 62) -> dict[str, bytes]:
        """Return the projection's state after a closing (the newest, or a snapshot), in pieces; empty for none."""
        return {str(name): bytes(body) for name, body in self._rows(PIECES_QUERY, run_id, closed_number)}

    def has_snapshot(self, run_id: str, closed_number: int) -> bool:
        """Return whether the state after this closing was taken."""
        query = "SELECT 1 FROM state_piece WHERE run_id = ? AND name = ? AND closed_number = ?"
        return bool(self._rows(query, run_id, SNAPSHOT_MARK, closed_number))

    def newest_step_closing(self, run_id: str, before: int | None = None) -> tuple[int, int, int] | None:
        """Return the run's newest closing of a step, as (closed number, attempt, step); None for none.

        With ``before``, the newest one of the largest step that is smaller.
        """
        query = "SELECT closed_number, attempt, step FROM step_closed WHERE run_id = ?1 AND reason <> 'tail'"
        if before is None:
            rows = self._rows(f"{query} ORDER BY closed_number DESC LIMIT 1", run_id)
        else:
            query = f"{query} AND step < ?2 ORDER BY step DESC, closed_number DESC LIMIT 1"
            rows = self._rows(query, run_id, before)
        return (int(rows[0][0]), int(rows[0][1]), int(rows[0][2])) if rows else None

    def newest_attempt(self, run_id: str) -> int:
        """Return the newest attempt of which a step has closed, -1 for none."""
        rows = self._rows("SELECT MAX(attempt) FROM step_closed WHERE run_id = ? AND reason <> 'tail'", run_id)
        return -1 if rows[0][0] is None else int(rows[0][0])

    def newest_step_until(self, run_id: str, closed_number: int) -> int | None:
        """Return the step of the newest closing of a step up to a number, None for none."""
        rows = self._rows(
            "SELECT step FROM step_closed WHERE run_id = ? AND reason <> 'tail' AND closed_number <= ?"
            " ORDER BY closed_number DESC LIMIT 1",
            run_id,
            closed_number,
        )
        return int(rows[0][0]) if rows else None

    def count_steps(self, run_id: str, first: int, last: int) -> int:
        """Return how many of the closings from number ``first`` to ``last`` are of steps."""
        query = "SELECT COUNT(*) FROM step_closed WHERE run_id = ? AND closed_number BETWEEN ? AND ?"
        return int(self._rows(query, run_id, first, last)[0][0])

    def closings_with_late_parts(self, run_id: str, after: int) -> list[StepClosing]:
        """Return later closings of closing ``after``'s attempt that counted messages of earlier steps."""
        rows = self._rows(
            "SELECT * FROM step_closed WHERE run_id = ?1 AND closed_number > ?2 AND LENGTH(late_parts) > 0 AND"
            " attempt = (SELECT attempt FROM step_closed WHERE run_id = ?1 AND closed_number = ?2)"
            " ORDER BY closed_number",
            run_id,
            after,
        )
        return [step_closing_of_row(row) for row in rows]

    def rewinds(self, run_id: str) -> list[Rewind]:
        """Return where the run's trainers went back to, in the order they did."""
        rows = self._rows("SELECT * FROM rewind WHERE run_id = ? ORDER BY closed_number", run_id)
        return [rewind_of_row(row) for row in rows]

    # ------------------------------------------------------------------------------------------------ outbox, segments

    def outbox(self, run_id: str, first: int = 0, limit: int = 1_000) -> list[StoredEntry]:
        """Return up to ``limit`` entries of the run from position ``first`` on."""
        rows = self._rows(
            "SELECT run_id, position, kind, row_number, payload FROM outbox WHERE run_id = ? AND position >= ?"
            " ORDER BY position LIMIT ?",
            run_id,
            first,
            limit,
        )
        names = ("run_id", "position", "kind", "row_number", "payload")
        return [StoredEntry(**dict(zip(names, row, strict=True))) for row in rows]

    def entries_of_rows(self, run_id: str, row_numbers: Sequence[int]) -> tuple[OutboxEntry, ...]:
        """Return the run's rows and tables of these numbers, as entries that may be written once more."""
        found = []
        for row_number in row_numbers:
            query = "SELECT kind, payload FROM outbox WHERE run_id = ? AND row_number = ?"
            found += [
                OutboxEntry(kind=kind, payload=payload) for kind, payload in self._rows(query, run_id, row_number)
            ]
        return tuple(found)


def _write_state(
    connection: sqlite3.Connection, run_id: str, closing: Decision, closed_number: int, body: bytes
) -> None:
    step = closing.step if isinstance(closing, StepClosing) else -1
    connection.execute(
        "INSERT OR REPLACE INTO state VALUES (?, 'projection', ?, ?, ?, ?)",
        (run_id, closed_number, closing.attempt, step, body),
    )
