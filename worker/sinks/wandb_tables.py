"""Which tables of earlier children are to be sent once more: logged, but perhaps never uploaded.

They are asked for by their row numbers; the worker appends each to the outbox as a new row, with the same
``sidecar/table_id`` (docs/delivery.md, section 4).
"""

from __future__ import annotations

from sidestep.worker.outbox import StoredEntry
from sidestep.worker.sinks.outbox_reader import OutboxReader
from sidestep.worker.sinks.wandb_marks import Marks

MAX_REPEATS = 20
"""A table that was asked for so often is given up: what keeps it away is no kill."""


def undone_tables(reader: OutboxReader, marks: Marks, next_row: int) -> tuple[int, ...]:
    """Return the rows whose tables are to be appended again, and take all others off the marks.

    What W&B does not have as a row (``next_row`` and later) is sent anyway; what was appended again since is that row's
    business. The marks of the rows returned stay until then.
    """
    undone = owed_tables(reader, marks, next_row)
    if undone:
        marks.table_repeats |= {name: marks.table_repeats.get(name, 0) + 1 for name in undone}
        marks.save()
    marks.confirm_tables(set(marks.tables_open) - set(undone.values()))
    return tuple(sorted(undone.values()))


def owed_tables(reader: OutboxReader, marks: Marks, next_row: int) -> dict[str, int]:
    """Return the tables, id to row, that W&B has as rows below ``next_row`` and perhaps not as files."""
    held = [row for row in marks.tables_open if row < next_row]
    if not held:
        return {}
    newest: dict[str, int] = {}
    for entry in reader.tables(from_row=min(held)):
        if (name := table_id(entry)) and entry.row_number is not None:
            newest[name] = entry.row_number
    return {name: row for name, row in newest.items() if row in held and marks.table_repeats.get(name, 0) < MAX_REPEATS}


def table_id(entry: StoredEntry) -> str:
    """Return a table's ``sidecar/table_id``; empty where it has none, or is no JSON."""
    try:
        value = entry.value()
    except ValueError:
        return ""
    return str(value.get("sidecar/table_id", ""))
