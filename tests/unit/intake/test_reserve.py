"""The room that is kept for a full disk; tests/fault_injection/test_journal_full_disk.py has a disk that is full."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidestep.worker.errors import JournalWriteError
from sidestep.worker.intake.decisions import Closure
from sidestep.worker.intake.journal import Journal
from sidestep.worker.intake.reserve import RESERVE_FILE, Reserve
from sidestep.worker.intake.segments import Row
from sidestep.worker.outbox import entry
from sidestep.worker.records import StepClosing

MIB = 1 << 20


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_it_has_real_blocks_and_is_given_up_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    reserve = Reserve(tmp_path, MIB, clock=clock)
    assert reserve.path.stat().st_blocks * 512 >= MIB
    assert reserve.has_room()
    assert reserve.reason == ""
    assert reserve.lacking_bytes == 0
    assert reserve.give_up()
    assert not reserve.path.exists()
    assert not reserve.give_up()
    assert reserve.times_full == 1
    assert caplog.text.count("is full: nothing that arrives is stored until there is room") == 1
    assert "is full; messages are stored again when 1 MiB are free" in reserve.reason


def test_it_is_made_again_when_there_is_room_but_not_looked_for_at_every_message(tmp_path: Path) -> None:
    clock = Clock()
    reserve = Reserve(tmp_path, MIB, clock=clock)
    reserve.give_up()
    assert not reserve.has_room()
    clock.now += 1.0
    assert reserve.has_room()
    assert reserve.path.stat().st_size == MIB
    assert not reserve.is_full
    reserve.give_up()
    assert reserve.times_full == 2
    reserve.remove()
    assert list(tmp_path.iterdir()) == []


def test_one_that_a_killed_worker_left_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / RESERVE_FILE).write_bytes(b"\0" * (3 * MIB))
    assert Reserve(tmp_path, MIB).path.stat().st_size == MIB


def test_a_disk_without_that_much_room_is_told_and_nothing_half_made_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reserve = Reserve(tmp_path, 1 << 50)
    assert "has no room for a reserve of 1073741824 MiB" in caplog.text
    assert list(tmp_path.iterdir()) == []
    assert reserve.has_room()  # the disk is not full: what arrives is stored
    assert not reserve.give_up()


def test_a_state_is_written_on_a_full_disk_and_a_message_is_not(tmp_path: Path) -> None:
    journal = Journal(tmp_path, reserve_bytes=MIB)
    step = StepClosing(run_id="run", attempt=0, step=0, reason="complete", incarnation="inc", parts=())
    closure = Closure(closing=step, entries=(entry("table", {"text": "x" * 300_000}),))
    connection = journal.index._connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count={pages}")
    calls = []

    def make_room() -> bool:
        calls.append(journal.reserve is not None and journal.reserve.give_up())
        connection.execute("PRAGMA max_page_count=1000000")
        return True

    journal.index.database.on_full = make_room
    assert len(journal.index.write("run", [closure], b"state")) == 1
    assert calls == [True]
    assert not (tmp_path / RESERVE_FILE).exists()
    with pytest.raises(JournalWriteError, match="is full; messages are stored again"):
        journal.segments.append([Row("inc", 0, 1, 13, -1, 1, 0, 1.5, 0, b"x")])
    assert "is full" in journal.trouble
    journal.close()
