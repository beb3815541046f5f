"""The journal's segments: every sequenced message, raw, once (docs/delivery.md, section 7).

One thread appends; any thread reads. What a stream holds is known without reading bodies. A segment that turns out to
be broken is set aside when it is met, at opening or in reading: what can be read of it stays, what cannot is named.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.ranges import RangeSet
from sidestep.worker.errors import JournalDamageError, JournalError, JournalWriteError
from sidestep.worker.intake import salvage
from sidestep.worker.intake.damage import assess, cut_off, damage_line
from sidestep.worker.intake.database import is_full, transaction
from sidestep.worker.intake.index import Index
from sidestep.worker.intake.reserve import Reserve
from sidestep.worker.intake.segment_file import (
    Row,
    SegmentFile,
    by_stream,
    header_damage,
    insert,
    open_for_writing,
    segment_path,
    survey,
)
from sidestep.worker.intake.segment_table import KNOWN_SEGMENT, Damaged, Held, Stream, add_ranges

__all__ = ["Row", "Segments"]
_LOG: Final = logging.getLogger(__name__)
_READ_ROWS: Final = 500


class Segments:
    """All segments of one journal, the last of which is written."""

    def __init__(
        self,
        folder: Path,
        index: Index,
        *,
        segment_bytes: int,
        read_only: bool = False,
        reserve: Reserve | None = None,
    ) -> None:
        """Open what is there; the last segment's streams are read from its index of arrivals.

        Raises:
            JournalError: a segment cannot be opened for a reason that is not its own.
        """
        self._folder = folder
        self._index = index
        self._segment_bytes = segment_bytes
        self._read_only = read_only
        self._reserve = reserve
        self._shared_log = read_only or index.shared_log
        self._lock = threading.RLock()
        self._segments: list[SegmentFile] = []
        self._known: dict[Stream, RangeSet] = {}
        self._committed: dict[Stream, RangeSet] = {}
        self._writer: sqlite3.Connection | None = None
        self._unreadable: dict[int, str] = {}
        self.next_arrival = 0
        """The arrival number of the next message."""
        self._load()

    # ------------------------------------------------------------------------------------------------ opening

    def _load(self) -> None:
        table = self._index.segments
        if not self._read_only:
            self._finish_what_was_begun()
        for number, (first, last) in table.sealed().items():
            path = segment_path(self._folder, number)
            self._segments.append(SegmentFile(number, path, first, last, table.streams(number)))
        for segment in list(self._segments):
            if reason := header_damage(segment.path, is_full=True):
                self._break(segment, reason)
        self._open_active(table.newest_number() + 1)
        while self._segments and self._path_after_last().is_file():  # the index lost its end: it knew this one as full
            if self._read_only:
                self._open_active(self._segments[-1].number + 1)
            else:
                self._rotate()
        self._recount()
        held = max([table.newest_deleted_arrival(), *(segment.last_arrival for segment in self._segments)])
        self.next_arrival = max(held, table.newest_arrival()) + 1
        if not self._read_only:
            self._tell_cut(held)

    def _path_after_last(self) -> Path:
        return segment_path(self._folder, self._segments[-1].number + 1)

    def _finish_what_was_begun(self) -> None:
        table = self._index.segments
        for gone in table.deleted():
            salvage.remove(segment_path(self._folder, gone.number))
        for found in table.damaged():
            salvage.rename(self._folder, found.number, found.file)
        for path in self._folder.glob("segment-*.salvaged.sqlite"):
            salvage.remove(path)

    def _open_active(self, number: int) -> None:
        path = segment_path(self._folder, number)
        segment = SegmentFile(number, path)
        if self._read_only:
            if path.is_file():
                self._segments.append(segment)
                try:
                    segment.select("SELECT 1 FROM message LIMIT 1", ())
                    survey(segment, segment.connected())
                except JournalDamageError as error:
                    self._break(segment, str(error))
            return
        is_new = not path.is_file()
        try:
            if reason := header_damage(path, is_full=False):
                raise JournalDamageError(reason)  # SQLite would take an empty file for a new one, and drop its log
            connection = open_for_writing(path, shared_log=self._shared_log)
            try:
                survey(segment, connection)
            except BaseException:
                connection.close()
                raise
        except JournalDamageError as error:
            self._segments.append(segment)
            self._break(segment, str(error), is_known=False)
            return
        if is_new:
            salvage.sync_folder(self._folder)
        self._writer = connection
        self._segments.append(segment)

    def _recount(self) -> None:
        """Work out anew what is known of each stream."""
        self._known = {name: held.ranges for name, held in self._index.segments.streams(KNOWN_SEGMENT).items()}
        committed: dict[Stream, RangeSet] = {}
        for stream, ranges in self._known.items():
            add_ranges(committed.setdefault(stream, RangeSet()), ranges)
        for segment in self._segments:
            for stream, held in segment.streams.items():
                add_ranges(committed.setdefault(stream, RangeSet()), held.ranges)
        self._committed = committed

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
        if self._reserve is not None and not self._reserve.has_room():
            raise JournalWriteError(self._reserve.reason)
        with self._lock:  # who reads may find this segment broken, and close its writer
            self._append(rows)

    def _append(self, rows: Sequence[Row]) -> None:
        try:
            if self._active_bytes() >= self._segment_bytes:
                self._rotate()
            self._store(rows)
        except (JournalWriteError, JournalDamageError) as error:
            if self._reserve is not None and is_full(error.__cause__):
                self._reserve.give_up()
                raise JournalWriteError(self._reserve.reason) from error
            raise JournalWriteError(str(error)) from error
        active = self._segments[-1]
        self.next_arrival = rows[-1].arrival + 1
        for stream, (sequences, first, last) in by_stream(rows).items():
            active.add(stream, sequences, first, last)
            committed = self._committed.get(stream)
            if committed is None:
                committed = self._committed.setdefault(stream, RangeSet())
            committed.add_all(sequences)

    def _store(self, rows: Sequence[Row]) -> None:
        try:
            with transaction(self._open_writer) as connection:
                insert(connection, rows)
        except JournalDamageError as error:
            self._break(self._segments[-1], str(error))
            with transaction(self._open_writer) as connection:
                insert(connection, rows)

    @property
    def _open_writer(self) -> sqlite3.Connection:
        if self._writer is None:
            raise JournalError("this journal is closed, or was opened for reading")
        return self._writer

    def _active_bytes(self) -> int:
        try:
            (pages,) = self._open_writer.execute("PRAGMA page_count").fetchone()
            (page_bytes,) = self._open_writer.execute("PRAGMA page_size").fetchone()
        except sqlite3.Error as error:
            raise JournalWriteError(f"the size of the newest segment cannot be told: {error}") from error
        return int(pages) * int(page_bytes)

    def _rotate(self) -> None:
        with self._lock:
            full, before = self._segments[-1], self._writer
            try:
                self._index.segments.seal(full.number, full.first_arrival, full.last_arrival, full.streams)
                self._open_active(full.number + 1)
            except JournalError as error:
                raise JournalWriteError(f"no new segment can be begun: {error}") from error
            if before is not None:
                before.close()

    # ------------------------------------------------------------------------------------------------ what broke

    def _break(self, segment: SegmentFile, reason: str, *, is_known: bool = True) -> None:
        """Set a broken segment aside; ``is_known`` is False where what it held is not known.

        Raises:
            JournalWriteError: there is no room to do so; nothing has changed.
        """
        with self._lock:
            if self._read_only:
                self._unreadable[segment.number] = reason
                segment.close()
                segment.streams = {}
                segment.last_arrival = -1
                self._recount()
                return
            segment.close()
            was_active = segment is self._segments[-1] and segment.number > max(
                self._index.segments.sealed(), default=0
            )
            if was_active and self._writer is not None:
                self._writer.close()
                self._writer = None
            copy = self._salvaged(segment, is_known=is_known)
            found = assess(self._index, self._segments, segment, copy, reason, is_known=is_known)
            first, last = (segment.first_arrival, segment.last_arrival) if is_known else (
                copy.first_arrival, copy.last_arrival
            )  # fmt: skip
            self._index.segments.set_aside(found, first, last, copy.streams)
            salvage.rename(self._folder, segment.number, found.file)
            segment.streams, segment.first_arrival, segment.last_arrival = copy.streams, first, last
            _LOG.error("%s", damage_line(self._folder, found))
            if was_active:
                self._open_active(segment.number + 1)
            self._recount()

    def _salvaged(self, segment: SegmentFile, *, is_known: bool) -> SegmentFile:
        copy = SegmentFile(segment.number, salvage.salvaged_path(self._folder, segment.number))
        known = segment.streams if is_known else None
        try:
            salvage.salvage(segment.path, copy, known, shared_log=self._shared_log)
        except JournalError as error:
            if self._reserve is not None and is_full(error.__cause__):
                self._reserve.give_up()
            raise JournalWriteError(f"{segment.path} is damaged, and cannot be set aside now: {error}") from error
        return copy

    def _tell_cut(self, held: int) -> None:
        """Say where closed steps used messages that no segment has: the end of a log went."""
        found = cut_off(self._index, self._segments, self._known, held)
        if found is not None:
            self._index.segments.set_aside_log(found)
            _LOG.error("%s", damage_line(self._folder, found))
            self._recount()

    def damaged(self) -> list[Damaged]:
        """Return what broke so far, in the order it was found."""
        return self._index.segments.damaged()

    def unreadable(self) -> dict[int, str]:
        """Return, for a journal opened for reading, the segments that turned out to be broken, with the reason."""
        return dict(self._unreadable)

    # ------------------------------------------------------------------------------------------------ what goes

    def sealed(self) -> list[SegmentFile]:
        """Return the full segments, the oldest first."""
        with self._lock:
            return self._segments[:-1]

    def delete(self, segment: SegmentFile) -> None:
        """Delete a full segment for good; its messages stay known.

        Raises:
            JournalWriteError: nothing has changed.
        """
        with self._lock:
            self._index.segments.delete(segment.number, segment.size_bytes())
            self._segments.remove(segment)
            segment.close()
            for stream, held in segment.streams.items():
                add_ranges(self._known.setdefault(stream, RangeSet()), held.ranges)
        salvage.remove(segment.path)

    # ------------------------------------------------------------------------------------------------ reading

    def committed(self, incarnation: str, rank: int) -> RangeSet:
        """Return a copy of the sequence numbers of a stream that are on disk, or were until their segment went."""
        with self._lock:
            held = self._committed.get((incarnation, rank))
            return RangeSet() if held is None else RangeSet.from_ranges(held.ranges())

    def committed_ranges(self, incarnation: str, rank: int) -> NDArray[np.int64]:
        """Return the same as inclusive ranges [n, 2]."""
        with self._lock:
            held = self._committed.get((incarnation, rank))
            return RangeSet().ranges() if held is None else held.ranges()

    def holds(self, incarnation: str, rank: int, sequence: int) -> bool:
        """Return whether this message is on disk, or was until its segment went."""
        with self._lock:
            held = self._committed.get((incarnation, rank))
            return held is not None and sequence in held

    def streams(self) -> list[tuple[str, int]]:
        """Return every (incarnation, rank) that has a message here."""
        with self._lock:
            return sorted(self._committed)

    def last_arrivals(self) -> dict[str, int]:
        """Return incarnation to the arrival number of its newest message that is here, or a later number."""
        found: dict[str, int] = {}
        with self._lock:
            for segment in self._segments:
                for (incarnation, _), held in segment.streams.items():
                    found[incarnation] = max(found.get(incarnation, -1), held.last_arrival)
        return found

    def num_gone(self, incarnations: Iterable[str]) -> int:
        """Return how many messages of these incarnations are known and can be read no more."""
        names = set(incarnations)
        with self._lock:
            return sum(len(ranges) for (name, _), ranges in self._known.items() if name in names)

    def _rows(self, segment: SegmentFile, condition: str, values: Sequence[object], expected: int) -> list[Row]:
        """Return what is found; a tree that lost a branch without SQLite's noticing is known by what it lacks."""
        try:
            found = segment.rows(condition, values)
            if len(found) < expected:
                raise JournalDamageError(f"{segment.path} has {len(found)} of {expected} messages that it held")
            return found
        except JournalDamageError as error:
            self._break(segment, str(error))
            return [] if self._read_only else segment.rows(condition, values)

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
                    expected = min(segment.num_since(arrival), limit - len(found))
                    found += self._rows(segment, condition, (arrival, limit - len(found)), expected)
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
                newest = max(
                    (h.last_arrival for (name, _), h in segment.streams.items() if name == incarnation), default=-1
                )
                if newest < arrival:
                    continue
                try:
                    found = segment.select(query, (arrival, incarnation))
                except JournalDamageError as error:
                    self._break(segment, str(error))
                    found = [] if self._read_only else segment.select(query, (arrival, incarnation))
                if found:
                    return int(found[0][0])
        return None

    def select(self, incarnation: str, keys: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Row]:
        """Return (rank, sequence) to its message, for those that are here.

        Raises:
            JournalError: a segment cannot be read.
        """
        found: dict[tuple[int, int], Row] = {}
        wanted = set(keys)
        with self._lock:
            for segment in self._segments[::-1]:
                here = [
                    (rank, sequence)
                    for rank, sequence in sorted(wanted)
                    if sequence in segment.streams.get((incarnation, rank), _NOTHING).ranges
                ]
                # One rank at a time: of a list of pairs SQLite would look through the whole incarnation.
                for rank, pairs in groupby(here, key=lambda key: key[0]):
                    sequences = [sequence for _, sequence in pairs]
                    for at in range(0, len(sequences), _READ_ROWS):
                        some = sequences[at : at + _READ_ROWS]
                        condition = f"incarnation = ? AND rank = ? AND sequence IN ({','.join('?' * len(some))})"
                        rows = self._rows(segment, condition, [incarnation, rank, *some], len(some))
                        found.update({(row.rank, row.sequence): row for row in rows})
                wanted.difference_update(here)
                if not wanted:
                    break
        return found

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            for segment in self._segments:
                segment.close()
            if self._writer is not None:
                self._writer.close()
                self._writer = None


_NOTHING: Final = Held()
