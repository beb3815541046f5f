"""The tables of a journal (docs/delivery.md, section 7). A change of them is a new ``SCHEMA_VERSION``."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any, Final

import numpy as np

SCHEMA_VERSION: Final = "2"
READABLE_SCHEMAS: Final = ("1", "2")
"""Version 1 has no checksums in segments and knows of no segment that went; it is read, and becomes 2 when written."""

SEGMENT_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS message(
  incarnation TEXT NOT NULL, rank INTEGER NOT NULL, sequence INTEGER NOT NULL,
  kind INTEGER NOT NULL, step INTEGER NOT NULL, wire_major INTEGER NOT NULL, wire_minor INTEGER NOT NULL,
  received_at REAL NOT NULL, arrival INTEGER NOT NULL, body BLOB NOT NULL, checksum INTEGER,
  PRIMARY KEY(incarnation, rank, sequence)) WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS message_arrival ON message(arrival);
"""
"""``body`` is the whole frame as it came, ``checksum`` its CRC-32; ``arrival`` counts over all segments, in the order
of the commits."""
ADD_CHECKSUMS: Final = "ALTER TABLE message ADD COLUMN checksum INTEGER"
"""Makes a segment of version 1 one of version 2; messages without a checksum are taken as they are."""
ADD_LAST_ARRIVALS: Final = "ALTER TABLE stream_range ADD COLUMN last_arrival INTEGER"
"""The same for an index."""

INDEX_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS meta(key TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT OR IGNORE INTO meta VALUES ('schema', '2');
CREATE TABLE IF NOT EXISTS run(run_id TEXT PRIMARY KEY, created_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS incarnation(
  incarnation TEXT PRIMARY KEY, run_id TEXT NOT NULL, attempt INTEGER NOT NULL, first_seen REAL NOT NULL,
  world_size INTEGER NOT NULL, start_step INTEGER NOT NULL, UNIQUE(run_id, attempt));
CREATE TABLE IF NOT EXISTS hello(
  incarnation TEXT NOT NULL, rank INTEGER NOT NULL, received_at REAL NOT NULL, body BLOB NOT NULL,
  PRIMARY KEY(incarnation, rank));
CREATE TABLE IF NOT EXISTS blob(digest TEXT PRIMARY KEY, content BLOB NOT NULL, received_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS step_closed(
  run_id TEXT NOT NULL, attempt INTEGER NOT NULL, step INTEGER NOT NULL, reason TEXT NOT NULL,
  incarnation TEXT NOT NULL, parts BLOB NOT NULL, late_parts BLOB NOT NULL, ranks_expected INTEGER NOT NULL,
  closed_number INTEGER NOT NULL, pending_arrival INTEGER NOT NULL, last_arrival INTEGER NOT NULL,
  PRIMARY KEY(run_id, closed_number));
CREATE UNIQUE INDEX IF NOT EXISTS step_closed_once ON step_closed(run_id, attempt, step) WHERE reason <> 'tail';
CREATE INDEX IF NOT EXISTS step_closed_arrival ON step_closed(run_id, last_arrival);
CREATE TABLE IF NOT EXISTS ending(
  run_id TEXT NOT NULL, attempt INTEGER NOT NULL, closed_number INTEGER NOT NULL, exit_code INTEGER NOT NULL,
  reason TEXT NOT NULL, tail_unknown INTEGER NOT NULL, unix_time REAL NOT NULL, newest_step INTEGER NOT NULL,
  pending_arrival INTEGER NOT NULL, PRIMARY KEY(run_id, closed_number));
CREATE TABLE IF NOT EXISTS context(
  run_id TEXT NOT NULL, attempt INTEGER NOT NULL, revision INTEGER NOT NULL, closed_number INTEGER NOT NULL,
  incarnation TEXT NOT NULL, ranks BLOB NOT NULL, missing TEXT NOT NULL, PRIMARY KEY(run_id, attempt, revision));
CREATE TABLE IF NOT EXISTS repeat(
  run_id TEXT NOT NULL, attempt INTEGER NOT NULL, closed_number INTEGER NOT NULL, row_numbers BLOB NOT NULL,
  PRIMARY KEY(run_id, closed_number));
CREATE TABLE IF NOT EXISTS rewind(
  run_id TEXT NOT NULL, attempt INTEGER NOT NULL, closed_number INTEGER NOT NULL, step INTEGER NOT NULL,
  source_number INTEGER NOT NULL, snapshot_number INTEGER NOT NULL, is_exact INTEGER NOT NULL,
  PRIMARY KEY(run_id, closed_number));
CREATE TABLE IF NOT EXISTS state_piece(
  run_id TEXT NOT NULL, name TEXT NOT NULL, closed_number INTEGER NOT NULL, body BLOB NOT NULL,
  PRIMARY KEY(run_id, name, closed_number));
CREATE TABLE IF NOT EXISTS state(
  run_id TEXT NOT NULL, name TEXT NOT NULL, closed_number INTEGER NOT NULL, attempt INTEGER NOT NULL,
  step INTEGER NOT NULL, body BLOB NOT NULL, PRIMARY KEY(run_id, name));
CREATE TABLE IF NOT EXISTS outbox(
  run_id TEXT NOT NULL, position INTEGER NOT NULL, kind TEXT NOT NULL, row_number INTEGER, payload BLOB NOT NULL,
  PRIMARY KEY(run_id, position));
CREATE TABLE IF NOT EXISTS segment(
  number INTEGER PRIMARY KEY, first_arrival INTEGER NOT NULL, last_arrival INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS stream_range(
  segment INTEGER NOT NULL, incarnation TEXT NOT NULL, rank INTEGER NOT NULL, ranges BLOB NOT NULL,
  last_arrival INTEGER, PRIMARY KEY(segment, incarnation, rank));
CREATE TABLE IF NOT EXISTS segment_deleted(
  number INTEGER PRIMARY KEY, first_arrival INTEGER NOT NULL, last_arrival INTEGER NOT NULL,
  messages INTEGER NOT NULL, size_bytes INTEGER NOT NULL, deleted_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS segment_damaged(
  number INTEGER NOT NULL, file TEXT PRIMARY KEY, reason TEXT NOT NULL, found_at REAL NOT NULL,
  is_complete INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS lost_range(
  file TEXT NOT NULL, incarnation TEXT NOT NULL, rank INTEGER NOT NULL, used INTEGER NOT NULL, ranges BLOB NOT NULL,
  PRIMARY KEY(file, incarnation, rank, used));
CREATE TABLE IF NOT EXISTS loss(
  run_id TEXT NOT NULL, attempt INTEGER NOT NULL, closed_number INTEGER NOT NULL, file TEXT NOT NULL,
  text TEXT NOT NULL, PRIMARY KEY(run_id, closed_number));
"""
"""``stream_range`` of segment 0 is what deleted segments held, and what closed steps used of damaged ones: messages
that are known and never stored again. ``lost_range`` is what a damaged segment lacks; ``used`` where a closed step had
it."""


def pack_pairs(pairs: Iterable[tuple[int, int]]) -> bytes:
    """Return pairs of integers as little-endian int64 [n, 2]."""
    return np.fromiter(chain.from_iterable(pairs), "<i8").tobytes()


def unpack_pairs(packed: Any) -> tuple[tuple[int, int], ...]:
    """Return what ``pack_pairs`` was given; raises ValueError for bytes that are no pairs."""
    return tuple((first, second) for first, second in np.frombuffer(packed, "<i8").reshape(-1, 2).tolist())
