"""States of a run's projection after past closings, so that a trainer that goes back finds what was known there.

A state is stored in pieces, each one only when it has changed; the state after closing n is the newest row of every
piece up to n. The newest state is always whole. Of older ones those after every ``SNAPSHOT_CLOSINGS``th closing are
kept, the thinner the longer ago: ``SNAPSHOTS_PER_AGE`` of each distance, then every second one. Which ones is a
function of the closings' numbers alone, so a replay has the same (docs/delivery.md, section 1).
"""

from __future__ import annotations

import sqlite3
from bisect import bisect_left
from collections.abc import Mapping
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Final

SNAPSHOT_CLOSINGS: Final = 64
"""Closings from one snapshot to the next."""
SNAPSHOT_MARK: Final = "run"
"""The piece that every snapshot stores anew, changed or not."""
SNAPSHOTS_PER_AGE: Final = 8
"""Snapshots kept of each distance: some 50 of a run of a million steps."""


def is_snapshot(closed_number: int) -> bool:
    """Return whether the state after this closing is one that is kept at first."""
    return closed_number % SNAPSHOT_CLOSINGS == 0


def snapshots(newest: int) -> list[int]:
    """Return the closings whose states are kept when closing ``newest`` is the last one, ascending; empty below 0."""
    kept: set[int] = set()
    stride = SNAPSHOT_CLOSINGS
    while newest >= 0:
        last = newest - newest % stride
        kept.update(range(max(0, last - (SNAPSHOTS_PER_AGE - 1) * stride), last + 1, stride))
        if stride * SNAPSHOTS_PER_AGE > newest:
            break
        stride *= 2
    return sorted(kept)


def write_pieces(connection: sqlite3.Connection, run_id: str, closed_number: int, pieces: Mapping[str, bytes]) -> None:
    """Store the pieces that a closing changed, within the caller's transaction, and let go of what is too old."""
    newest_snapshot = (closed_number - 1) // SNAPSHOT_CLOSINGS * SNAPSHOT_CLOSINGS
    for name, body in pieces.items():
        connection.execute(
            "DELETE FROM state_piece WHERE run_id = ? AND name = ? AND closed_number > ? AND closed_number < ?",
            (run_id, name, newest_snapshot, closed_number),
        )
        connection.execute(
            "INSERT OR REPLACE INTO state_piece VALUES (?, ?, ?, ?)", (run_id, name, closed_number, body)
        )
    if is_snapshot(closed_number):
        _thin_out(connection, run_id, closed_number)


def _thin_out(connection: sqlite3.Connection, run_id: str, newest: int) -> None:
    kept = snapshots(newest)
    rows = connection.execute(
        "SELECT name, closed_number FROM state_piece WHERE run_id = ? ORDER BY name, closed_number", (run_id,)
    ).fetchall()
    unneeded = []
    for name, group in groupby(rows, key=itemgetter(0)):
        numbers = [number for _, number in group]
        for number, following in pairwise(numbers):
            at = bisect_left(kept, number)
            if at == len(kept) or kept[at] >= following:
                unneeded.append((run_id, name, number))
    connection.executemany("DELETE FROM state_piece WHERE run_id = ? AND name = ? AND closed_number = ?", unneeded)


PIECES_QUERY: Final = (
    "SELECT name, body FROM state_piece AS piece WHERE run_id = ?1 AND closed_number = (SELECT MAX(closed_number)"
    " FROM state_piece WHERE run_id = ?1 AND name = piece.name AND closed_number <= ?2)"
)
"""All pieces of a run as they were after a closing: the newest one, or one of ``snapshots``; others are of no use."""
