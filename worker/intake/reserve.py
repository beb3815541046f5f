"""Room that is kept for a full disk (docs/delivery.md, section 7).

SQLite cannot even delete where there is no room. So a file holds some; it is given up when a write fails, for closings,
states and the deletion of segments alone: messages are stored again once the file can be made again, and some room is
left beside it.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

_LOG: Final = logging.getLogger(__name__)

RESERVE_FILE: Final = "reserve"
RESERVE_BYTES: Final = 64 << 20
_LEFT_BESIDE: Final = 8
"""A part of the reserve's size, one in so many, has to be free beside it before messages are stored again."""
_TRY_AGAIN_SECONDS: Final = 0.5
_BLOCK_BYTES: Final = 1 << 20


class Reserve:
    """The file, and whether the disk is full at the moment. Any thread may call it."""

    def __init__(
        self, folder: Path, size_bytes: int = RESERVE_BYTES, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Make the file where there is room; where there is none, say so and go on without."""
        self.path = folder / RESERVE_FILE
        self.size_bytes = size_bytes
        self.times_full = 0
        """How often the disk has become full."""
        self._clock = clock
        self._lock = threading.Lock()
        self._is_full = False
        self._tried_at = -_TRY_AGAIN_SECONDS
        self._is_made = self._make()
        if not self._is_made:
            _LOG.warning(
                "the disk of %s has no room for a reserve of %d MiB (%d MiB are free): when it is full, the journal "
                "cannot even be tidied up",
                folder,
                size_bytes >> 20,
                self.free_bytes >> 20,
            )

    @property
    def free_bytes(self) -> int:
        """Free bytes of the journal's file system, as this user sees them; 0 where that cannot be told."""
        try:
            found = os.statvfs(self.path.parent)
        except OSError as error:
            _LOG.warning("the room beside %s cannot be told: %s", self.path, error)
            return 0
        return found.f_bavail * found.f_frsize

    @property
    def is_full(self) -> bool:
        """Whether the disk was full and has not enough room yet."""
        return self._is_full

    @property
    def reason(self) -> str:
        """Why nothing more is stored now, for people; empty where that is not so."""
        if not self._is_full:
            return ""
        return (
            f"the disk of {self.path.parent} is full; messages are stored again when {self._wanted >> 20} MiB are "
            f"free ({self.free_bytes >> 20} MiB are)"
        )

    @property
    def _wanted(self) -> int:
        return self.size_bytes + self.size_bytes // _LEFT_BESIDE

    @property
    def lacking_bytes(self) -> int:
        """What has to be freed before messages are stored again, while the disk is full; else 0."""
        return max(0, self._wanted - self.free_bytes) if self._is_full else 0

    def give_up(self) -> bool:
        """A write has found the disk full: free the reserve; return whether there was one to free."""
        with self._lock:
            if not self._is_full:
                self._is_full = True
                self.times_full += 1
                self._tried_at = self._clock()
                _LOG.error(
                    "the disk of %s is full: nothing that arrives is stored until there is room, what the trainers "
                    "still hold then comes again",
                    self.path.parent,
                )
            if not self._is_made:
                return False
            self._is_made = False
            self.path.unlink(missing_ok=True)
            return True

    def has_room(self) -> bool:
        """Return whether messages may be stored; where the disk was full, look whether there is room again."""
        with self._lock:
            if not self._is_full:
                return True
            if self._clock() - self._tried_at < _TRY_AGAIN_SECONDS:
                return False
            self._tried_at = self._clock()
            if self.free_bytes < self._wanted or not self._make():
                return False
            self._is_made, self._is_full = True, False
            _LOG.warning("the disk of %s has room again: what arrives is stored", self.path.parent)
            return True

    def _make(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                _fill(descriptor, self.size_bytes)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
                _LOG.warning("the reserve %s cannot be made: %s", self.path, error.strerror)
            self.path.unlink(missing_ok=True)
            return False
        return True

    def remove(self) -> None:
        """Give the room back: nobody writes here any more."""
        with self._lock:
            self._is_made = False
            self.path.unlink(missing_ok=True)


def _fill(descriptor: int, size_bytes: int) -> None:
    """Give the file real blocks; a file system that cannot promise them has them written."""
    os.ftruncate(descriptor, min(os.fstat(descriptor).st_size, size_bytes))
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
            raise
        for at in range(0, size_bytes, _BLOCK_BYTES):
            os.pwrite(descriptor, os.urandom(min(_BLOCK_BYTES, size_bytes - at)), at)
