"""What a journal holds, read beside its worker or without one: what ``sidestep replay`` and the next worker find."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from sidestep.worker.errors import JournalError
from sidestep.worker.intake.journal import Journal
from sidestep.worker.sinks.outbox_reader import OutboxReader


def holdings(folder: Path) -> dict[str, Any]:
    """Return a journal's messages and runs; what cannot be read is said under ``problem``.

    Keys: ``last_written`` (unix seconds), ``bytes``, ``messages``, and ``runs``: run id to ``attempts``, ``is_ended``,
    ``exit_code`` (None while it goes on), ``closed_step``, ``rows`` and ``entries``.
    """
    stats = [file.stat() for file in sorted(folder.glob("*.sqlite*"))]
    found: dict[str, Any] = {
        "last_written": max((each.st_mtime for each in stats), default=0.0),
        "bytes": sum(each.st_size for each in stats),
        "messages": 0,
        "runs": {},
    }
    try:
        journal = Journal(folder, read_only=True)
    except (JournalError, OSError, sqlite3.Error) as error:
        return {**found, "problem": str(error)}
    try:
        found["messages"] = journal.segments.next_arrival
        for run_id in journal.index.runs():
            found["runs"][run_id] = _run(journal, folder, run_id)
    except (JournalError, sqlite3.Error) as error:
        found["problem"] = str(error)
    finally:
        journal.close()
    return found


def _run(journal: Journal, folder: Path, run_id: str) -> dict[str, Any]:
    attempts = journal.index.incarnations(run_id)
    ended = [each for each in journal.index.endings(run_id) if each.attempt == attempts[-1].attempt]
    closed = journal.index.last_step_closing(run_id, attempts[-1].attempt)
    reader = OutboxReader(folder, run_id)
    try:
        return {
            "attempts": len(attempts),
            "is_ended": bool(ended),
            "exit_code": ended[-1].exit_code if ended else None,
            "closed_step": -1 if closed is None else closed.step,
            "rows": reader.num_rows(),
            "entries": reader.newest_position() + 1,
        }
    finally:
        reader.close()
