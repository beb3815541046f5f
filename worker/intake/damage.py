"""What a broken file of the journal means: which messages are gone, and which of them a closed step had used."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from sidestep.protocol.ranges import RangeSet
from sidestep.worker.intake.index import Index
from sidestep.worker.intake.salvage import damaged_path
from sidestep.worker.intake.segment_file import SegmentFile
from sidestep.worker.intake.segment_table import Damaged, Held, Stream, add_ranges, subtract

_NAMED_RANGES: Final = 4
_EMPTY: Final = Held()


def assess(
    index: Index,
    segments: Sequence[SegmentFile],
    broken: SegmentFile,
    copy: SegmentFile,
    reason: str,
    *,
    is_known: bool,
) -> Damaged:
    """Return what is lost with ``broken``, of which ``copy`` holds what could be read.

    A message that a closed step used is in the run and stays known, so that it is not stored a second time. Any other
    is forgotten, so that it is stored where a trainer sends it again.
    """
    others = [each for each in segments if each is not broken]
    held = {stream: known.ranges for stream, known in broken.streams.items()} if is_known else None
    begins = broken.first_arrival if is_known else max((each.last_arrival for each in others), default=-1) + 1
    used = _used(index, begins, [*others, copy], held)
    lost: dict[Stream, RangeSet] = {}
    for (name, rank), ranges in (held or {}).items():
        copied = copy.streams.get((name, rank), _EMPTY).ranges
        rest = subtract(subtract(ranges, copied), used.get((name, rank), RangeSet()))
        if not len(rest):
            continue
        run_id = run_of(index, name)
        if run_id is not None and index.pending_arrival(run_id) > broken.last_arrival:
            add_ranges(used.setdefault((name, rank), RangeSet()), rest)  # of no step, or after the end: all is closed
        else:
            lost[name, rank] = rest
    there = broken.path.exists()
    aside = damaged_path(broken.path.parent, broken.number)
    return Damaged(
        number=broken.number,
        file=aside.name if there else aside.name.replace(".corrupt", ".missing"),
        reason=reason,
        found_at=time.time(),
        is_complete=is_known,
        lost=lost,
        used=used,
    )


def cut_off(
    index: Index, segments: Sequence[SegmentFile], known: Mapping[Stream, RangeSet], held: int
) -> Damaged | None:
    """Return what closed steps used of the messages after arrival ``held``, the newest that a segment has; or None."""
    gone = SegmentFile(0, Path(), streams={stream: Held(ranges) for stream, ranges in known.items()})
    used = _used(index, held + 1, [*segments, gone], None)
    if not used:
        return None
    active = segments[-1]
    return Damaged(
        number=active.number,
        file=f"{active.path.name}-wal, after arrival {held}",
        reason="its end is gone though it had been written to the disk",
        found_at=time.time(),
        is_complete=False,
        used=used,
    )


def _used(
    index: Index, arrival: int, present: Sequence[SegmentFile], held: Mapping[Stream, RangeSet] | None
) -> dict[Stream, RangeSet]:
    """Return what closings used that arrived from ``arrival`` on and is in no present segment (and is in ``held``)."""
    used: dict[Stream, RangeSet] = {}
    for run_id in index.runs():
        for closing in index.closings_using(run_id, arrival):
            for rank, sequence in (*closing.parts, *closing.late_parts):
                stream = (closing.incarnation, rank)
                if held is not None and sequence not in held.get(stream, _EMPTY.ranges):
                    continue
                if not any(sequence in each.streams.get(stream, _EMPTY).ranges for each in present):
                    used.setdefault(stream, RangeSet()).add(sequence)
    return used


def run_of(index: Index, incarnation: str) -> str | None:
    """Return the run that an incarnation belongs to."""
    return next((each.run_id for each in index.incarnations() if each.incarnation == incarnation), None)


def damage_line(folder: Path, found: Damaged) -> str:
    """Return what the log says of a broken file."""
    return f"the journal {folder} is damaged: {_told(found, found.lost, found.used)}"


def damage_text(found: Damaged, incarnations: Iterable[str]) -> str:
    """Return what a run says of a broken file that held its messages; empty where it held none of them."""
    names = set(incarnations)
    lost = {stream: ranges for stream, ranges in found.lost.items() if stream[0] in names}
    used = {stream: ranges for stream, ranges in found.used.items() if stream[0] in names}
    if found.is_complete and not lost and not used:
        return ""
    return f"the worker's journal is damaged: {_told(found, lost, used)}"


def _told(found: Damaged, lost: Mapping[Stream, RangeSet], used: Mapping[Stream, RangeSet]) -> str:
    num_lost, num_used = (sum(len(ranges) for ranges in each.values()) for each in (lost, used))
    parts = [f"segment {found.number} ({found.reason}) is set aside as {found.file}, what can be read of it is kept"]
    if num_used:
        parts.append(f"{num_used} messages of steps that had closed are gone: their rows are here, a replay lacks them")
    if num_lost:
        parts.append(
            f"{num_lost} messages of steps that had not closed are lost, unless the trainer still holds them and sends "
            f"them again ({_named(lost)})"
        )
    if not found.is_complete:
        parts.append("how many newer messages it held is not known: the trainer's accounts count them")
    elif not num_lost:
        parts.append("no step lacks anything")
    return "; ".join(parts)


def _named(lost: Mapping[Stream, RangeSet]) -> str:
    named = [
        f"rank {rank}: {first}" + (f"-{last}" if last > first else "")
        for (_, rank), ranges in sorted(lost.items())
        for first, last in ranges.ranges().tolist()
    ]
    more = len(named) - _NAMED_RANGES
    return "messages of " + ", ".join(named[:_NAMED_RANGES]) + (f" and {more} more ranges" if more > 0 else "")
