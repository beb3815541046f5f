"""Writes the report of one run of a journal, live or ended."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from sidestep.worker.errors import JournalError
from sidestep.worker.home import INDEX_FILE
from sidestep.worker.outbox import StoredEntry
from sidestep.worker.sinks.outbox_reader import OutboxReader
from sidestep.worker.sinks.report.history import read_history
from sidestep.worker.sinks.report.page import render_page
from sidestep.worker.sinks.report.sections import build_sections
from sidestep.worker.sinks.report.verdict import reach_verdict

_BATCH_ENTRIES = 1_000


def write_report(journal: Path, run_id: str | None, out: Path) -> Path:
    """Write the report of ``run_id`` (None: the journal's newest run) to the file ``out`` and return its path.

    The file is replaced as a whole, so that a reader never sees half a page.

    Raises:
        JournalError: the folder is no journal, or has no such run.
        OSError: ``out`` cannot be written.
    """
    chosen = run_id or newest_run(journal)
    reader = OutboxReader(journal, chosen)
    try:
        history = read_history(_entries(reader))
    except sqlite3.Error as error:
        raise JournalError(f"the journal {journal} cannot be read: {error}") from error
    finally:
        reader.close()
    if not history.run and not history.num_rows:
        raise JournalError(f"the journal {journal} has no rows of a run {chosen!r} yet")
    history.run.setdefault("run_id", chosen)
    page = render_page(history, reach_verdict(history), build_sections(history))
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.with_name(f".{out.name}.new")
    fresh.write_text(page, encoding="utf-8", errors="backslashreplace")
    return fresh.replace(out)


def newest_run(journal: Path) -> str:
    """Return the id of the run that the journal met last.

    Raises:
        JournalError: the folder is no journal, or has no run.
    """
    index = journal.resolve() / INDEX_FILE
    if not index.is_file():
        raise JournalError(f"{journal} is not a journal: it holds no {INDEX_FILE}")
    try:
        with closing(sqlite3.connect(f"file:{quote(str(index))}?mode=ro", uri=True, timeout=5.0)) as connection:
            row = connection.execute("SELECT run_id FROM run ORDER BY created_at DESC, rowid DESC LIMIT 1").fetchone()
    except sqlite3.Error as error:
        raise JournalError(f"the journal {journal} cannot be read: {error}") from error
    if row is None:
        raise JournalError(f"the journal {journal} has no run yet")
    return str(row[0])


def _entries(reader: OutboxReader) -> Iterator[StoredEntry]:
    position = -1
    while batch := reader.after(position, _BATCH_ENTRIES):
        yield from batch
        position = batch[-1].position
