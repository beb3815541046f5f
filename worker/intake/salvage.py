"""What can be read of a broken segment, in a new file of its number; the broken one is kept under another name.

The order makes a kill at any point harmless: the copy is written, the index records what it holds, the names change. A
worker that finds the record without the names finishes the work; one that finds a copy without the record removes it.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from zlib import crc32

from sidestep.worker.errors import JournalError
from sidestep.worker.intake.database import connect, transaction
from sidestep.worker.intake.segment_file import (
    COLUMNS,
    UNREADABLE,
    Row,
    SegmentFile,
    all_files_of,
    by_stream,
    insert,
    open_for_writing,
    segment_path,
)
from sidestep.worker.intake.segment_table import Held, Stream

_READ_ROWS: Final = 200
_WRITE_ROWS: Final = 5_000


def salvaged_path(folder: Path, number: int) -> Path:
    """Return where the copy lies until the names change."""
    return folder / f"segment-{number:06d}.salvaged.sqlite"


def damaged_path(folder: Path, number: int) -> Path:
    """Return a name for the broken file that no other has."""
    name, tried = f"segment-{number:06d}.corrupt", 1
    while any(path.exists() for path in all_files_of(folder / f"{name}.sqlite")):
        tried += 1
        name = f"segment-{number:06d}.corrupt-{tried}"
    return folder / f"{name}.sqlite"


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk; raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def salvage(broken: Path, target: SegmentFile, known: Mapping[Stream, Held] | None, *, shared_log: bool) -> None:
    """Copy what can be read, and is what was stored, from ``broken`` to a new file at ``target``.

    ``known`` is what it held; None: whatever a walk through it brings before it breaks off.

    Raises:
        JournalWriteError: the copy cannot be written now.
        JournalError: the file cannot be read at all for a reason that is not its own.
    """
    remove(target.path)
    source = _source(broken)
    copy = open_for_writing(target.path, shared_log=shared_log)
    try:
        batch: list[Row] = []
        for row in _readable(source, known) if source is not None else ():
            batch.append(row)
            if len(batch) >= _WRITE_ROWS:
                _store(copy, target, batch)
                batch = []
        _store(copy, target, batch)
    finally:
        copy.close()
        if source is not None:
            source.close()
    sync_folder(target.path.parent)


def _source(broken: Path) -> sqlite3.Connection | None:
    if not broken.is_file() or not broken.stat().st_size:
        return None  # an empty file is not even opened: SQLite would delete the log beside it
    try:
        return connect(broken, read_only=True)
    except JournalError:
        return None  # nothing of it can be read: all that it held is counted as lost


def _store(copy: sqlite3.Connection, target: SegmentFile, rows: list[Row]) -> None:
    with transaction(copy) as connection:
        insert(connection, rows)
    for stream, (sequences, first, last) in by_stream(rows).items():
        target.add(stream, sequences, first, last)


def _readable(source: sqlite3.Connection, known: Mapping[Stream, Held] | None) -> Iterator[Row]:
    try:
        has_checksums = source.execute("SELECT 1 FROM pragma_table_info('message') WHERE name = 'checksum'").fetchone()
    except UNREADABLE:
        return  # its list of tables is gone, and with it every way to the messages
    columns = f"{COLUMNS}, {'checksum' if has_checksums else 'NULL'}"
    queries = _walk(columns) if known is None else _by_keys(columns, known)
    for query, values, each in queries:
        try:
            found = source.execute(query, values).fetchall() if known is not None else source.execute(query)
            yield from _whole(found)
        except UNREADABLE:
            for key_query, key_values in each:  # one by one: only those on the broken page are lost
                yield from _one(source, key_query, key_values)


_Query = tuple[str, tuple[object, ...]]


def _walk(columns: str) -> Iterator[tuple[str, tuple[object, ...], list[_Query]]]:
    yield f"SELECT {columns} FROM message", (), []  # noqa: S608  (columns of ours)


def _by_keys(columns: str, known: Mapping[Stream, Held]) -> Iterator[tuple[str, tuple[object, ...], list[_Query]]]:
    condition = "incarnation = ? AND rank = ? AND sequence"
    for stream, held in known.items():
        for first, last in held.ranges.ranges().tolist():
            for low in range(first, last + 1, _READ_ROWS):
                high = min(last, low + _READ_ROWS - 1)
                each: list[_Query] = [
                    (f"SELECT {columns} FROM message WHERE {condition} = ?", (*stream, sequence))  # noqa: S608
                    for sequence in range(low, high + 1)
                ]
                query = f"SELECT {columns} FROM message WHERE {condition} BETWEEN ? AND ?"  # noqa: S608
                yield query, (*stream, low, high), each


def _one(source: sqlite3.Connection, query: str, values: tuple[object, ...]) -> Iterator[Row]:
    try:
        yield from _whole(source.execute(query, values).fetchall())
    except UNREADABLE:
        return  # this one is lost: the caller compares what it held with what came


def _whole(found: Iterable[tuple[Any, ...]]) -> Iterator[Row]:
    for *values, checksum in found:
        if isinstance(values[-1], bytes) and (checksum is None or crc32(values[-1]) == checksum):
            yield Row(*values)


def rename(folder: Path, number: int, file: str) -> None:
    """Give the broken file its name and the copy its own; does what is left to do where that was begun.

    Raises:
        OSError: a name cannot be changed.
    """
    own, copy = segment_path(folder, number), salvaged_path(folder, number)
    if copy.exists():
        for path, aside in zip(all_files_of(own), all_files_of(folder / file), strict=True):
            if path.exists():
                path.replace(aside)
        copy.replace(own)
        sync_folder(folder)


def remove(path: Path) -> None:
    """Delete a database and all beside it; the log first, so that what is left is never a file without its log."""
    for each in reversed(all_files_of(path)):
        each.unlink(missing_ok=True)
