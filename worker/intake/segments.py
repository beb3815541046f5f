"""The journal's segments: every sequenced message, raw, once (docs/delivery.md, section 7).

One thread appends; any thread reads. What a stream holds is known without reading bodies.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from sidestep.protocol.ranges import RangeSet
from sidestep.worker.errors import JournalError
from sidestep.worker.intake.database import connect, transaction
from sidestep.worker.intake.index import Index
from sidestep.worker.intake.schema import SEGMENT_SCHEMA

_COLUMNS: Final = "incarnation, rank, sequence, kind, step, wire_major, wire_minor, received_at, arrival, body"
_READ_ROWS: Final = 500


class Row(NamedTuple):
    """One message as it is stored."""

    incarnation: str
    rank: int
    sequence: int
    kind: int
    step: int
    """-1 for kinds without one."""
    wire_major: int
    wire_minor: int
    received_at: float
    """The worker's clock, unix seconds."""
    arrival: int
    body: bytes
    """The whole frame."""


@dataclass(slots=True)
class _Segment:
    number: int
    first_arrival: int
    last_arrival: int
    streams: dict[tuple[str, int], RangeSet]
    reader: sqlite3.Connection | None = None


class Segments:
    """All segments of one journal, the last of which is written."""

    def __init__(self, folder: Path, index: Index, *, segment_bytes: int, read_only: bool = False) -> None:
        """Open what is there; the last segment's streams are read from its index of arrivals.

        Raises:
            JournalError: a segment that the index names is missing or damaged.
        """
        self._folder = folder
        self._index = index
        self._segment_bytes = segment_bytes
        self._read_only = read_only
        self._lock = threading.RLock()
        self._segments: list[_Segment] = []
        self._committed: dict[tuple[str, int], RangeSet] = {}
        self._writer: sqlite3.Connection | None = None
        self.next_arrival = 0
        """The arrival number of the next message."""
        self._load()

    def _path(self, number: int) -> Path:
        return self._folder / f"segment-{number:06d}.sqlite"

    def _load(self) -> None:
        sealed = self._index.sealed()
        for number, (first, last) in sealed.items():
            if not self._path(number).is_file():
                raise JournalError(f"{self._path(number)} is missing")
            streams = {
                (incarnation, rank): RangeSet.from_ranges(np.frombuffer(packed, "<i8").reshape(-1, 2))
                for incarnation, rank, packed in self._index.sealed_streams(number)
            }
            self._segments.append(_Segment(number, first, last, streams))
        active = max(sealed, default=0) + 1
        if self._path(active).is_file() or not self._read_only:
            segment, connection = self._open_active(active)
            self._segments.append(segment)
            if self._read_only:
                segment.reader = connection
            else:
                self._writer = connection
        for segment in self._segments:
            self.next_arrival = max(self.next_arrival, segment.last_arrival + 1)
            for stream, ranges in segment.streams.items():
                held = self._committed.setdefault(stream, RangeSet())
                for first, last in ranges.ranges().tolist():
                    held.add_range(first, last)

    def _open_active(self, number: int) -> tuple[_Segment, sqlite3.Connection]:
        connection = connect(self._path(number), read_only=self._read_only)
        streams: dict[tuple[str, int], RangeSet] = {}
        first = last = -1
        try:
            if not self._read_only:
                connection.executescript(SEGMENT_SCHEMA)
            query = (
                "SELECT incarnation, rank, sequence, arrival FROM message INDEXED BY message_arrival ORDER BY arrival"
            )
            for incarnation, rank, sequence, arrival in connection.execute(query):
                streams.setdefault((incarnation, rank), RangeSet()).add(sequence)
                first, last = (arrival if first < 0 else first), arrival
        except sqlite3.Error as error:
            connection.close()
            raise JournalError(f"{self._path(number)} cannot be read: {error}") from error
        return _Segment(number, first, last, streams), connection

    # ------------------------------------------------------------------------------------------------ writing

    def append(self, rows: Sequence[Row]) -> None:
        """Store new messages in one transaction, on disk when this returns. Their arrivals follow ``next_arrival``.

        Raises:
            JournalWriteError: nothing was stored, try again.
        """
        if not rows:
            return
        if self._writer is None:
            raise JournalError("this journal is closed, or was opened for reading")
        if self._active_bytes() >= self._segment_bytes:
            self._rotate()
        with transaction(self._writer) as connection:
            connection.executemany(f"INSERT INTO message({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?)", rows)  # noqa: S608
        with self._lock:
            active = self._segments[-1]
            if active.first_arrival < 0:
                active.first_arrival = rows[0].arrival
            active.last_arrival = rows[-1].arrival
            self.next_arrival = rows[-1].arrival + 1
            for row in rows:
                stream = (row.incarnation, row.rank)
                active.streams.setdefault(stream, RangeSet()).add(row.sequence)
                self._committed.setdefault(stream, RangeSet()).add(row.sequence)

    def _active_bytes(self) -> int:
        if self._writer is None:
            return 0
        (pages,) = self._writer.execute("PRAGMA page_count").fetchone()
        (page_bytes,) = self._writer.execute("PRAGMA page_size").fetchone()
        return int(pages) * int(page_bytes)

    def _rotate(self) -> None:
        with self._lock:
            full = self._segments[-1]
            packed = [
                (incarnation, rank, ranges.ranges().astype("<i8").tobytes())
                for (incarnation, rank), ranges in full.streams.items()
            ]
            segment, connection = self._open_active(full.number + 1)
            try:
                self._index.seal(full.number, full.first_arrival, full.last_arrival, packed)
            except BaseException:
                connection.close()
                raise
            if self._writer is not None:
                self._writer.close()
            self._writer = connection
            self._segments.append(segment)

    # ------------------------------------------------------------------------------------------------ reading

    def committed(self, incarnation: str, rank: int) -> RangeSet:
        """Return a copy of the sequence numbers of a stream that are on disk."""
        with self._lock:
            held = self._committed.get((incarnation, rank))
            return RangeSet() if held is None else RangeSet.from_ranges(held.ranges())

    def holds(self, incarnation: str, rank: int, sequence: int) -> bool:
        """Return whether this message is on disk."""
        with self._lock:
            held = self._committed.get((incarnation, rank))
            return held is not None and sequence in held

    def streams(self) -> list[tuple[str, int]]:
        """Return every (incarnation, rank) that has a message here."""
        with self._lock:
            return sorted(self._committed)

    def _reader(self, segment: _Segment) -> sqlite3.Connection:
        if segment.reader is None:
            segment.reader = connect(self._path(segment.number), read_only=True)
        return segment.reader

    def _query(self, segment: _Segment, condition: str, values: Iterable[object]) -> list[Row]:
        query = f"SELECT {_COLUMNS} FROM message WHERE {condition}"  # noqa: S608  (conditions are this module's own)
        try:
            return [Row(*row) for row in self._reader(segment).execute(query, tuple(values))]
        except sqlite3.Error as error:
            raise JournalError(f"{self._path(segment.number)} cannot be read: {error}") from error

    def since(self, arrival: int, limit: int) -> list[Row]:
        """Return up to ``limit`` messages from this arrival number on, in the order they arrived.

        Raises:
            JournalError: a segment cannot be read.
        """
        found: list[Row] = []
        with self._lock:
            for segment in self._segments:
                if segment.last_arrival >= arrival and len(found) < limit:
                    condition = "arrival >= ? ORDER BY arrival LIMIT ?"
                    found += self._query(segment, condition, (arrival, limit - len(found)))
        return found

    def first_since(self, incarnation: str, arrival: int) -> int | None:
        """Return the arrival number of the incarnation's first message from ``arrival`` on, None for none.

        Raises:
            JournalError: a segment cannot be read.
        """
        query = (
            "SELECT arrival FROM message INDEXED BY message_arrival WHERE arrival >= ? AND incarnation = ?"
            " ORDER BY arrival LIMIT 1"
        )
        with self._lock:
            for segment in self._segments:
                if segment.last_arrival < arrival:
                    continue
                try:
                    row = self._reader(segment).execute(query, (arrival, incarnation)).fetchone()
                except sqlite3.Error as error:
                    raise JournalError(f"{self._path(segment.number)} cannot be read: {error}") from error
                if row is not None:
                    return int(row[0])
        return None

    def select(self, incarnation: str, keys: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Row]:
        """Return (rank, sequence) to its message, for those that are here.

        Raises:
            JournalError: a segment cannot be read.
        """
        found: dict[tuple[int, int], Row] = {}
        wanted = set(keys)
        with self._lock:
            for segment in reversed(self._segments):
                here = [
                    (rank, sequence)
                    for rank, sequence in sorted(wanted)
                    if sequence in segment.streams.get((incarnation, rank), ())
                ]
                for at in range(0, len(here), _READ_ROWS):
                    some = here[at : at + _READ_ROWS]
                    places = ",".join(["(?,?,?)"] * len(some))
                    values = [value for rank, sequence in some for value in (incarnation, rank, sequence)]
                    condition = f"(incarnation, rank, sequence) IN (VALUES {places})"
                    found.update({(row.rank, row.sequence): row for row in self._query(segment, condition, values)})
                wanted.difference_update(here)
                if not wanted:
                    break
        return found

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            for segment in self._segments:
                if segment.reader is not None:
                    segment.reader.close()
                    segment.reader = None
            if self._writer is not None:
                self._writer.close()
                self._writer = None
