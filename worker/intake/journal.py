"""The journal of a worker: a folder with an index and segments, open for writing once at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from sidestep.worker.errors import JournalError, JournalLockedError
from sidestep.worker.home import INDEX_FILE
from sidestep.worker.intake.assembly import Journaled, Key, journaled
from sidestep.worker.intake.index import Index
from sidestep.worker.intake.segments import Segments
from sidestep.worker.records import StepClosing

LOCK_FILE: Final = "lock"


class Journal:
    """One journal's parts, opened together."""

    def __init__(self, folder: Path, *, segment_bytes: int = 1 << 30, read_only: bool = False) -> None:
        """Open ``folder``, made with mode 0700 where it is missing.

        Raises:
            JournalLockedError: another worker has it open.
            JournalError: it cannot be written, or what is in it cannot be read.
        """
        self.folder = folder
        self._lock_descriptor = -1
        if read_only:
            if not (folder / INDEX_FILE).is_file():
                raise JournalError(f"{folder} holds no journal")
        else:
            self._lock_descriptor = _locked(folder)
        try:
            self.index = Index(folder / INDEX_FILE, read_only=read_only)
            self.segments = Segments(folder, self.index, segment_bytes=segment_bytes, read_only=read_only)
        except BaseException:
            self._unlock()
            raise

    def messages(self, incarnation: str, keys: Iterable[Key]) -> dict[Key, Journaled]:
        """Return the messages of an incarnation that are here, by (rank, sequence).

        Raises:
            JournalError: a segment or a message cannot be read.
        """
        return {key: journaled(row) for key, row in self.segments.select(incarnation, keys).items()}

    def messages_of(self, closing: StepClosing) -> dict[Key, Journaled]:
        """Return the messages that a closing used; raises JournalError as ``messages`` does."""
        return self.messages(closing.incarnation, (*closing.parts, *closing.late_parts))

    def close(self) -> None:
        """Close the files, then let go of the lock."""
        self.segments.close()
        self.index.close()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock_descriptor >= 0:
            os.close(self._lock_descriptor)
            self._lock_descriptor = -1


def _locked(folder: Path) -> int:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise JournalError(f"the journal's folder {folder} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise JournalLockedError(f"another worker has the journal {folder} open") from None
    return descriptor
