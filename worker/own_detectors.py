"""Detectors from elsewhere as a journal remembers them: a replay judges by the same ones, or says which are missing."""

from __future__ import annotations

import json
from collections.abc import Sequence

from sidestep.worker.intake.index import Index

_KEY = "own_detectors"


def remember(index: Index, references: Sequence[str]) -> None:
    """Record the ``package.module:Class`` references that this journal's runs are judged by from now on.

    Raises:
        JournalWriteError: nothing was stored.
    """
    if tuple(references) == recorded(index):
        return
    text = json.dumps(list(references))
    index.database.write(lambda write: write.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_KEY, text)))


def recorded(index: Index) -> tuple[str, ...]:
    """Return the references that were recorded last, none where there never were any."""
    rows = index.database.rows("SELECT value FROM meta WHERE key = ?", _KEY)
    return tuple(str(each) for each in json.loads(rows[0][0])) if rows else ()
