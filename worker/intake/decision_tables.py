"""The index's tables of decisions: how each kind is written and read."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from typing import Any, Final

from sidestep.worker.intake.decisions import (
    Closure,
    Decision,
    Ending,
    Loss,
    Repeat,
    Rewind,
    context_of_row,
    ending_of_row,
    loss_of_row,
    repeat_of_row,
    rewind_of_row,
    step_closing_of_row,
)
from sidestep.worker.intake.schema import pack_pairs
from sidestep.worker.records import StepClosing

DECISION_TABLES: Final[Mapping[str, Callable[[tuple[Any, ...]], Decision]]] = {
    "step_closed": step_closing_of_row,
    "ending": ending_of_row,
    "context": context_of_row,
    "repeat": repeat_of_row,
    "rewind": rewind_of_row,
    "loss": loss_of_row,
}


def write_decision(connection: sqlite3.Connection, run_id: str, number: int, closure: Closure) -> None:
    """Store a closure's decision under its number; its entries and state are stored by the index."""
    closing = closure.closing
    values: tuple[object, ...]
    if isinstance(closing, StepClosing):
        table, values = "step_closed", (
            run_id, closing.attempt, closing.step, closing.reason, closing.incarnation, pack_pairs(closing.parts),
            pack_pairs(closing.late_parts), closing.ranks_expected, number, closure.pending_arrival,
            closure.last_arrival,
        )  # fmt: skip
    elif isinstance(closing, Ending):
        table, values = "ending", (
            run_id, closing.attempt, number, closing.exit_code, closing.reason, int(closing.tail_unknown),
            closing.unix_time, closing.newest_step, closure.pending_arrival,
        )  # fmt: skip
    elif isinstance(closing, Repeat):
        rows = pack_pairs([(row_number, 0) for row_number in closing.row_numbers])
        table, values = "repeat", (run_id, closing.attempt, number, rows)
    elif isinstance(closing, Rewind):
        table, values = "rewind", (
            run_id, closing.attempt, number, closing.step, closing.source_number, closing.snapshot_number,
            int(closing.is_exact),
        )  # fmt: skip
    elif isinstance(closing, Loss):
        table, values = "loss", (run_id, closing.attempt, number, closing.file, closing.text)
    else:
        ranks, missing = pack_pairs([(rank, 0) for rank in closing.ranks]), " ".join(closing.missing)
        table, values = "context", (
            run_id, closing.attempt, closing.revision, number, closing.incarnation, ranks, missing,
        )  # fmt: skip
    connection.execute(f"INSERT INTO {table} VALUES ({','.join('?' * len(values))})", values)  # noqa: S608  (names above)
