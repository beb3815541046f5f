"""How much of the disk raw messages may take (docs/delivery.md, section 7).

Over the budget, or on a full disk, whole segments go, the oldest first, and only those of which every message is
accounted for: the steps are closed, and what the projection knew after them is stored. The outbox, the closings and the
tables stay; so does the knowledge of which messages were here, so that none is taken twice.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Final

from sidestep.worker.intake.index import Index
from sidestep.worker.intake.reserve import RESERVE_FILE, Reserve
from sidestep.worker.intake.segment_file import SegmentFile
from sidestep.worker.intake.segments import Segments

_LOG: Final = logging.getLogger(__name__)
LEAST_SEGMENT_BYTES: Final = 1 << 16
_SEGMENTS_OF_BUDGET: Final = 8
_FOLD_SECONDS: Final = 60.0
"""Between two times that the index's log is folded in to save its room: it waits for who reads from it."""


def segment_bytes_within(segment_bytes: int, max_bytes: int) -> int:
    """Return the size of a segment such that some of them fit into the budget; 0 is no budget."""
    if not max_bytes:
        return segment_bytes
    return max(LEAST_SEGMENT_BYTES, min(segment_bytes, max_bytes // _SEGMENTS_OF_BUDGET))


def folder_bytes(folder: Path) -> int:
    """Return the size of a journal's files, logs and files set aside included, the reserve not."""
    total = 0
    for path in folder.iterdir():
        try:
            total += path.stat().st_size if path.name != RESERVE_FILE and path.is_file() else 0
        except FileNotFoundError:
            continue  # a log that was folded in while we looked
    return total


class Retention:
    """Keeps one journal within its budget. One thread calls it."""

    def __init__(
        self, folder: Path, index: Index, segments: Segments, *, max_bytes: int, reserve: Reserve | None
    ) -> None:
        """Keep ``folder`` below ``max_bytes``; 0 is no budget, and only a full disk makes segments go."""
        self._folder = folder
        self._index = index
        self._segments = segments
        self._max_bytes = max_bytes
        self._reserve = reserve
        self._was_told = False
        self._folded_at = -_FOLD_SECONDS

    def enforce(self) -> int:
        """Delete what is too much and may go; return the number of segments.

        Raises:
            JournalError: what the journal holds cannot be read, or the deletion cannot be recorded now.
        """
        deleted = 0
        if self._is_over_budget() and time.monotonic() - self._folded_at >= _FOLD_SECONDS:
            self._folded_at = time.monotonic()
            self._index.database.fold_log()
        while self._is_over_budget():
            oldest = self._oldest_that_may_go()
            if oldest is None:
                self._tell()
                break
            self._delete(oldest, f"the journal is over {self._max_bytes >> 20} MiB")
            deleted += 1
        while self._reserve is not None and not self._reserve.has_room() and self._reserve.lacking_bytes:
            oldest = self._oldest_that_may_go()
            if oldest is None:
                break
            self._delete(oldest, "the disk is full")
            deleted += 1
        return deleted

    def _oldest_that_may_go(self) -> SegmentFile | None:
        oldest = next(iter(self._segments.sealed()), None)
        return oldest if oldest is not None and self.may_go(oldest) else None

    def _delete(self, segment: SegmentFile, why: str) -> None:
        size_bytes, messages = segment.size_bytes(), sum(len(held.ranges) for held in segment.streams.values())
        self._segments.delete(segment)
        _LOG.warning(
            "%s: segment %d with %d raw messages (%d MiB) is deleted, %s; its steps are in the runs, a replay of them "
            "is not possible any more",
            self._folder,
            segment.number,
            messages,
            size_bytes >> 20,
            why,
        )

    def _is_over_budget(self) -> bool:
        return self._max_bytes > 0 and folder_bytes(self._folder) > self._max_bytes

    def may_go(self, segment: SegmentFile) -> bool:
        """Return whether every message of a full segment is accounted for."""
        names = {name for name, _ in segment.streams}
        incarnations = {each.incarnation: each for each in self._index.incarnations()}
        for name in names:
            known = incarnations.get(name)
            if known is None:
                continue
            pending = self._index.pending_arrival(known.run_id)
            if pending > segment.last_arrival:
                continue
            newest = self._index.incarnations(known.run_id)[-1]
            has_ended = known.attempt in {ending.attempt for ending in self._index.endings(known.run_id)}
            if has_ended and newest.incarnation != name:
                continue  # what an older attempt sends after its end is left out
            first = self._segments.first_since(name, pending)
            if first is not None and first <= segment.last_arrival:
                return False
        return True

    def _tell(self) -> None:
        if self._was_told:
            return
        self._was_told = True
        oldest = next(iter(self._segments.sealed()), None)
        why = (
            "what else is in it is kept in any case: the index with the outbox and the tables, the newest segment, and "
            "files that were set aside"
            if oldest is None
            else f"segment {oldest.number}, the oldest, has messages of steps that have not closed"
        )
        _LOG.warning(
            "the journal %s takes %d MiB, over its budget of %d MiB (journal_max_bytes), and no segment may go: %s",
            self._folder,
            folder_bytes(self._folder) >> 20,
            self._max_bytes >> 20,
            why,
        )
