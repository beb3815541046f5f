"""Which tables are sent once more after a kill, and when a table counts as uploaded."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.support.outbox_writing import OutboxWriter, row_entry, run_entry, table_entry

from sidestep.worker.sinks.outbox_reader import OutboxReader
from sidestep.worker.sinks.wandb_marks import Marks
from sidestep.worker.sinks.wandb_tables import MAX_REPEATS, undone_tables
from sidestep.worker.sinks.wandb_uploads import TableUploads


def make_marks(folder: Path, *rows: int) -> Marks:
    marks = Marks.load(folder / "marks.json")
    for row in rows:
        marks.begin_table(row)
    return marks


def test_only_rows_that_arrived_without_their_table_are_asked_for(tmp_path: Path) -> None:
    outbox = OutboxWriter(tmp_path / "journal")
    outbox.write([run_entry(), table_entry(0, "a"), row_entry(1), table_entry(2, "b"), table_entry(3, "c")])
    reader, marks = OutboxReader(outbox.folder, "run1"), make_marks(tmp_path, 2, 3)
    assert undone_tables(reader, marks, 3) == (2,)
    assert Marks.load(tmp_path / "marks.json").tables_open == [2], "row 3 is not at W&B and is sent anyway"
    assert undone_tables(reader, marks, 3) == (2,), "until it is in the outbox once more"
    outbox.write([table_entry(2, "b")])
    assert undone_tables(reader, marks, 3) == ()
    assert marks.tables_open == []
    outbox.close()


def test_a_table_that_never_arrives_is_given_up(tmp_path: Path) -> None:
    outbox = OutboxWriter(tmp_path / "journal")
    outbox.write([run_entry(), table_entry(0, "a")])
    reader, marks = OutboxReader(outbox.folder, "run1"), make_marks(tmp_path, 0)
    assert [undone_tables(reader, marks, 1) for _ in range(MAX_REPEATS + 1)] == [*[(0,)] * MAX_REPEATS, ()]
    outbox.close()


class Handle:
    """An upload's promise: an error message, none, or a core that died."""

    def __init__(self, error: str | None) -> None:
        self._error = error

    def wait_or(self, *, timeout: float | None) -> Any:
        assert timeout is None
        if self._error is None:
            raise ConnectionResetError("the core is gone")
        return SimpleNamespace(
            response=SimpleNamespace(log_artifact_response=SimpleNamespace(error_message=self._error))
        )


def test_only_an_upload_that_was_committed_counts() -> None:
    uploads = TableUploads()
    for row, error in enumerate(("", "refused", None, "")):
        uploads.watch(row, Handle(error))
    uploaded: set[int] = set()
    deadline = time.monotonic() + 10
    while len(uploaded) < 2:
        assert time.monotonic() < deadline, uploaded
        uploaded |= uploads.take()
        time.sleep(0.01)
    assert uploaded == {0, 3}
    assert uploads.take() == set()
