"""What an index records of a run, brought over to another as it is: all there is where its messages are gone."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from functools import partial
from typing import Any, Final

from sidestep.worker.intake.database import Database
from sidestep.worker.intake.decision_tables import DECISION_TABLES

_COPY_ROWS: Final = 1_000


def copy_run(source: Database, run_id: str, target: Database) -> None:
    """Bring a run's decisions and its outbox over, in place of any that are there.

    Raises:
        JournalError: ``source`` cannot be read, or ``target`` not be written.
    """
    for table in (*DECISION_TABLES, "outbox"):
        target.write(partial(_clear, table, run_id))
        for rows in _batches(source, table, run_id):
            target.write(partial(_insert, table, rows))


def _clear(table: str, run_id: str, connection: sqlite3.Connection) -> None:
    connection.execute(f"DELETE FROM {table} WHERE run_id = ?", (run_id,))  # noqa: S608  (the names above)


def _insert(table: str, rows: list[tuple[Any, ...]], connection: sqlite3.Connection) -> None:
    connection.executemany(f"INSERT INTO {table} VALUES ({','.join('?' * len(rows[0]))})", rows)  # noqa: S608


def _batches(source: Database, table: str, run_id: str) -> Iterator[list[tuple[Any, ...]]]:
    if not source.rows("SELECT 1 FROM sqlite_master WHERE name = ?", table):
        return  # of an older version
    number = "position" if table == "outbox" else "closed_number"
    ((newest,),) = source.rows(f"SELECT COALESCE(MAX({number}), -1) FROM {table} WHERE run_id = ?", run_id)  # noqa: S608
    query = f"SELECT * FROM {table} WHERE run_id = ? AND {number} BETWEEN ? AND ? ORDER BY {number}"  # noqa: S608
    for first in range(0, newest + 1, _COPY_ROWS):
        if rows := source.rows(query, run_id, first, first + _COPY_ROWS - 1):
            yield rows
