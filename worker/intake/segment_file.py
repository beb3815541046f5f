"""One file of the journal's messages: its rows, their checksums, and what can be told of it without reading bodies."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple
from zlib import crc32

from sidestep.worker.errors import JournalDamageError, JournalError
from sidestep.worker.intake.database import connect, is_damage
from sidestep.worker.intake.schema import ADD_CHECKSUMS, SEGMENT_SCHEMA
from sidestep.worker.intake.segment_table import Held, Stream

COLUMNS: Final = "incarnation, rank, sequence, kind, step, wire_major, wire_minor, received_at, arrival, body"
_INSERT: Final = f"INSERT INTO message({COLUMNS}, checksum) VALUES (?,?,?,?,?,?,?,?,?,?,?)"  # noqa: S608  (columns of ours)
_MAGIC: Final = b"SQLite format 3\x00"
_HEADER_BYTES: Final = 100


UNREADABLE: Final = (sqlite3.Error, UnicodeDecodeError, TypeError, ValueError)
"""What reading a broken file ends with: SQLite's own errors, or values that are not what the columns hold."""


def unreadable(path: Path, error: Exception) -> JournalError:
    """Return what to raise where reading ended so; a damage, unless SQLite says that the file is not at fault."""
    is_fault_of_file = getattr(error, "sqlite_errorcode", None) is None or is_damage(error)
    kind = JournalDamageError if is_fault_of_file else JournalError
    return kind(f"{path} cannot be read: {error}")


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


def segment_path(folder: Path, number: int) -> Path:
    """Return where a segment lies."""
    return folder / f"segment-{number:06d}.sqlite"


def log_of(path: Path) -> Path:
    """Return where a file's write-ahead log lies while there is one."""
    return path.with_name(f"{path.name}-wal")


def all_files_of(path: Path) -> list[Path]:
    """Return a database's file and those that SQLite keeps beside it, whether they are there or not."""
    return [path.with_name(path.name + ending) for ending in ("", "-wal", "-shm", "-journal")]


def insert(connection: sqlite3.Connection, rows: Iterable[Row]) -> None:
    """Store rows with their checksums."""
    connection.executemany(_INSERT, [(*row, crc32(row.body)) for row in rows])


@dataclass(slots=True)
class SegmentFile:
    """A segment that is read; the one that is written has a connection of its own beside this."""

    number: int
    path: Path
    first_arrival: int = -1
    last_arrival: int = -1
    streams: dict[Stream, Held] = field(default_factory=dict)
    reader: sqlite3.Connection | None = None
    columns: str = ""

    def rows(self, condition: str, values: Sequence[object]) -> list[Row]:
        """Return the messages that a condition finds.

        Raises:
            JournalDamageError: the file is broken, or a message is not what was stored.
            JournalError: it cannot be read now.
        """
        self.connected()
        found = self.select(f"SELECT {self.columns} FROM message WHERE {condition}", values)  # noqa: S608
        rows = []
        for *values_of_row, checksum in found:
            row = Row(*values_of_row)
            body: object = row.body
            if not isinstance(body, bytes) or (checksum is not None and crc32(body) != checksum):
                raise JournalDamageError(
                    f"message {row.sequence} of rank {row.rank} of {row.incarnation} does not match its checksum"
                )
            rows.append(row)
        return rows

    def select(self, query: str, values: Sequence[object]) -> list[tuple[Any, ...]]:
        """Return what a query finds; raises as ``rows`` does."""
        try:
            return self.connected().execute(query, tuple(values)).fetchall()
        except UNREADABLE as error:
            raise unreadable(self.path, error) from error

    def connected(self) -> sqlite3.Connection:
        """Return the connection that reads it; raises as ``rows`` does."""
        if self.reader is None:
            if not self.path.is_file():
                raise JournalDamageError(f"{self.path} is missing")
            self.reader = connect(self.path, read_only=True)
            self.columns = f"{COLUMNS}, NULL"
            if self.select("SELECT 1 FROM pragma_table_info('message') WHERE name = 'checksum'", ()):
                self.columns = f"{COLUMNS}, checksum"
        return self.reader

    def add(self, stream: Stream, sequences: Sequence[int], first_arrival: int, last_arrival: int) -> None:
        """Remember that messages of a stream are stored in it, no number twice."""
        self.first_arrival = first_arrival if self.first_arrival < 0 else min(first_arrival, self.first_arrival)
        self.last_arrival = max(last_arrival, self.last_arrival)
        held = self.streams.get(stream)
        if held is None:
            held = self.streams.setdefault(stream, Held())
        held.ranges.add_all(sequences)
        held.last_arrival = max(last_arrival, held.last_arrival)

    def num_since(self, arrival: int) -> int:
        """Return how many messages it has from an arrival number on; 0 where that is not known: some were lost."""
        if sum(len(held.ranges) for held in self.streams.values()) != self.last_arrival - self.first_arrival + 1:
            return 0
        return max(0, self.last_arrival - max(arrival, self.first_arrival) + 1)

    def size_bytes(self) -> int:
        """Return what its files take on the disk."""
        return sum(path.stat().st_size for path in all_files_of(self.path) if path.exists())

    def close(self) -> None:
        """Close the file."""
        if self.reader is not None:
            self.reader.close()
            self.reader = None


def by_stream(rows: Iterable[Row]) -> dict[Stream, tuple[list[int], int, int]]:
    """Return each stream's sequence numbers among ``rows``, with the lowest and the highest arrival."""
    found: dict[Stream, tuple[list[int], list[int]]] = {}
    for incarnation, rank, sequence, *_, arrival, _ in rows:
        known = found.get((incarnation, rank))
        if known is None:
            known = found[incarnation, rank] = ([], [])
        known[0].append(sequence)
        known[1].append(arrival)
    return {stream: (sequences, min(arrivals), max(arrivals)) for stream, (sequences, arrivals) in found.items()}


def open_for_writing(path: Path, *, shared_log: bool) -> sqlite3.Connection:
    """Open a segment to append to it, made where it is missing.

    Raises:
        JournalDamageError: it is broken.
        JournalError: it cannot be opened.
    """
    connection = connect(path, shared_log=shared_log)
    try:
        connection.executescript(f"BEGIN; {SEGMENT_SCHEMA} COMMIT;")
        if not connection.execute("SELECT 1 FROM pragma_table_info('message') WHERE name = 'checksum'").fetchone():
            connection.execute(ADD_CHECKSUMS)
    except sqlite3.Error as error:
        connection.close()
        kind = JournalDamageError if is_damage(error) else JournalError
        raise kind(f"{path} cannot be opened: {error}") from error
    return connection


def survey(segment: SegmentFile, connection: sqlite3.Connection) -> None:
    """Read what a segment holds from its index of arrivals, a million messages a second or so; bodies are not read.

    Raises:
        JournalDamageError: it is broken.
        JournalError: it cannot be read.
    """
    try:
        groups = connection.execute(
            "SELECT incarnation, rank, MIN(sequence), MAX(sequence), COUNT(*), MIN(arrival), MAX(arrival)"
            " FROM message INDEXED BY message_arrival GROUP BY incarnation, rank"
        ).fetchall()
        has_holes = False
        for name, rank, low, high, count, first, last in groups:
            held = segment.streams.setdefault((name, rank), Held(last_arrival=last))
            has_holes = has_holes or count != high - low + 1
            held.ranges.add_range(low, high)
            segment.first_arrival = first if segment.first_arrival < 0 else min(first, segment.first_arrival)
            segment.last_arrival = max(last, segment.last_arrival)
        if has_holes:
            _survey_one_by_one(segment, connection)
    except UNREADABLE as error:
        raise unreadable(segment.path, error) from error


def _survey_one_by_one(segment: SegmentFile, connection: sqlite3.Connection) -> None:
    segment.streams.clear()
    query = "SELECT incarnation, rank, sequence, arrival FROM message INDEXED BY message_arrival ORDER BY arrival"
    for name, rank, sequence, arrival in connection.execute(query):
        held = segment.streams.setdefault((name, rank), Held())
        held.ranges.add(sequence)
        held.last_arrival = arrival


def header_damage(path: Path, *, is_full: bool) -> str:
    """Return what 100 bytes tell of a segment's damage: that it is missing, no database, or cut; empty for none.

    Args:
        path: the segment.
        is_full: it was full and closed; else it may be new, or not there yet.

    Raises:
        JournalError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
        size_bytes = path.stat().st_size
    except FileNotFoundError:
        return f"{path.name} is missing" if is_full else ""
    except OSError as error:
        raise JournalError(f"{path} cannot be read: {error.strerror}") from error
    has_log = log_of(path).exists()
    if not size_bytes and not has_log and not is_full:
        return ""  # it was being made
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        return f"{path.name} is no database"
    if has_log:
        return ""  # it was not closed in order: only SQLite can tell what it holds
    page_bytes = int.from_bytes(header[16:18], "big")
    page_bytes = 1 << 16 if page_bytes == 1 else page_bytes
    pages, counted, written_at = (int.from_bytes(header[at : at + 4], "big") for at in (28, 24, 92))
    if counted == written_at and pages * page_bytes > size_bytes:
        return f"{path.name} is cut: {size_bytes} bytes of {pages * page_bytes}"
    return ""
