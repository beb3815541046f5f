"""What the index knows of the journal's segments: which are full and what they hold, which went, and which broke."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np

from sidestep.protocol.ranges import RangeSet
from sidestep.worker.intake.database import Database

Stream: TypeAlias = tuple[str, int]
"""(incarnation, rank)."""

KNOWN_SEGMENT: Final = 0
"""The number under which messages are known that no segment holds any more and that must not be stored again."""


@dataclass(slots=True)
class Held:
    """What a segment holds of one stream."""

    ranges: RangeSet = field(default_factory=RangeSet)
    last_arrival: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Deleted:
    """A segment that went to make room, after all its steps had closed."""

    number: int
    messages: int
    size_bytes: int
    deleted_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged:
    """A segment's file that was set aside."""

    number: int
    file: str
    """Its name in the journal's folder now."""
    reason: str
    found_at: float
    is_complete: bool
    """Whether it is known what the file held."""
    lost: Mapping[Stream, RangeSet] = field(default_factory=dict)
    """Messages that could not be read and that no closed step had used."""
    used: Mapping[Stream, RangeSet] = field(default_factory=dict)
    """Messages that could not be read and whose steps are in the run: only a replay lacks them."""


def packed(ranges: RangeSet) -> bytes:
    """Return inclusive ranges as little-endian int64 [n, 2]."""
    return ranges.ranges().astype("<i8").tobytes()


def unpacked(content: bytes) -> RangeSet:
    """Return what ``packed`` was given; raises ValueError for bytes that are no ranges."""
    return RangeSet.from_ranges(np.frombuffer(content, "<i8").reshape(-1, 2))


def add_ranges(target: RangeSet, added: RangeSet) -> None:
    """Add all of ``added`` to ``target``."""
    for first, last in added.ranges().tolist():
        target.add_range(first, last)


class SegmentTable:
    """The index's tables about segments; every writing method is one transaction."""

    def __init__(self, database: Database) -> None:
        """Use the index's connection."""
        self._database = database
        names = {str(name) for (name,) in database.rows("SELECT name FROM sqlite_master WHERE type = 'table'")}
        self._is_old = "segment_deleted" not in names  # a journal of version 1, opened for reading
        self._has_arrivals = bool(
            database.rows("SELECT 1 FROM pragma_table_info('stream_range') WHERE name = 'last_arrival'")
        )

    def seal(self, number: int, first: int, last: int, streams: Mapping[Stream, Held]) -> None:
        """Record that a segment is full and which messages it holds.

        Raises:
            JournalWriteError: nothing was stored.
        """
        self._database.write(lambda connection: _seal(connection, number, first, last, streams))

    def sealed(self) -> dict[int, tuple[int, int]]:
        """Return the full segments' numbers to their first and last arrival."""
        rows = self._database.rows("SELECT number, first_arrival, last_arrival FROM segment ORDER BY number")
        return {int(number): (int(first), int(last)) for number, first, last in rows}

    def streams(self, number: int) -> dict[Stream, Held]:
        """Return what a full segment holds; of ``KNOWN_SEGMENT``: what is known and nowhere any more."""
        column = "last_arrival" if self._has_arrivals else "NULL"
        rows = self._database.rows(
            "SELECT incarnation, rank, ranges, COALESCE("  # noqa: S608  (the column is one of two)
            f"{column}, (SELECT last_arrival FROM segment WHERE number = stream_range.segment), -1)"
            " FROM stream_range WHERE segment = ?",
            number,
        )
        return {(str(name), int(rank)): Held(unpacked(ranges), int(last)) for name, rank, ranges, last in rows}

    def newest_number(self) -> int:
        """Return the highest number that a full or deleted segment has had, 0 for none."""
        tables = ["segment"] if self._is_old else ["segment", "segment_deleted"]
        query = " UNION ALL ".join(f"SELECT MAX(number) AS n FROM {table}" for table in tables)  # noqa: S608
        ((newest,),) = self._database.rows(f"SELECT COALESCE(MAX(n), 0) FROM ({query})")  # noqa: S608
        return int(newest)

    def newest_arrival(self) -> int:
        """Return the highest arrival number that a segment, a closing or an end ever named, -1 for none."""
        parts = [
            "SELECT MAX(last_arrival) AS n FROM segment",
            "SELECT MAX(last_arrival) FROM step_closed",
            "SELECT MAX(pending_arrival) - 1 FROM step_closed",
            "SELECT MAX(pending_arrival) - 1 FROM ending",
        ]
        if not self._is_old:
            parts.append("SELECT MAX(last_arrival) FROM segment_deleted")
        ((newest,),) = self._database.rows(f"SELECT COALESCE(MAX(n), -1) FROM ({' UNION ALL '.join(parts)})")  # noqa: S608
        return int(newest)

    # ------------------------------------------------------------------------------------------------ what went

    def delete(self, number: int, size_bytes: int) -> None:
        """Record that a full segment is no longer kept; its messages stay known. The file goes after this.

        Raises:
            JournalWriteError: nothing was stored.
        """
        streams = self.streams(number)
        messages = sum(len(held.ranges) for held in streams.values())

        def block(connection: sqlite3.Connection) -> None:
            self._know(connection, {stream: held.ranges for stream, held in streams.items()})
            connection.execute(
                "INSERT INTO segment_deleted SELECT number, first_arrival, last_arrival, ?, ?, ? FROM segment"
                " WHERE number = ?",
                (messages, size_bytes, time.time(), number),
            )
            connection.execute("DELETE FROM segment WHERE number = ?", (number,))
            connection.execute("DELETE FROM stream_range WHERE segment = ?", (number,))

        self._database.write(block)

    def _know(self, connection: sqlite3.Connection, added: Mapping[Stream, RangeSet]) -> None:
        known = self.streams(KNOWN_SEGMENT)
        for stream, ranges in added.items():
            if len(ranges):
                held = known.setdefault(stream, Held())
                add_ranges(held.ranges, ranges)
                _write_stream(connection, KNOWN_SEGMENT, stream, held)

    def deleted(self) -> list[Deleted]:
        """Return the segments that went, the oldest first."""
        if self._is_old:
            return []
        rows = self._database.rows(
            "SELECT number, messages, size_bytes, deleted_at FROM segment_deleted ORDER BY number"
        )
        return [Deleted(number=n, messages=m, size_bytes=size, deleted_at=at) for n, m, size, at in rows]

    def newest_deleted_arrival(self) -> int:
        """Return the highest arrival number that a deleted segment held, -1 for none."""
        if self._is_old:
            return -1
        ((newest,),) = self._database.rows("SELECT COALESCE(MAX(last_arrival), -1) FROM segment_deleted")
        return int(newest)

    # ------------------------------------------------------------------------------------------------ what broke

    def set_aside(self, found: Damaged, first: int, last: int, streams: Mapping[Stream, Held]) -> None:
        """Record that a segment's file is set aside, and what a new one of its number holds of it.

        Raises:
            JournalWriteError: nothing was stored.
        """

        def block(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM stream_range WHERE segment = ?", (found.number,))
            _seal(connection, found.number, first, last, streams)
            self._record(connection, found)

        self._database.write(block)

    def set_aside_log(self, found: Damaged) -> None:
        """Record that the end of a log went, where no file is to be set aside.

        Raises:
            JournalWriteError: nothing was stored.
        """
        self._database.write(lambda connection: self._record(connection, found))

    def _record(self, connection: sqlite3.Connection, found: Damaged) -> None:
        self._know(connection, found.used)
        connection.execute(
            "INSERT INTO segment_damaged VALUES (?, ?, ?, ?, ?)",
            (found.number, found.file, found.reason, found.found_at, int(found.is_complete)),
        )
        connection.executemany(
            "INSERT INTO lost_range VALUES (?, ?, ?, ?, ?)",
            [
                (found.file, incarnation, rank, is_used, packed(ranges))
                for is_used, lost in ((0, found.lost), (1, found.used))
                for (incarnation, rank), ranges in lost.items()
                if len(ranges)
            ],
        )

    def damaged(self) -> list[Damaged]:
        """Return the files that were set aside, in the order they were found."""
        if self._is_old:
            return []
        found = []
        for number, file, reason, at, complete in self._database.rows(
            "SELECT number, file, reason, found_at, is_complete FROM segment_damaged ORDER BY rowid"
        ):
            lost: dict[int, dict[Stream, RangeSet]] = {0: {}, 1: {}}
            for name, rank, used, ranges in self._database.rows(
                "SELECT incarnation, rank, used, ranges FROM lost_range WHERE file = ?", file
            ):
                lost[used][name, rank] = unpacked(ranges)
            found.append(
                Damaged(
                    number=number, file=file, reason=reason, found_at=at, is_complete=bool(complete), lost=lost[0],
                    used=lost[1],
                )
            )  # fmt: skip
        return found


def _write_stream(connection: sqlite3.Connection, number: int, stream: Stream, held: Held) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO stream_range(segment, incarnation, rank, ranges, last_arrival) VALUES (?, ?, ?, ?, ?)",
        (number, *stream, packed(held.ranges), held.last_arrival),
    )


def _seal(connection: sqlite3.Connection, number: int, first: int, last: int, streams: Mapping[Stream, Held]) -> None:
    connection.execute("INSERT OR REPLACE INTO segment VALUES (?, ?, ?)", (number, first, last))
    for stream, held in streams.items():
        _write_stream(connection, number, stream, held)


def subtract(ranges: RangeSet, taken: RangeSet) -> RangeSet:
    """Return what ``ranges`` has and ``taken`` has not."""
    left = RangeSet()
    holes = taken.ranges().tolist()
    for begin, last in ranges.ranges().tolist():
        first = begin
        for low, high in holes:
            if high < first or low > last:
                continue
            if low > first:
                left.add_range(first, low - 1)
            first = high + 1
        if first <= last:
            left.add_range(first, last)
    return left
