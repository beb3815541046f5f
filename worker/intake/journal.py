"""The journal of a worker: a folder with an index and segments, open for writing once at a time."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from sidestep.worker.errors import JournalDamageError, JournalError, JournalLockedError
from sidestep.worker.home import INDEX_FILE
from sidestep.worker.intake.assembly import Journaled, Key, journaled
from sidestep.worker.intake.damage import damage_text
from sidestep.worker.intake.decisions import Closure, Loss
from sidestep.worker.intake.file_system import network_file_system
from sidestep.worker.intake.index import Index
from sidestep.worker.intake.reserve import Reserve
from sidestep.worker.intake.retention import Retention, folder_bytes, segment_bytes_within
from sidestep.worker.intake.segments import Segments
from sidestep.worker.outbox import StoredEntry
from sidestep.worker.records import StepClosing

_LOG: Final = logging.getLogger(__name__)
LOCK_FILE: Final = "lock"
_LEAST_FREE_BYTES: Final = 4 << 20


class Journal:
    """One journal's parts, opened together."""

    def __init__(
        self,
        folder: Path,
        *,
        segment_bytes: int = 1 << 30,
        max_bytes: int = 0,
        reserve_bytes: int = 0,
        on_network_fs: bool = False,
        read_only: bool = False,
    ) -> None:
        """Open ``folder``, made with mode 0700 where it is missing.

        Args:
            folder: where it lies.
            segment_bytes: size at which a segment is full.
            max_bytes: what its files may take before old segments go; 0: no bound.
            reserve_bytes: room kept for a full disk; 0: none.
            on_network_fs: use it on a network file system too, with a rollback journal.
            read_only: change nothing.

        Raises:
            JournalLockedError: another worker has it open.
            JournalDamageError: its index is broken; the text says what to do.
            JournalError: it cannot be written, lies on a network file system, or what is in it cannot be read.
        """
        self.folder = folder
        self.reserve: Reserve | None = None
        self._lock_descriptor = -1
        shared_log = True
        if read_only:
            if not (folder / INDEX_FILE).is_file():
                raise JournalError(f"{folder} holds no journal")
        else:
            network = network_file_system(folder)
            if network and not on_network_fs:
                raise JournalError(
                    f"{folder} lies on a network file system ({network}), which promises neither that a commit is on a "
                    "disk nor that a lock holds: name a local folder with --journal, or take slower commits there with "
                    "--journal-on-network-fs"
                )
            shared_log = not network
            self._lock_descriptor = _locked(folder)
        try:
            if reserve_bytes and not read_only:
                self.reserve = Reserve(folder, reserve_bytes)
                if self.reserve.free_bytes < min(_LEAST_FREE_BYTES, reserve_bytes):
                    self.reserve.give_up()  # it was full already: what a start writes needs some room
            self._open(
                segment_bytes=segment_bytes_within(segment_bytes, max_bytes), read_only=read_only, shared_log=shared_log
            )
        except BaseException:
            self._unlock()
            raise
        self._retention = Retention(folder, self.index, self.segments, max_bytes=max_bytes, reserve=self.reserve)
        self._max_bytes = max_bytes
        self._told: set[tuple[str, str]] = set()

    def _open(self, *, segment_bytes: int, read_only: bool, shared_log: bool) -> None:
        try:
            self._open_files(segment_bytes=segment_bytes, read_only=read_only, shared_log=shared_log)
        except JournalDamageError:
            raise
        except JournalError:
            if self.reserve is None or self.reserve.free_bytes > self.reserve.size_bytes or not self.reserve.give_up():
                raise
            self._open_files(segment_bytes=segment_bytes, read_only=read_only, shared_log=shared_log)

    def _open_files(self, *, segment_bytes: int, read_only: bool, shared_log: bool) -> None:
        self.index = Index(self.folder / INDEX_FILE, read_only=read_only, shared_log=shared_log)
        if self.reserve is not None:
            self.index.database.on_full = self.reserve.give_up
        try:
            self.segments = Segments(
                self.folder, self.index, segment_bytes=segment_bytes, read_only=read_only, reserve=self.reserve
            )
        except BaseException:
            self.index.close()
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

    # ------------------------------------------------------------------------------------------------ upkeep

    def tidy(self) -> list[StoredEntry]:
        """Keep to the budget, and let the runs say what broke; return the entries that were written for that.

        Raises:
            JournalError: that cannot be done now.
        """
        self._retention.enforce()
        stored: list[StoredEntry] = []
        for found in self.segments.damaged():
            for run_id in self.index.runs():
                if (run_id, found.file) in self._told or not self.index.outbox(run_id, limit=1):
                    continue
                incarnations = [each.incarnation for each in self.index.incarnations(run_id)]
                is_said = any(loss.file == found.file for loss in self.index.losses(run_id))
                text = "" if is_said else damage_text(found, incarnations)
                if text:
                    attempt = len(incarnations) - 1
                    loss = Loss(run_id=run_id, attempt=attempt, file=found.file, text=text)
                    stored += self.index.write(run_id, [Closure(closing=loss, entries=loss.entries())])
                self._told.add((run_id, found.file))
        return stored

    def missing_messages(self, run_id: str) -> str:
        """Return why a run cannot be rebuilt from its messages: which went, or broke; empty where all are here."""
        names = [each.incarnation for each in self.index.incarnations(run_id)]
        gone = self.segments.num_gone(names)
        parts = [f"segment {number} cannot be read ({reason})" for number, reason in self.segments.unreadable().items()]
        broken = [found.file for found in self.segments.damaged() if damage_text(found, names)]
        if broken:
            parts.append(f"files of the journal were damaged: {', '.join(broken)}")
        if gone:
            parts.append(f"{gone} of its raw messages are not kept any more")
        return "; ".join(parts)

    @property
    def trouble(self) -> str:
        """Why nothing can be stored at the moment, empty while it can."""
        return self.index.database.damage or (self.reserve.reason if self.reserve is not None else "")

    def statistics(self) -> dict[str, Any]:
        """Return how the journal stands, or why that cannot be told; any thread may ask."""
        try:
            return self._statistics()
        except JournalError as error:
            return {"bytes": folder_bytes(self.folder), "unreadable": str(error)}

    def _statistics(self) -> dict[str, Any]:
        deleted = self.index.segments.deleted()
        return {
            "bytes": folder_bytes(self.folder),
            "max_bytes": self._max_bytes,
            "segments": len(self.segments.sealed()) + 1,
            "segments_deleted": len(deleted),
            "messages_deleted": sum(each.messages for each in deleted),
            "damaged": [
                {
                    "file": found.file,
                    "reason": found.reason,
                    "messages_lost": sum(len(ranges) for ranges in found.lost.values()),
                    "messages_used": sum(len(ranges) for ranges in found.used.values()),
                }
                for found in self.segments.damaged()
            ],
            "free_bytes": self.reserve.free_bytes if self.reserve is not None else None,
            "times_full": self.reserve.times_full if self.reserve is not None else 0,
        }

    def close(self) -> None:
        """Close the files, give the reserve's room back, then let go of the lock."""
        self.segments.close()
        self.index.close()
        self._unlock()

    def _unlock(self) -> None:
        if self.reserve is not None:
            self.reserve.remove()
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
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        os.close(descriptor)
        named = f" (pid {holder})" if holder.isdigit() else ""
        raise JournalLockedError(
            f"another worker has the journal {folder} open{named}: use that one, or name another folder with --journal"
        ) from None
    except OSError as error:
        os.close(descriptor)
        raise JournalError(f"the journal's folder {folder} cannot be locked: {error.strerror}") from error
    _sign(descriptor, folder)
    return descriptor


def _sign(descriptor: int, folder: Path) -> None:
    """Say in the lock's file whose it is; the lock itself goes with the process that holds it, whatever is written."""
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        _LOG.warning("the lock of %s does not say whose it is: %s", folder, error.strerror)
