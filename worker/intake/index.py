"""The journal's index: who spoke, what closed, the projection's state and the outbox (docs/delivery.md, 3 and 7).

One SQLite file, one connection, shared by the worker's threads under a lock; every writing method is one transaction.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidestep.worker.errors import JournalError
from sidestep.worker.intake.database import connect, transaction
from sidestep.worker.intake.decisions import (
    Closure,
    ContextRecord,
    Decision,
    Ending,
    Incarnation,
    Repeat,
    Rewind,
    State,
    context_of_row,
    ending_of_row,
    repeat_of_row,
    rewind_of_row,
    step_closing_of_row,
)
from sidestep.worker.intake.schema import INDEX_SCHEMA, SCHEMA_VERSION, pack_pairs
from sidestep.worker.intake.state_history import PIECES_QUERY, write_pieces
from sidestep.worker.outbox import NUMBERED_KINDS, OutboxEntry, StoredEntry
from sidestep.worker.records import StepClosing


@dataclass(slots=True)
class _Counters:
    position: int = 0
    row_number: int = 0
    closed_number: int = 0


class Index:
    """The index of one journal."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open or make it.

        Raises:
            JournalError: it cannot be opened, or is of a schema that this version does not know.
        """
        self.path = path
        self._lock = threading.RLock()
        self._connection = connect(path, read_only=read_only)
        self._counters: dict[str, _Counters] = {}
        try:
            if not read_only:
                self._connection.executescript(INDEX_SCHEMA)
            (version,) = self._connection.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
        except (sqlite3.Error, TypeError) as error:
            self._connection.close()
            raise JournalError(f"{path} is not a journal's index: {error}") from error
        if version != SCHEMA_VERSION:
            self._connection.close()
            raise JournalError(f"{path} has schema {version}, this version of sidestep knows {SCHEMA_VERSION}")

    def close(self) -> None:
        """Close the file; the last one to do so folds the write-ahead log in."""
        with self._lock:
            self._connection.close()

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    # ------------------------------------------------------------------------------------------------ who spoke

    def add_hello(self, made: Incarnation, rank: int, received_at: float, body: bytes) -> Incarnation:
        """Store a rank's Hello; the first of an incarnation gives it the run's next attempt. Idempotent.

        Raises:
            JournalWriteError: nothing was stored.
        """
        with self._lock, transaction(self._connection) as connection:
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
        return next(each for each in self.incarnations(made.run_id) if each.incarnation == made.incarnation)

    def add_blob(self, digest: str, content: bytes, received_at: float) -> None:
        """Store a table. Idempotent.

        Raises:
            JournalWriteError: nothing was stored.
        """
        with self._lock, transaction(self._connection) as connection:
            connection.execute("INSERT OR IGNORE INTO blob VALUES (?, ?, ?)", (digest, content, received_at))

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
            numbers = self._rows(
                "SELECT MAX(n) + 1 FROM (SELECT -1 AS n"
                " UNION ALL SELECT closed_number FROM step_closed WHERE run_id = ?"
                " UNION ALL SELECT closed_number FROM ending WHERE run_id = ?"
                " UNION ALL SELECT closed_number FROM context WHERE run_id = ?"
                " UNION ALL SELECT closed_number FROM repeat WHERE run_id = ?"
                " UNION ALL SELECT closed_number FROM rewind WHERE run_id = ?)",
                run_id,
                run_id,
                run_id,
                run_id,
                run_id,
            )
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
            counters = _Counters(before.position, before.row_number, before.closed_number)
            stored: list[StoredEntry] = []
            with transaction(self._connection) as connection:
                for closure in closures:
                    stored += self._write_one(connection, run_id, counters, closure)
                if state is not None:
                    _write_state(connection, run_id, closures[-1].closing, counters.closed_number - 1, state)
            self._counters[run_id] = counters
            return stored

    def _write_one(
        self, connection: sqlite3.Connection, run_id: str, counters: _Counters, closure: Closure
    ) -> list[StoredEntry]:
        number, closing = counters.closed_number, closure.closing
        counters.closed_number += 1
        if isinstance(closing, StepClosing):
            connection.execute(
                "INSERT INTO step_closed VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    run_id, closing.attempt, closing.step, closing.reason, closing.incarnation,
                    pack_pairs(closing.parts), pack_pairs(closing.late_parts), closing.ranks_expected,
                    number, closure.pending_arrival, closure.last_arrival,
                ),
            )  # fmt: skip
        elif isinstance(closing, Ending):
            connection.execute(
                "INSERT INTO ending VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    run_id, closing.attempt, number, closing.exit_code, closing.reason, int(closing.tail_unknown),
                    closing.unix_time, closing.newest_step, closure.pending_arrival,
                ),
            )  # fmt: skip
        elif isinstance(closing, Repeat):
            rows = pack_pairs([(row_number, 0) for row_number in closing.row_numbers])
            connection.execute("INSERT INTO repeat VALUES (?, ?, ?, ?)", (run_id, closing.attempt, number, rows))
        elif isinstance(closing, Rewind):
            connection.execute(
                "INSERT INTO rewind VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    run_id, closing.attempt, number, closing.step,
                    closing.source_number, closing.snapshot_number, int(closing.is_exact),
                ),
            )  # fmt: skip
        else:
            ranks = pack_pairs([(rank, 0) for rank in closing.ranks])
            connection.execute(
                "INSERT INTO context VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    run_id,
                    closing.attempt,
                    closing.revision,
                    number,
                    closing.incarnation,
                    ranks,
                    " ".join(closing.missing),
                ),
            )
        write_pieces(connection, run_id, number, closure.pieces)
        return self._write_entries(connection, run_id, counters, closure.entries)

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
        for table, decision_of in (
            ("step_closed", step_closing_of_row),
            ("ending", ending_of_row),
            ("context", context_of_row),
            ("repeat", repeat_of_row),
            ("rewind", rewind_of_row),
        ):
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

    def state(self, run_id: str) -> State | None:
        """Return the run's projection as it was after the newest closing, None where there was none."""
        rows = self._rows(
            "SELECT closed_number, attempt, step, body FROM state WHERE run_id = ? AND name = 'projection'", run_id
        )
        return State(**dict(zip(("closed_number", "attempt", "step", "body"), rows[0], strict=True))) if rows else None

    def pieces(self, run_id: str, closed_number: int = 1 << 62) -> dict[str, bytes]:
        """Return the projection's state after a closing (the newest, or a snapshot), in pieces; empty for none."""
        return {str(name): bytes(body) for name, body in self._rows(PIECES_QUERY, run_id, closed_number)}

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

    def mark_sink(self, run_id: str, sink: str, position: int, body: bytes = b"") -> None:
        """Remember how far a sink has come that cannot be asked itself.

        Raises:
            JournalWriteError: nothing was stored.
        """
        with self._lock, transaction(self._connection) as connection:
            connection.execute("INSERT OR REPLACE INTO sink_mark VALUES (?, ?, ?, ?)", (run_id, sink, position, body))

    def sink_mark(self, run_id: str, sink: str) -> int:
        """Return the position that the sink was marked with, -1 where it never was."""
        rows = self._rows("SELECT position FROM sink_mark WHERE run_id = ? AND sink = ?", run_id, sink)
        return int(rows[0][0]) if rows else -1

    def seal(self, number: int, first: int, last: int, streams: Sequence[tuple[str, int, bytes]]) -> None:
        """Record that a segment is full and which messages it holds.

        Raises:
            JournalWriteError: nothing was stored.
        """
        with self._lock, transaction(self._connection) as connection:
            connection.execute("INSERT OR REPLACE INTO segment VALUES (?, ?, ?)", (number, first, last))
            connection.executemany(
                "INSERT OR REPLACE INTO stream_range VALUES (?, ?, ?, ?)",
                [(number, incarnation, rank, ranges) for incarnation, rank, ranges in streams],
            )

    def sealed(self) -> dict[int, tuple[int, int]]:
        """Return the full segments' numbers to their first and last arrival."""
        return {int(n): (int(a), int(b)) for n, a, b in self._rows("SELECT * FROM segment ORDER BY number")}

    def sealed_streams(self, number: int) -> list[tuple[str, int, bytes]]:
        """Return what a full segment holds: (incarnation, rank, packed ranges)."""
        rows = self._rows("SELECT incarnation, rank, ranges FROM stream_range WHERE segment = ?", number)
        return [(str(incarnation), int(rank), bytes(ranges)) for incarnation, rank, ranges in rows]


def _write_state(
    connection: sqlite3.Connection, run_id: str, closing: Decision, closed_number: int, body: bytes
) -> None:
    step = closing.step if isinstance(closing, StepClosing) else -1
    connection.execute(
        "INSERT OR REPLACE INTO state VALUES (?, 'projection', ?, ?, ?, ?)",
        (run_id, closed_number, closing.attempt, step, body),
    )
