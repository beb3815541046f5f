"""How far W&B's own files of a run reach, read back from the offline transaction logs.

A killed writer loses the tail of its log, so only the log says which rows survived (docs/delivery.md, section 4): each
restart makes a new fragment folder ``offline-run-<time>-<run id>``, whose rows count from 0, and ``wandb sync`` joins
the fragments in the order of their start. The run's next row is therefore the number of whole history records of them
all.

The log is LevelDB's: after seven bytes of header, blocks of 32 KiB with records of ``crc32 u32, length u16, type u8``.
Of the protobuf record only the two fields that are needed are looked at, so nothing of wandb is imported here.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_MAGIC: Final = b":W&B"
_HEADER_BYTES: Final = 7
_BLOCK_BYTES: Final = 32 * 1024
_RECORD_HEAD: Final = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4

_HISTORY_FIELD: Final = 2  # of wandb_internal.Record
_ALERT_FIELD: Final = 10
_RUN_FIELD: Final = 17
_ALERT_TEXT_FIELD: Final = 2  # of AlertRecord
_LENGTH_DELIMITED: Final = 2
_FIXED_BYTES: Final = {1: 8, 5: 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """What one fragment's log holds, up to its first byte that is not whole."""

    name: str
    """The fragment's folder."""
    num_rows: int
    """Whole history records."""
    alert_texts: tuple[str, ...]
    """Texts of the alerts that were recorded, in order."""
    has_run: bool
    """Whether the log came as far as the record that says whose it is; without it ``wandb sync`` refuses all
    fragments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflinePosition:
    """Where a run stands over all its fragments."""

    next_row: int
    """Row number of the first row that no fragment holds."""
    fragments: Mapping[str, int]
    """Folder to its rows."""
    alert_texts: tuple[str, ...]


def fragment_folders(folder: Path, run_id: str) -> list[Path]:
    """Return the run's offline fragments under ``folder/wandb``, oldest first."""
    pattern = re.compile(rf"offline-run-\d{{8}}_\d{{6}}-{re.escape(run_id)}")
    places = (folder / "wandb", folder / ".wandb")  # the SDK takes a ``.wandb`` that is already there
    return sorted(
        path for place in places if place.is_dir() for path in place.iterdir() if pattern.fullmatch(path.name)
    )


def set_aside_empty(folder: Path, run_id: str) -> list[Path]:
    """Rename fragments whose writer was killed before the log said anything; return their new places.

    ``wandb sync`` of a run stops at such a fragment, with nothing of the others sent. No writer may be at work.
    """
    return [
        place.rename(_unused_name(place))
        for place in fragment_folders(folder, run_id)
        if not read_fragment(place, run_id).has_run
    ]


def _unused_name(place: Path) -> Path:
    """Writers that are killed twice within a second give both fragments one name."""
    unused = place.with_name(f"empty-{place.name}")
    number = 1
    while unused.exists():
        number += 1
        unused = place.with_name(f"empty-{number}-{place.name}")
    return unused


def cut_torn_logs(folder: Path, run_id: str) -> list[Path]:
    """Cut what a killed writer left of an unfinished record off the logs' ends; return the logs that were cut.

    W&B's log is written a whole block at a time, so a kill within a flush interval often leaves the first part of a
    record. ``wandb sync`` stops at it, says that the run failed, and sends nothing of the fragments after it. What is
    cut off counts nowhere: its rows are sent again, into the next fragment. No writer may be at work.
    """
    cut = []
    for place in fragment_folders(folder, run_id):
        log = place / f"run-{run_id}.wandb"
        if log.is_file() and 0 < (end := _end_of_whole_records(log)) < log.stat().st_size:
            os.truncate(log, end)
            cut.append(log)
    return cut


def offline_position(folder: Path, run_id: str, known: Mapping[str, int]) -> OfflinePosition:
    """Return where the run's next row stands; OSError where a log cannot be read.

    ``known`` names fragments counted before: one whose folder is gone since (``wandb sync --clean``) still counts, as
    its rows are in W&B.
    """
    rows, texts = dict(known), list[str]()
    for place in fragment_folders(folder, run_id):
        fragment = read_fragment(place, run_id)
        rows[fragment.name] = fragment.num_rows
        texts += fragment.alert_texts
    return OfflinePosition(next_row=sum(rows.values()), fragments=rows, alert_texts=tuple(texts))


def read_fragment(place: Path, run_id: str) -> Fragment:
    """Read one fragment's folder; a log that is missing or not yet begun holds nothing."""
    log = place / f"run-{run_id}.wandb"
    num_rows, texts, has_run = 0, list[str](), False
    if log.is_file():
        for record in log_records(log):
            for number, value in _fields(record):
                if number == _HISTORY_FIELD:
                    num_rows += 1
                elif number == _RUN_FIELD:
                    has_run = True
                elif number == _ALERT_FIELD:
                    texts += [text.decode("utf-8", "replace") for n, text in _fields(value) if n == _ALERT_TEXT_FIELD]
    return Fragment(name=place.name, num_rows=num_rows, alert_texts=tuple(texts), has_run=has_run)


def log_records(log: Path) -> Iterator[bytes]:
    """Yield the whole records of a transaction log, up to a torn or broken one; ValueError where it is no such log."""
    return (record for _, record in _records_and_ends(log))


def _end_of_whole_records(log: Path) -> int:
    end = 0
    for end, _ in _records_and_ends(log):  # noqa: B007 (the last one's)
        pass
    return end


def _records_and_ends(log: Path) -> Iterator[tuple[int, bytes]]:
    """Yield each whole record and the offset of the byte after it."""
    with log.open("rb") as file:
        block = file.read(_BLOCK_BYTES)
        if len(block) < _HEADER_BYTES:
            return
        if not block.startswith(_MAGIC):
            raise ValueError(f"{log} is not a transaction log of W&B")
        start, offset, joined = 0, _HEADER_BYTES, bytearray()
        while block:
            for end, kind, piece in _pieces(block, offset):
                if kind in (_FULL, _FIRST):
                    joined.clear()
                joined += piece
                if kind in (_FULL, _LAST):
                    yield start + end, bytes(joined)
                elif kind not in (_FIRST, _MIDDLE):
                    return
            start += len(block)
            block, offset = file.read(_BLOCK_BYTES), 0


def _pieces(block: bytes, offset: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield a block's pieces of records as (end, type, content); a broken one is yielded with type 0, as the last."""
    while len(block) - offset >= _RECORD_HEAD.size:
        checksum, length, kind = _RECORD_HEAD.unpack_from(block, offset)
        offset += _RECORD_HEAD.size
        piece = block[offset : offset + length]
        if len(piece) < length or zlib.crc32(piece, zlib.crc32(bytes([kind]))) != checksum:
            yield offset, 0, b""
            return
        offset += length
        yield offset, kind, piece


def _fields(message: bytes) -> Iterable[tuple[int, bytes]]:
    """Return the length-delimited fields of a protobuf message as (number, content)."""
    offset, found = 0, []
    while offset < len(message):
        tag, offset = _varint(message, offset)
        wire_type = tag & 7
        if wire_type == _LENGTH_DELIMITED:
            length, offset = _varint(message, offset)
            found.append((tag >> 3, message[offset : offset + length]))
            offset += length
        elif wire_type == 0:
            _, offset = _varint(message, offset)
        elif wire_type in _FIXED_BYTES:
            offset += _FIXED_BYTES[wire_type]
        else:
            raise ValueError(f"a record of W&B's log has a field of the unknown wire type {wire_type}")
    return found


def _varint(message: bytes, offset: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[offset]
        value |= (byte & 0x7F) << shift
        offset, shift = offset + 1, shift + 7
        if byte < 0x80:
            return value, offset
