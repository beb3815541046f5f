"""How the journal's SQLite files are opened and written.

Write-ahead log and ``synchronous=FULL``: what a commit returned from is on the disk, a power loss included. On a
network file system a rollback journal takes the log's place: the log needs memory that all its readers share.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sidestep.worker.errors import JournalDamageError, JournalError, JournalWriteError

BUSY_SECONDS: Final = 10.0
_LOG_BYTES: Final = 16 << 20
"""A log that a great transaction made longer is cut to this when it is begun anew."""
_DAMAGE_CODES: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_DAMAGE_EXTENDED_CODES: Final = frozenset({sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_CORRUPTFS})
_FULL_CODES: Final = frozenset({
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_SHMSIZE,
})  # fmt: skip


def is_damage(error: Exception) -> bool:
    """Return whether the file itself is broken: what it says is no database, or less than it once said."""
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and (code & 0xFF in _DAMAGE_CODES or code in _DAMAGE_EXTENDED_CODES)


def is_full(error: BaseException | None) -> bool:
    """Return whether a write failed for want of room; a quota's end is told as a failed write."""
    return getattr(error, "sqlite_errorcode", None) in _FULL_CODES


def connect(path: Path, *, read_only: bool = False, shared_log: bool = True) -> sqlite3.Connection:
    """Open one of the journal's files with the settings that its promises need.

    Args:
        path: the file; made where it is missing and this is no reading.
        read_only: open it for reading.
        shared_log: keep a write-ahead log; False: a rollback journal, for network file systems.

    Raises:
        JournalDamageError: it is no database.
        JournalError: it cannot be opened.
    """
    connection = None
    try:
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=BUSY_SECONDS,
        )
        connection.execute(f"PRAGMA busy_timeout={int(BUSY_SECONDS * 1_000)}")
        if not read_only:
            connection.execute(f"PRAGMA journal_mode={'WAL' if shared_log else 'TRUNCATE'}")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute(f"PRAGMA journal_size_limit={_LOG_BYTES}")
    except sqlite3.Error as error:
        if connection is not None:
            connection.close()
        kind = JournalDamageError if is_damage(error) else JournalError
        raise kind(f"{path} cannot be opened: {error}") from error
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Commit what the block writes, or nothing.

    Raises:
        JournalWriteError: the disk is full or failing; the block may be tried again.
        JournalDamageError: the file is broken.
    """
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield connection
        connection.execute("COMMIT")
    except BaseException as error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        if isinstance(error, sqlite3.Error) and is_damage(error):
            raise JournalDamageError(str(error)) from error
        if isinstance(error, sqlite3.OperationalError):
            raise JournalWriteError(str(error)) from error
        raise


class Database:
    """One file, one connection, shared by threads under a lock."""

    def __init__(self, path: Path, *, read_only: bool = False, shared_log: bool = True) -> None:
        """Open it; raises as ``connect`` does."""
        self.path = path
        self.lock = threading.RLock()
        self.connection = connect(path, read_only=read_only, shared_log=shared_log)
        self.on_full: Callable[[], bool] = lambda: False
        """Called when the disk is full; returns whether it has made room, so that the write is worth another try."""
        self.damage = ""
        """What is broken in it; empty while nothing is."""

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Return what a query finds.

        Raises:
            JournalDamageError: the file is broken.
            JournalError: it cannot be read now.
        """
        with self.lock:
            try:
                return self.connection.execute(query, values).fetchall()
            except sqlite3.Error as error:
                if is_damage(error):
                    raise self._damaged(error) from error
                raise JournalError(f"{self.path} cannot be read: {error}") from error

    def write(self, block: Callable[[sqlite3.Connection], Any]) -> Any:
        """Run ``block`` in one transaction and return what it returns; on a full disk once more, if there is room then.

        Raises:
            JournalWriteError: nothing was stored, try again.
        """
        with self.lock:
            try:
                return self._write_once(block)
            except JournalWriteError as error:
                if not is_full(error.__cause__) or not self.on_full():
                    raise
            return self._write_once(block)

    def fold_log(self) -> None:
        """Bring the write-ahead log into the file and cut it, as far as nobody reads from it; without a log: nothing.

        Raises:
            JournalError: it cannot be written now.
        """
        self.rows("PRAGMA wal_checkpoint(TRUNCATE)")

    def _write_once(self, block: Callable[[sqlite3.Connection], Any]) -> Any:
        try:
            with transaction(self.connection) as connection:
                return block(connection)
        except JournalDamageError as error:
            raise JournalWriteError(str(self._damaged(error))) from error

    def _damaged(self, error: Exception) -> JournalDamageError:
        self.damage = damage_text(self.path, error)
        return JournalDamageError(self.damage)

    def close(self) -> None:
        """Close the file; the last one to do so folds the write-ahead log in."""
        with self.lock:
            self.connection.close()


def damage_text(path: Path, error: Exception | str) -> str:
    """Return what is said of a broken index, and what can be done."""
    return (
        f"the journal's index {path} is damaged ({error}). The segments beside it are as they were. Either mend it "
        f"(`sqlite3 {path} .recover | sqlite3 mended.sqlite`, then put mended.sqlite in its place), or move "
        f"{path.parent} away and start again: a running trainer brings its tables and all that it still holds to the "
        "new journal"
    )
