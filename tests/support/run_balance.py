"""What has to hold of a journal when all is over: everything used once, nothing doubled, no gap, the same replay."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from sidestep.protocol.messages import Goodbye, Kind, StepEnd
from sidestep.worker.intake.assembly import journaled
from sidestep.worker.intake.journal import Journal
from sidestep.worker.records import StepClosing
from sidestep.worker.replay import entries_of, replay


def check_balance(folder: Path, out: Path) -> None:
    """Fail where a journal's run lost or doubled anything, or where its replay is not the same bytes.

    Everything that was stored is in one closing, ends that came late apart; steps close once an attempt; positions and
    row numbers have no gap; and all attempts have ended.
    """
    journal = Journal(folder, read_only=True)
    try:
        for run_id in journal.index.runs():
            check_run(journal, run_id)
    finally:
        journal.close()
    _, compared = replay(folder, out, lambda _made: None)
    for made in compared:
        assert made.is_identical, made
        assert made.is_ended, made


def check_run(journal: Journal, run_id: str) -> None:
    """Fail where a run lost or doubled anything."""
    closings = [each for each in journal.index.closings(run_id) if isinstance(each, StepClosing)]
    used = Counter((each.incarnation, *key) for each in closings for key in (*each.parts, *each.late_parts))
    names = {each.incarnation for each in journal.index.incarnations(run_id)}
    stored = [journaled(row) for row in journal.segments.since(0, 1_000_000) if row.incarnation in names]
    assert set(used.values()) <= {1}, "a message was used twice"
    assert used.keys() <= {(each.envelope.incarnation, *each.key) for each in stored}
    unused = [each for each in stored if (each.envelope.incarnation, *each.key) not in used]
    assert all(isinstance(each.message, (Goodbye, StepEnd)) for each in unused), unused  # an end that came late is over
    steps = Counter((each.attempt, each.step) for each in closings if each.reason != "tail")
    assert not [step for step, count in steps.items() if count > 1]
    entries = list(entries_of(journal.index, run_id))
    assert [each.position for each in entries] == list(range(len(entries)))
    numbers = [each.row_number for each in entries if each.row_number is not None]
    assert numbers == list(range(len(numbers)))


def rows_of(folder: Path, run_id: str = "run-1") -> list[dict[str, Any]]:
    """Return the run's rows, in order."""
    journal = Journal(folder, read_only=True)
    try:
        return [json.loads(each.payload) for each in entries_of(journal.index, run_id) if each.kind == "row"]
    finally:
        journal.close()


def num_answers(row: dict[str, Any]) -> int:
    """Return how many answers of the epoch a row counts."""
    return int(sum(row["data/answer_length_histogram"]["counts"]))


def late_parts(rows: list[dict[str, Any]]) -> dict[tuple[int, int], int]:
    """Return (attempt, step) to the late parts that its row counts."""
    name = "sidecar/late_parts"
    return {(row["train/attempt"], row["train/step"]): row[name] for row in rows if name in row}


PARTS_OF_A_STEP = len({Kind.LEARNING_RATES, Kind.LOSSES, Kind.ANSWERS})
"""That ``step_messages`` sends beside the step's end."""
