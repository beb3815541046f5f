from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.outbox_writing import OutboxWriter, row_entry, run_entry, table_entry

from sidestep.worker.outbox import entry
from sidestep.worker.sinks.outbox_reader import OutboxReader


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[OutboxWriter]:
    made = OutboxWriter(tmp_path / "a journal? #1 100%")
    yield made
    made.close()


@pytest.fixture
def reader(writer: OutboxWriter) -> Iterator[OutboxReader]:
    made = OutboxReader(writer.folder, "run1")
    yield made
    made.close()


def test_entries_come_as_they_were_written(writer: OutboxWriter, reader: OutboxReader) -> None:
    stored = writer.write([run_entry(), row_entry(0), entry("notice", {"text": "x"}), table_entry(1, "t")])
    assert reader.after(-1, 10) == stored
    assert [one.row_number for one in stored] == [None, 0, None, 1]
    assert (reader.newest_position(), reader.num_rows()) == (3, 2)


def test_entries_are_read_in_pieces_and_followed(writer: OutboxWriter, reader: OutboxReader) -> None:
    stored = writer.write([run_entry(), *map(row_entry, range(5))])
    assert reader.after(-1, 4) == stored[:4]
    assert reader.after(3, 4) == stored[4:]
    assert reader.after(5, 4) == []
    later = writer.write([row_entry(5)])
    assert reader.after(5, 4) == later


def test_rows_that_are_not_wanted_are_left_out(writer: OutboxWriter, reader: OutboxReader) -> None:
    stored = writer.write([run_entry(), row_entry(0), entry("notice", {"text": "x"}), row_entry(1), row_entry(2)])
    assert reader.after(-1, 10, from_row=2) == [stored[0], stored[2], stored[4]]
    assert [reader.position_of_row(number) for number in (-1, 0, 1, 2, 3)] == [-1, 1, 3, 4, -1]


def test_runs_do_not_mix(writer: OutboxWriter, tmp_path: Path) -> None:
    writer.write([run_entry(), row_entry(0)])
    other = OutboxReader(writer.folder, "run2")
    assert (other.after(-1, 10), other.newest_position(), other.num_rows()) == ([], -1, 0)
    other.close()


def test_a_journal_that_is_not_there_yet_is_empty(tmp_path: Path) -> None:
    reader = OutboxReader(tmp_path / "journal", "run1")
    assert (reader.after(-1, 10), reader.newest_position(), reader.num_rows()) == ([], -1, 0)
    assert not (tmp_path / "journal").exists()
    writer = OutboxWriter(tmp_path / "journal")
    stored = writer.write([run_entry()])
    assert reader.after(-1, 10) == stored
    reader.close()
    assert reader.after(-1, 10) == stored
    reader.close()
    writer.close()


def test_an_index_without_its_tables_is_empty(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "index.sqlite").close()
    (tmp_path / "index.sqlite").touch()
    reader = OutboxReader(tmp_path, "run1")
    assert (reader.after(-1, 10), reader.newest_position()) == ([], -1)


def test_a_broken_index_is_said(tmp_path: Path) -> None:
    (tmp_path / "index.sqlite").write_bytes(b"no database at all, but some bytes" * 100)
    with pytest.raises(sqlite3.DatabaseError):
        OutboxReader(tmp_path, "run1").after(-1, 10)


def test_a_reader_holds_no_writer_up(writer: OutboxWriter, reader: OutboxReader) -> None:
    writer.write([run_entry()])
    assert reader.newest_position() == 0
    for number in range(20):
        writer.write([row_entry(number)])
        assert reader.num_rows() == number + 1
