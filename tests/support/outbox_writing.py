"""Journals whose outbox a test fills, through the journal's own transaction."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sidestep.worker.intake.decisions import Closure
from sidestep.worker.intake.journal import Journal
from sidestep.worker.outbox import OutboxEntry, StoredEntry, entry
from sidestep.worker.records import StepClosing

START_SECONDS = 1_700_000_000.0


class OutboxWriter:
    """Writes a run's outbox, one closed step at a time."""

    def __init__(self, folder: Path, run_id: str = "run1") -> None:
        self.folder, self.run_id = folder, run_id
        self._journal = Journal(folder)
        self._step = self._journal.index.next_closed_number(run_id)

    def write(self, entries: Sequence[OutboxEntry]) -> list[StoredEntry]:
        """Close a step that says ``entries``."""
        closing = StepClosing(
            run_id=self.run_id, attempt=0, step=self._step, reason="complete", incarnation="i0", parts=()
        )
        self._step += 1
        return self._journal.index.write(self.run_id, [Closure(closing=closing, entries=tuple(entries))])

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()


def run_entry(**changes: Any) -> OutboxEntry:
    """Make the entry that opens a run."""
    value = {
        "run_id": "run1", "project": "digits", "entity": "lab", "name": "first try", "tags": ["a", "b"],
        "config": {"lr": 0.001, "model": {"depth": 4}},
        "environment": {"host": "trainer-7", "pid": 1, "git_commit": "0123abc", "command": ["python", "train.py"]},
        "settings": {"collapse_deadline": 500},
    }  # fmt: skip
    return entry("run", {**value, **changes})


def row_entry(number: int, **values: Any) -> OutboxEntry:
    """Make a row that tells its own number."""
    stamp = {"_timestamp": START_SECONDS + number, "train/step": 25 * number, "train/attempt": 0}
    return entry("row", {**stamp, "loss/total": 0.5 * number, **values})


def table_entry(number: int, table_id: str, rows: int = 2) -> OutboxEntry:
    """Make a table of samples, each with a picture."""
    return entry("table", {
        "_timestamp": START_SECONDS + number, "train/step": 25 * number, "train/attempt": 0,
        "sidecar/table_id": table_id, "key": "generation/samples",
        "columns": ["step", "image", "question", "generated", "target", "length"],
        "rows": [[25 * number, picture(i), f"question {i}", "", f"target {i}", i] for i in range(rows)],
    })  # fmt: skip


def picture(shade: int) -> dict[str, str]:
    """Make an image cell of 4 x 3 pixels."""
    stored = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, 2 * shade, 255 - shade)).save(stored, "PNG")
    return {"_type": "image", "png": base64.b64encode(stored.getvalue()).decode()}
