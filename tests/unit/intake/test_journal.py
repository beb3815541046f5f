from __future__ import annotations

import os
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sidestep.protocol.frames import Envelope, encode
from sidestep.protocol.messages import Notice
from sidestep.worker.errors import JournalError, JournalLockedError, JournalWriteError
from sidestep.worker.intake.decisions import Closure, ContextRecord, Decision, Ending, Incarnation
from sidestep.worker.intake.journal import Journal
from sidestep.worker.intake.segments import Row
from sidestep.worker.outbox import OutboxEntry, entry
from sidestep.worker.records import StepClosing


def row(sequence: int, arrival: int, *, rank: int = 0, text: str = "x") -> Row:
    body = encode(Envelope(run_id="run", incarnation="inc", rank=rank, sequence=sequence), Notice(text=text))
    return Row("inc", rank, sequence, 13, -1, 1, 0, 1.5, arrival, body)


def closing(step: int, parts: tuple[tuple[int, int], ...] = ()) -> StepClosing:
    return StepClosing(run_id="run", attempt=0, step=step, reason="complete", incarnation="inc", parts=parts)


def numbered(step: int) -> OutboxEntry:
    return entry("row", {"train/step": step})


def test_what_was_appended_is_there_after_opening_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.segments.append([row(1, 0), row(2, 1), row(1, 2, rank=3)])
    journal.close()
    again = Journal(tmp_path / "journal")
    assert again.segments.next_arrival == 3
    assert again.segments.committed("inc", 0).ranges().tolist() == [[1, 2]]
    assert again.segments.holds("inc", 3, 1)
    assert not again.segments.holds("inc", 3, 2)
    assert [(each.rank, each.sequence) for each in again.segments.since(1, 10)] == [(0, 2), (3, 1)]
    assert again.segments.streams() == [("inc", 0), ("inc", 3)]
    again.close()


def test_commits_are_durable_against_power_loss(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for connection in (journal.index._connection, journal.segments._writer):
        assert connection is not None
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    journal.close()


def test_segments_rotate_and_all_of_them_are_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path, segment_bytes=1 << 16)
    for number in range(60):
        journal.segments.append([row(number + 1, number, text="y" * 8_000)])
    journal.close()
    assert len(list(tmp_path.glob("segment-*.sqlite"))) > 3
    again = Journal(tmp_path, segment_bytes=1 << 16)
    assert again.segments.committed("inc", 0).ranges().tolist() == [[1, 60]]
    assert [each.sequence for each in again.segments.since(0, 1_000)] == list(range(1, 61))
    keys = [(0, 1), (0, 30), (0, 60), (0, 61)]
    assert sorted(again.segments.select("inc", keys)) == keys[:3]
    assert again.segments.first_since("inc", 31) == 31
    assert again.segments.first_since("inc", 60) is None
    assert again.segments.first_since("other", 0) is None
    again.segments.append([row(61, 60)])
    assert again.segments.next_arrival == 61
    again.close()


def test_a_batch_is_stored_whole_or_not_at_all(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.segments.append([row(1, 0)])
    with pytest.raises(sqlite3.IntegrityError):
        journal.segments.append([row(2, 1), row(1, 2)])
    assert journal.segments.next_arrival == 1
    assert [each.sequence for each in journal.segments.since(0, 10)] == [1]
    journal.close()


def test_a_full_disk_is_told_and_the_same_batch_may_be_tried_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.segments.append([row(1, 0)])
    writer = journal.segments._writer
    assert writer is not None
    (pages,) = writer.execute("PRAGMA page_count").fetchone()
    writer.execute(f"PRAGMA max_page_count={pages}")
    batch = [row(2, 1, text="z" * 100_000)]
    with pytest.raises(JournalWriteError, match="full"):
        journal.segments.append(batch)
    assert not journal.segments.holds("inc", 0, 2)
    writer.execute("PRAGMA max_page_count=1000000")
    journal.segments.append(batch)
    assert journal.segments.holds("inc", 0, 2)
    journal.close()


def test_two_workers_cannot_write_one_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(JournalLockedError, match=rf"another worker has the journal .* open \(pid {os.getpid()}\)"):
        Journal(tmp_path)
    reader = Journal(tmp_path, read_only=True)
    reader.close()
    journal.close()
    Journal(tmp_path).close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="cannot be written"):
        Journal(tmp_path / "file" / "journal")


def test_what_is_no_journal_is_told(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="holds no journal"):
        Journal(tmp_path, read_only=True)
    (tmp_path / "index.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(JournalError):
        Journal(tmp_path)


def test_a_journal_of_another_schema_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.index._connection.execute("UPDATE meta SET value = '99'")
    journal.close()
    with pytest.raises(JournalError, match="schema 99"):
        Journal(tmp_path)


def test_the_folder_is_private(tmp_path: Path) -> None:
    Journal(tmp_path / "made").close()
    assert os.stat(tmp_path / "made").st_mode & 0o777 == 0o700  # noqa: PTH116


def made(name: str, run_id: str = "run") -> Incarnation:
    return Incarnation(incarnation=name, run_id=run_id, attempt=-1, first_seen=1.0, world_size=2, start_step=0)


def test_attempts_are_numbered_in_the_order_of_first_hellos(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    attempts = [
        journal.index.add_hello(made(name), rank, 1.0, b"hello").attempt
        for name, rank in (("a", 1), ("b", 0), ("a", 0), ("c", 0))
    ]
    assert attempts == [0, 1, 0, 2]
    assert journal.index.add_hello(made("z", "other"), 0, 1.0, b"hello").attempt == 0
    assert sorted(journal.index.hellos("a")) == [0, 1]
    assert journal.index.runs() == ["run", "other"]
    journal.close()


def test_closings_state_and_outbox_are_one_transaction(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    first = Closure(closing=closing(0, ((0, 1), (1, 7))), entries=(entry("run", {}), numbered(0)), last_arrival=5)
    stored = journal.index.write("run", [first], b"state-0")
    assert [(each.position, each.kind, each.row_number) for each in stored] == [(0, "run", None), (1, "row", 0)]
    with pytest.raises(sqlite3.IntegrityError):
        journal.index.write("run", [Closure(closing=closing(1), entries=(numbered(1),)), first], b"state-1")
    assert [each.payload for each in journal.index.outbox("run")] == [each.payload for each in stored]
    state = journal.index.state("run")
    assert state is not None
    assert (state.body, state.step, state.closed_number) == (b"state-0", 0, 0)
    (later,) = journal.index.write("run", [Closure(closing=closing(1), entries=(numbered(1),))], b"state-1")
    assert (later.position, later.row_number) == (2, 1)
    journal.close()


def test_a_step_closes_once_an_attempt_though_its_tail_may_come_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    tail = replace(closing(0), reason="tail")
    journal.index.write("run", [Closure(closing=each) for each in (closing(0), tail, tail)])
    with pytest.raises(sqlite3.IntegrityError):
        journal.index.write("run", [Closure(closing=closing(0))])
    journal.index.write("run", [Closure(closing=replace(closing(0), attempt=1))])
    assert len(journal.index.closings("run")) == 4
    journal.close()


def test_decisions_come_back_as_they_were_and_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    context = ContextRecord(run_id="run", attempt=0, revision=0, incarnation="inc", ranks=(0, 3), missing=("aa", "bb"))
    ending = Ending(
        run_id="run", attempt=0, exit_code=1, reason="gone", tail_unknown=True, unix_time=2.5, newest_step=1
    )
    decisions: list[Decision] = [context, closing(0, ((0, 1), (1, 1))), closing(1), ending]
    journal.index.write("run", [Closure(closing=each, pending_arrival=at) for at, each in enumerate(decisions)])
    journal.close()
    again = Journal(tmp_path)
    read = again.index.closings("run")
    assert [each.closed_number for each in read] == [0, 1, 2, 3]
    assert read[0] == replace(context, closed_number=0)
    assert read[3] == replace(ending, closed_number=3)
    assert isinstance(read[1], StepClosing)
    assert read[1].parts == ((0, 1), (1, 1))
    assert again.index.pending_arrival("run") == 3
    assert again.index.next_closed_number("run") == 4
    again.close()


def test_closings_that_used_late_arrivals_are_found(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    closures = [Closure(closing=closing(step), last_arrival=10 * step) for step in range(4)]
    journal.index.write("run", closures)
    assert [each.step for each in journal.index.closings_using("run", 20)] == [2, 3]
    newest = journal.index.last_step_closing("run", 0)
    assert newest is not None
    assert newest.step == 3
    assert journal.index.last_step_closing("run", 1) is None
    journal.close()


def test_reading_only_sees_what_a_writer_commits(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.segments.append([row(1, 0)])
    reader = Journal(tmp_path, read_only=True)
    assert list(reader.messages("inc", [(0, 1)])) == [(0, 1)]
    assert np.array_equal(reader.segments.committed("inc", 0).ranges(), [[1, 1]])
    with pytest.raises(JournalError, match="opened for reading"):
        reader.segments.append([row(2, 1)])
    reader.close()
    journal.close()


def test_a_message_that_cannot_be_decoded_any_more_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.segments.append([row(1, 0)._replace(body=b"rubbish")])
    with pytest.raises(JournalError, match="message 1 of rank 0 of inc cannot be read"):
        journal.messages("inc", [(0, 1)])
    journal.close()
