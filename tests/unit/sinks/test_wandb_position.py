from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wandb.proto import wandb_internal_pb2 as pb

from sidestep.worker.sinks.wandb_position import cut_torn_logs, log_records, offline_position, set_aside_empty

BLOCK_BYTES = 32 * 1024
HEADER = b":W&B" + struct.pack("<HB", 0xBEE1, 0)


def log_of(records: list[bytes]) -> bytes:
    """Frame records as W&B's log does, by the rules of LevelDB's format page."""
    log = bytearray(HEADER)
    for record in records:
        begun, left = False, record
        while not begun or left:
            room = BLOCK_BYTES - len(log) % BLOCK_BYTES
            if room < 7:
                log += bytes(room)
                continue
            piece, left = left[: room - 7], left[room - 7 :]
            kind = (3 if left else 4) if begun else (2 if left else 1)
            checksum = zlib.crc32(piece, zlib.crc32(bytes([kind])))
            log += struct.pack("<IHB", checksum, len(piece), kind) + piece
            begun = True
    return bytes(log)


def record(**fields: object) -> bytes:
    message = getattr(pb, "Record")()  # noqa: B009
    for name, value in fields.items():
        getattr(message, name).CopyFrom(value)
    content: bytes = message.SerializeToString()
    return content


def made(name: str, **fields: object) -> object:
    return getattr(pb, name)(**fields)


ROW = record(history=made("HistoryRecord", item=[made("HistoryItem", key="a", value_json="1")]))
RUN = record(run=made("RunRecord", run_id="run1"))
ALERT = record(alert=made("AlertRecord", title="t", text="collapse\n[incident i1]", level="WARN"))
SUMMARY = record(summary=made("SummaryRecord"))


def write_fragment(folder: Path, second: int, records: list[bytes], cut: int | None = None) -> Path:
    place = folder / "wandb" / f"offline-run-20260101_0000{second:02d}-run1"
    place.mkdir(parents=True)
    (place / "run-run1.wandb").write_bytes(log_of(records)[:cut])
    return place


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(
        st.one_of(st.integers(0, 300), st.integers(32_000, 33_500), st.integers(60_000, 70_000)), max_size=9
    ),
    where=st.floats(0, 1),
)
def test_a_log_cut_anywhere_gives_its_whole_records(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], where: float
) -> None:
    records = [bytes([number + 1]) * size for number, size in enumerate(sizes)]
    log = tmp_path_factory.mktemp("log") / "run.wandb"
    whole = log_of(records)
    log.write_bytes(whole)
    assert list(log_records(log)) == records
    cut = int(where * len(whole))
    log.write_bytes(whole[:cut])
    read = list(log_records(log))
    assert read == records[: len(read)]
    assert len(log_of(records[: len(read) + 1])) > cut or len(read) == len(records)


def test_a_broken_byte_ends_the_log(tmp_path: Path) -> None:
    log = tmp_path / "run.wandb"
    content = bytearray(log_of([b"first", b"second", b"third"]))
    content[content.index(b"second")] ^= 1
    log.write_bytes(content)
    assert list(log_records(log)) == [b"first"]


def test_zeros_after_the_last_record_are_no_records(tmp_path: Path) -> None:
    log = tmp_path / "run.wandb"
    log.write_bytes(log_of([b"first"]) + bytes(40_000))
    assert list(log_records(log)) == [b"first"]


def test_another_file_is_not_taken_for_a_log(tmp_path: Path) -> None:
    log = tmp_path / "run.wandb"
    log.write_bytes(b"something else entirely")
    with pytest.raises(ValueError, match="is not a transaction log"):
        list(log_records(log))


def test_the_next_row_follows_the_rows_of_all_fragments(tmp_path: Path) -> None:
    write_fragment(tmp_path, 1, [RUN, ROW, SUMMARY, ROW, ALERT])
    write_fragment(tmp_path, 2, [RUN, ROW, ROW, ROW], cut=-3)
    other = tmp_path / "wandb" / "offline-run-20260101_000003-xrun1"
    other.mkdir()
    (other / "run-xrun1.wandb").write_bytes(log_of([RUN, ROW]))
    position = offline_position(tmp_path, "run1", {})
    assert position.next_row == 4
    assert sorted(position.fragments.values()) == [2, 2]
    assert position.alert_texts == ("collapse\n[incident i1]",)


def test_a_fragment_that_was_synced_and_cleaned_still_counts(tmp_path: Path) -> None:
    place = write_fragment(tmp_path, 1, [RUN, ROW, ROW])
    known = offline_position(tmp_path, "run1", {}).fragments
    (place / "run-run1.wandb").unlink()
    place.rmdir()
    write_fragment(tmp_path, 2, [RUN, ROW])
    assert offline_position(tmp_path, "run1", known).next_row == 3


def test_a_run_without_fragments_begins_at_row_0(tmp_path: Path) -> None:
    assert offline_position(tmp_path, "run1", {}).next_row == 0


def test_fragments_that_never_began_are_set_aside(tmp_path: Path) -> None:
    kept = write_fragment(tmp_path, 1, [RUN, ROW])
    write_fragment(tmp_path, 2, [RUN], cut=10)
    (tmp_path / "wandb" / "offline-run-20260101_000003-run1").mkdir()
    moved = set_aside_empty(tmp_path, "run1")
    assert [place.name for place in moved] == [f"empty-offline-run-20260101_00000{n}-run1" for n in (2, 3)]
    assert sorted((tmp_path / "wandb").glob("offline-run-*")) == [kept]


def test_a_fragment_of_the_same_second_is_set_aside_beside_the_one_before(tmp_path: Path) -> None:
    """A writer that is killed twice within a second gives both fragments one name: the first was renamed away."""
    name = "offline-run-20260101_000001-run1"
    for expected in (f"empty-{name}", f"empty-2-{name}", f"empty-3-{name}"):
        place = tmp_path / "wandb" / name
        place.mkdir(parents=True)
        (place / "files").mkdir()
        assert [moved.name for moved in set_aside_empty(tmp_path, "run1")] == [expected]
        assert not place.exists()


def test_what_a_kill_left_of_a_record_is_cut_off(tmp_path: Path) -> None:
    """A block is written when it is full, whatever record it ends in."""
    big = record(history=made("HistoryRecord", item=[made("HistoryItem", key="a", value_json="1" * 20_000)]))
    places = [
        write_fragment(tmp_path, 1, [RUN, ROW]),
        write_fragment(tmp_path, 2, [RUN, big, big, big], cut=BLOCK_BYTES),
        write_fragment(tmp_path, 3, [RUN, ROW, ROW], cut=-1),
    ]
    logs = [place / "run-run1.wandb" for place in places]
    assert cut_torn_logs(tmp_path, "run1") == logs[1:]
    assert [log.read_bytes() for log in logs] == [log_of([RUN, ROW]), log_of([RUN, big]), log_of([RUN, ROW])]
    assert cut_torn_logs(tmp_path, "run1") == []
    assert offline_position(tmp_path, "run1", {}).next_row == 3


@pytest.mark.parametrize("room", range(1, 8))
def test_a_log_is_cut_behind_a_record_that_ends_near_its_blocks_end(tmp_path: Path, room: int) -> None:
    payload = BLOCK_BYTES - 7 - 7 - room
    log = write_fragment(tmp_path, 1, []) / "run-run1.wandb"
    whole = log_of([b"x" * payload])
    log.write_bytes(log_of([b"x" * payload, ROW])[:-1])
    assert cut_torn_logs(tmp_path, "run1") == [log]
    assert log.read_bytes() == whole
    assert list(log_records(log)) == [b"x" * payload]
