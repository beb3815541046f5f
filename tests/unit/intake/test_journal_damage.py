"""Files of the journal that break: met at opening or in reading, set aside, named; what can be read is kept."""

from __future__ import annotations

import random
import shutil
import sqlite3
from contextlib import closing as closed
from dataclasses import replace
from pathlib import Path

import pytest

from sidestep.protocol.frames import Envelope, encode
from sidestep.protocol.messages import Notice
from sidestep.worker.errors import JournalDamageError, JournalWriteError
from sidestep.worker.intake.decisions import Closure, Incarnation, Loss
from sidestep.worker.intake.journal import Journal
from sidestep.worker.intake.salvage import salvaged_path
from sidestep.worker.intake.segment_file import segment_path
from sidestep.worker.intake.segments import Row
from sidestep.worker.outbox import entry
from sidestep.worker.records import StepClosing

PER_SEGMENT = 8
BODY = "y" * 8_000


def row(sequence: int, arrival: int, *, incarnation: str = "inc", text: str = BODY) -> Row:
    envelope = Envelope(run_id="run", incarnation=incarnation, rank=0, sequence=sequence)
    return Row(incarnation, 0, sequence, 13, -1, 1, 0, 1.5, arrival, encode(envelope, Notice(text=text)))


def closing(step: int, sequences: list[int]) -> Closure:
    made = StepClosing(
        run_id="run", attempt=0, step=step, reason="complete", incarnation="inc",
        parts=tuple((0, sequence) for sequence in sequences),
    )  # fmt: skip
    entries = (entry("run", {}), entry("row", {"train/step": step})) if step == 0 else (entry("row", {}),)
    return Closure(closing=made, entries=entries, last_arrival=max(sequences) - 1, pending_arrival=max(sequences))


def filled(folder: Path, num_messages: int, closed_up_to: int = 0) -> Journal:
    """A journal of messages 1, 2, ... in segments of some eight; the steps that used the first so many have closed."""
    journal = Journal(folder, segment_bytes=1 << 16)
    made = Incarnation(incarnation="inc", run_id="run", attempt=-1, first_seen=1.0, world_size=1, start_step=0)
    journal.index.add_hello(made, 0, 1.0, b"hello")
    for number in range(num_messages):
        journal.segments.append([row(number + 1, number)])
    for sequence in range(1, closed_up_to + 1):
        journal.index.write("run", [closing(sequence - 1, [sequence])])
    return journal


def held(journal: Journal) -> list[int]:
    return [each.sequence for each in journal.segments.since(0, 10_000)]


def overwrite(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def leaf_page_of(path: Path, sequence: int) -> int:
    """Return where in the file the body of a message stands."""
    with closed(sqlite3.connect(path)) as connection:
        (body,) = connection.execute("SELECT body FROM message WHERE sequence = ?", (sequence,)).fetchone()
        (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
    at = path.read_bytes().find(bytes(body)[:64])  # the body's beginning is in the tree's page, its rest overflows
    assert at > 0
    return at // int(page_bytes) * int(page_bytes)


def test_a_flipped_bit_in_a_body_is_found_when_it_is_read_and_only_that_message_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path, 30).close()
    path = segment_path(tmp_path, 1)
    at = path.read_bytes().find(b"y" * 2_000)
    overwrite(path, at + 100, b"z")
    journal = Journal(tmp_path, segment_bytes=1 << 16)
    assert journal.segments.damaged() == []
    numbers = held(journal)
    (found,) = journal.segments.damaged()
    lost = [number for ranges in found.lost.values() for number in ranges]
    assert len(lost) == 1
    assert sorted([*numbers, *lost]) == list(range(1, 31))
    assert not journal.segments.holds("inc", 0, lost[0])
    assert "does not match its checksum" in found.reason
    assert (tmp_path / found.file).is_file()
    assert found.file in caplog.text
    assert f"rank 0: {lost[0]})" in caplog.text
    journal.close()
    again = Journal(tmp_path, segment_bytes=1 << 16)
    assert held(again) == numbers
    assert [each.file for each in again.segments.damaged()] == [found.file]
    again.segments.append([row(lost[0], again.segments.next_arrival)])  # the trainer still held it
    assert again.segments.holds("inc", 0, lost[0])
    assert len(again.segments.select("inc", [(0, lost[0])])) == 1
    again.close()


def test_a_broken_page_costs_what_is_on_it_and_nothing_else(tmp_path: Path) -> None:
    filled(tmp_path, 30, closed_up_to=30).close()
    path = segment_path(tmp_path, 2)
    with closed(sqlite3.connect(path)) as connection:
        (first,) = connection.execute("SELECT MIN(sequence) FROM message").fetchone()
    overwrite(path, leaf_page_of(path, first), b"\xff" * 200)
    journal = Journal(tmp_path, segment_bytes=1 << 16)
    numbers = held(journal)
    (found,) = journal.segments.damaged()
    assert found.lost == {}
    used = [number for ranges in found.used.values() for number in ranges]
    assert used
    assert sorted([*numbers, *used]) == list(range(1, 31))
    for number in used:  # its step is in the run: it must not be stored, and counted, a second time
        assert journal.segments.holds("inc", 0, number)
    assert f"{len(used)} of its raw messages are not kept" in journal.missing_messages("run")
    journal.close()


def test_an_index_of_arrivals_that_lost_entries_without_a_word_is_found_by_what_it_lacks(tmp_path: Path) -> None:
    filled(tmp_path, 30).close()
    path = segment_path(tmp_path, 1)
    with closed(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA writable_schema=ON")
        connection.execute("UPDATE sqlite_master SET sql = sql || ' WHERE arrival > 3' WHERE name = 'message_arrival'")
    with closed(sqlite3.connect(path)) as connection, connection:
        connection.execute("REINDEX")
        connection.execute("PRAGMA writable_schema=ON")
        connection.execute("UPDATE sqlite_master SET sql = replace(sql, ' WHERE arrival > 3', '') WHERE type = 'index'")
    journal = Journal(tmp_path, segment_bytes=1 << 16)
    assert held(journal) == list(range(1, 31))
    (found,) = journal.segments.damaged()
    assert "messages that it held" in found.reason
    assert found.lost == found.used == {}
    journal.close()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: overwrite(path, 0, b"rubbish that is no database at all"), "is no database"),
        (lambda path: path.write_bytes(path.read_bytes()[: 5 * 4096]), "is cut: 20480 bytes of"),
        (lambda path: path.write_bytes(b""), "is no database"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_what_100_bytes_tell_is_found_at_opening(tmp_path: Path, harm: object, said: str) -> None:
    filled(tmp_path, 30, closed_up_to=3).close()
    assert callable(harm)
    harm(segment_path(tmp_path, 1))
    journal = Journal(tmp_path, segment_bytes=1 << 16)
    (found,) = journal.segments.damaged()
    assert said in found.reason
    assert found.number == 1
    lost = {number for ranges in found.lost.values() for number in ranges}
    used = {number for ranges in found.used.values() for number in ranges}
    assert used <= {1, 2, 3}
    assert lost | used | set(held(journal)) == set(range(1, 31))
    assert journal.segments.next_arrival == 30
    journal.close()


def test_the_segment_that_is_written_breaks_under_the_writer(tmp_path: Path) -> None:
    journal = filled(tmp_path, 4)
    writer = journal.segments._writer
    assert writer is not None
    writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    overwrite(segment_path(tmp_path, 1), 4096, b"\xff" * 4096)
    writer.execute("PRAGMA cache_size=0")
    journal.segments.append([row(5, 4), row(6, 5)])
    (found,) = journal.segments.damaged()
    assert found.number == 1
    numbers = held(journal)
    assert numbers[-2:] == [5, 6]
    lost = {number for ranges in found.lost.values() for number in ranges}
    assert lost | set(numbers) == set(range(1, 7))
    journal.close()
    assert held(Journal(tmp_path)) == numbers


def test_an_open_segment_that_is_broken_at_opening_keeps_what_steps_used_known(tmp_path: Path) -> None:
    filled(tmp_path, 4, closed_up_to=3).close()
    overwrite(segment_path(tmp_path, 1), 0, b"x" * 100)
    journal = Journal(tmp_path)
    (found,) = journal.segments.damaged()
    assert not found.is_complete
    assert [number for ranges in found.used.values() for number in ranges] == [1, 2, 3]
    assert journal.segments.committed("inc", 0).ranges().tolist() == [[1, 3]]
    journal.segments.append([row(4, journal.segments.next_arrival)])
    assert held(journal) == [4]
    assert journal.segments.next_arrival >= 4
    journal.close()


def test_an_empty_file_beside_a_log_is_no_new_segment(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = filled(tmp_path / "source", 4)
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "source", killed)
    source.close()
    log = (killed / "segment-000001.sqlite-wal").read_bytes()
    segment_path(killed, 1).write_bytes(b"")
    journal = Journal(killed)
    (found,) = journal.segments.damaged()
    assert not found.is_complete
    assert (killed / f"{found.file}-wal").read_bytes() == log
    assert "segment-000001.sqlite is no database" in caplog.text
    assert held(journal) == []
    journal.segments.append([row(1, journal.segments.next_arrival)])
    journal.close()


def test_a_log_that_was_cut_is_told_by_the_steps_that_used_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = filled(tmp_path / "source", 6, closed_up_to=6)
    torn = tmp_path / "torn"
    shutil.copytree(tmp_path / "source", torn)  # as a power loss leaves it, the log unfolded
    source.close()
    log = torn / "segment-000001.sqlite-wal"
    log.write_bytes(log.read_bytes()[: log.stat().st_size // 2])
    journal = Journal(torn)
    numbers = held(journal)
    assert 0 < len(numbers) < 6
    (found,) = journal.segments.damaged()
    assert [number for ranges in found.used.values() for number in ranges] == list(range(len(numbers) + 1, 7))
    assert journal.segments.next_arrival == 6  # an arrival number is never given twice
    assert "its end is gone though it had been written to the disk" in caplog.text
    assert journal.segments.holds("inc", 0, 6)
    journal.close()
    again = Journal(torn)
    assert len(again.segments.damaged()) == 1
    again.close()


def test_an_index_that_lost_its_end_takes_full_segments_for_full_again(tmp_path: Path) -> None:
    filled(tmp_path, 30).close()
    with closed(sqlite3.connect(tmp_path / "index.sqlite")) as connection, connection:
        connection.execute("DELETE FROM segment WHERE number > 1")
        connection.execute("DELETE FROM stream_range WHERE segment > 1")
    reader = Journal(tmp_path, read_only=True)
    assert held(reader) == list(range(1, 31))
    reader.close()
    journal = Journal(tmp_path, segment_bytes=1 << 16)
    assert journal.segments.next_arrival == 30
    for number in range(30, 40):
        journal.segments.append([row(number + 1, number)])
    assert held(journal) == list(range(1, 41))
    assert journal.segments.damaged() == []
    journal.close()


def test_a_kill_between_the_record_and_the_new_names_is_made_good(tmp_path: Path) -> None:
    filled(tmp_path, 30).close()
    path = segment_path(tmp_path, 1)
    overwrite(path, path.read_bytes().find(b"y" * 2_000) + 100, b"z")
    broken = path.read_bytes()
    journal = Journal(tmp_path, segment_bytes=1 << 16)
    numbers = held(journal)
    (found,) = journal.segments.damaged()
    journal.close()
    path.replace(salvaged_path(tmp_path, 1))
    (tmp_path / found.file).replace(path)
    assert path.read_bytes() == broken
    again = Journal(tmp_path, segment_bytes=1 << 16)
    assert held(again) == numbers
    assert (tmp_path / found.file).read_bytes() == broken
    again.close()


def test_a_copy_without_a_record_is_removed(tmp_path: Path) -> None:
    filled(tmp_path, 4).close()
    salvaged_path(tmp_path, 1).write_bytes(b"half a copy")
    journal = Journal(tmp_path)
    assert not salvaged_path(tmp_path, 1).exists()
    assert held(journal) == [1, 2, 3, 4]
    journal.close()


def test_each_run_that_lacks_something_says_so_once(tmp_path: Path) -> None:
    filled(tmp_path, 30, closed_up_to=3).close()
    segment_path(tmp_path, 1).unlink()
    journal = Journal(tmp_path, segment_bytes=1 << 16)
    (stored,) = journal.tidy()
    said = stored.value()
    assert (stored.kind, said["level"], said["code"]) == ("notice", "critical", "journal_damaged")
    assert "3 messages of steps that had closed are gone: their rows are here, a replay lacks them" in said["text"]
    assert "are lost, unless the trainer still holds them and sends them again (messages of rank 0: 4-" in said["text"]
    assert journal.tidy() == []
    (told,) = journal.index.losses("run")
    assert isinstance(journal.index.closings("run")[-1], Loss)
    journal.close()
    again = Journal(tmp_path, segment_bytes=1 << 16)
    assert again.tidy() == []
    assert again.index.losses("run") == [told]
    assert again.statistics()["damaged"][0]["messages_used"] == 3
    again.close()


def test_a_run_that_has_said_nothing_yet_is_told_after_its_first_entry(tmp_path: Path) -> None:
    filled(tmp_path, 30).close()
    segment_path(tmp_path, 1).unlink()
    journal = Journal(tmp_path, segment_bytes=1 << 16)
    assert journal.tidy() == []
    journal.index.write("run", [closing(0, [20])])
    assert [stored.kind for stored in journal.tidy()] == ["notice"]
    journal.close()


def test_reading_only_changes_nothing_and_names_what_it_cannot_read(tmp_path: Path) -> None:
    filled(tmp_path, 30, closed_up_to=30).close()
    overwrite(segment_path(tmp_path, 1), 0, b"rubbish that is no database at all")
    before = sorted(path.name for path in tmp_path.glob("*.sqlite"))
    reader = Journal(tmp_path, read_only=True)
    assert "segment 1 cannot be read" in reader.missing_messages("run")
    assert held(reader)
    reader.close()
    assert sorted(path.name for path in tmp_path.glob("*.sqlite")) == before
    assert segment_path(tmp_path, 1).read_bytes().startswith(b"rubbish")


def test_a_broken_index_says_what_to_do(tmp_path: Path) -> None:
    filled(tmp_path, 4, closed_up_to=4).close()
    overwrite(tmp_path / "index.sqlite", 0, b"rubbish that is no database at all")
    with pytest.raises(JournalDamageError, match=r"index\.sqlite is damaged .*\.recover .* move .* away"):
        Journal(tmp_path)


def test_an_index_that_breaks_under_the_worker_is_told_and_nothing_more_is_taken(tmp_path: Path) -> None:
    journal = filled(tmp_path, 4, closed_up_to=4)
    journal.index._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    path = tmp_path / "index.sqlite"
    overwrite(path, 4096, b"\xff" * (path.stat().st_size - 4096))
    journal.index._connection.execute("PRAGMA cache_size=0")
    with pytest.raises(JournalDamageError, match="is damaged"):
        journal.index.closings("run")
    with pytest.raises(JournalWriteError, match="is damaged"):
        journal.index.write("run", [closing(9, [4])])
    assert "is damaged" in journal.trouble
    journal.close()


def test_a_journal_of_the_first_schema_is_read_and_taken_on(tmp_path: Path) -> None:
    journal = filled(tmp_path, 30, closed_up_to=3)
    journal.close()
    with closed(sqlite3.connect(tmp_path / "index.sqlite")) as connection, connection:
        for table in ("segment_deleted", "segment_damaged", "lost_range", "loss"):
            connection.execute(f"DROP TABLE {table}")
        connection.execute("ALTER TABLE stream_range DROP COLUMN last_arrival")
        connection.execute("UPDATE meta SET value = '1'")
    for path in tmp_path.glob("segment-*.sqlite"):
        with closed(sqlite3.connect(path)) as connection, connection:
            connection.execute("ALTER TABLE message DROP COLUMN checksum")
    reader = Journal(tmp_path, read_only=True)
    assert held(reader) == list(range(1, 31))
    assert reader.index.losses("run") == []
    assert len(reader.index.closings("run")) == 3
    reader.close()
    again = Journal(tmp_path, segment_bytes=1 << 16)
    for number in range(30, 50):
        again.segments.append([row(number + 1, number)])
    assert held(again) == list(range(1, 51))
    assert again.segments.first_since("inc", 5) == 5
    again.close()
    with closed(sqlite3.connect(tmp_path / "index.sqlite")) as connection:
        assert connection.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone() == ("2",)


def test_a_loss_is_a_decision_like_any_other(tmp_path: Path) -> None:
    journal = filled(tmp_path, 1, closed_up_to=1)
    loss = Loss(run_id="run", attempt=0, file="segment-000001.corrupt.sqlite", text="gone")
    journal.index.write("run", [Closure(closing=loss, entries=loss.entries())])
    assert journal.index.closings("run")[-1] == replace(loss, closed_number=1)
    assert journal.index.next_closed_number("run") == 2
    journal.close()


def broken(content: bytes, rng: random.Random) -> bytes:
    """Return a file with a bit flipped, a stretch of rubbish or of zeros, or without its end."""
    made, at = bytearray(content), rng.randrange(max(1, len(content)))
    match rng.choice(["bit", "rubbish", "zeros", "cut"]):
        case "bit" if made:
            made[at] ^= 1 << rng.randrange(8)
        case "rubbish":
            made[at : at + 5_000] = rng.randbytes(5_000)[: len(made) - at]
        case "zeros":
            made[at : at + 4_096] = bytes(4_096)[: len(made) - at]
        case _:
            del made[at:]
    return bytes(made)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_breaks_what_is_not_read_is_named_and_what_steps_used_stays_known(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    source = filled(tmp_path / "killed", 20, closed_up_to=11)
    shutil.copytree(tmp_path / "killed", tmp_path / "left")  # with its logs, as a kill leaves it
    source.close()
    for attempt in range(8):
        folder = tmp_path / f"journal-{attempt}"
        shutil.copytree(tmp_path / rng.choice(["killed", "left"]), folder)
        path = rng.choice(sorted(folder.glob("segment-*.sqlite")))
        path.write_bytes(broken(path.read_bytes(), rng))
        journal = Journal(folder, segment_bytes=1 << 16)
        numbers = held(journal)
        assert set(journal.segments.select("inc", [(0, n) for n in range(1, 21)])) == {(0, n) for n in numbers}
        found = journal.segments.damaged()
        lost = {n for each in found for ranges in each.lost.values() for n in ranges}
        used = {n for each in found for ranges in each.used.values() for n in ranges}
        assert not (lost | used) & set(numbers)
        if all(each.is_complete for each in found):
            assert lost | used | set(numbers) == set(range(1, 21)), (path.name, found)
        assert journal.segments.committed("inc", 0).covers(1, 11)
        journal.segments.append([row(30, journal.segments.next_arrival)])
        assert held(journal)[-1] == 30
        journal.close()
        shutil.rmtree(folder)
