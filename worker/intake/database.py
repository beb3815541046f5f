"""How the journal's SQLite files are opened and written.

Write-ahead log and ``synchronous=FULL``: what a commit returned from is on the disk, a power loss included.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sidestep.worker.errors import JournalError, JournalWriteError


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Open one of the journal's files with the settings that its promises need.

    Raises:
        JournalError: it cannot be opened.
    """
    try:
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=10.0,
        )
        connection.execute("PRAGMA busy_timeout=10000")
        if not read_only:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
    except sqlite3.Error as error:
        raise JournalError(f"{path} cannot be opened: {error}") from error
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Commit what the block writes, or nothing.

    Raises:
        JournalWriteError: the disk is full or failing; the block may be tried again.
    """
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield connection
        connection.execute("COMMIT")
    except BaseException as error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        if isinstance(error, sqlite3.OperationalError):
            raise JournalWriteError(str(error)) from error
        raise
