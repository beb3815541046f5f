"""Rebuilds runs from their journal alone, and compares what comes out with what was recorded, byte for byte.

Nothing is decided again: the recorded closings say which messages each step had, which tables were there, and when each
attempt ended (docs/delivery.md, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from sidestep.worker.errors import JournalError
from sidestep.worker.intake.assembly import assemble
from sidestep.worker.intake.decisions import Closure, ContextRecord, Ending, Loss, Repeat, Rewind
from sidestep.worker.intake.index import Index
from sidestep.worker.intake.journal import Journal
from sidestep.worker.intake.run_copy import copy_run
from sidestep.worker.intake.state_history import is_snapshot
from sidestep.worker.outbox import StoredEntry, canonical
from sidestep.worker.own_detectors import recorded, remember
from sidestep.worker.projector import RunProjector
from sidestep.worker.records import StepClosing

ROWS_FILE: Final = "rows.jsonl"
_BATCH_DECISIONS: Final = 256
_BATCH_ENTRIES: Final = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How a rebuilt run stands to the recorded one."""

    run_id: str
    entries: int
    """Entries of the rebuilt run."""
    rows: int
    """Rows and tables among them."""
    recorded: int
    """Entries that were recorded."""
    is_ended: bool
    """Whether the run's newest attempt has ended."""
    first_difference: int | None
    """Position of the first entry that is not the same; None where all are."""
    missing: str = ""
    """Why the run could not be rebuilt, where its recorded entries were brought over as they are; else empty."""

    @property
    def is_identical(self) -> bool:
        """Whether the run was rebuilt, and both have the same entries, byte for byte."""
        return self.first_difference is None and not self.missing


def replay_run(source: Journal, run_id: str, target: Index) -> Comparison:
    """Rebuild one run of ``source`` into ``target``, an index without it, and compare the two.

    Raises:
        JournalError: a message or a table that the closings name is gone or cannot be read.
    """
    _copy_opening(source.index, run_id, target)
    remember(target, recorded(source.index))
    projector = RunProjector(target, source.messages_of)
    batch: list[Closure] = []
    decisions = source.index.closings(run_id)
    for decision in decisions:
        if len(batch) >= _BATCH_DECISIONS or (batch and isinstance(decision, Repeat | Rewind)):
            target.write(run_id, batch)  # what is repeated, or gone back to, has to be there
            batch = []
        if isinstance(decision, Repeat):
            made = Closure(closing=decision, entries=target.entries_of_rows(run_id, decision.row_numbers))
        else:
            made = _redone(source, projector, decision)
        pieces = projector.changed_pieces(is_snapshot=True) if is_snapshot(decision.closed_number) else {}
        batch.append(replace(made, pieces=pieces))
    if batch:
        target.write(run_id, batch)
    return _compare(source.index, target, run_id, is_ended=bool(decisions) and isinstance(decisions[-1], Ending))


def _copy_opening(source: Index, run_id: str, target: Index) -> None:
    for digest in sorted(source.blob_digests() - target.blob_digests()):
        target.add_blob(digest, source.blob(digest) or b"", 0.0)
    for incarnation in source.incarnations(run_id):
        for rank, body in source.hellos(incarnation.incarnation).items():
            target.add_hello(incarnation, rank, incarnation.first_seen, body)


def _redone(
    source: Journal, projector: RunProjector, decision: StepClosing | Ending | ContextRecord | Loss | Rewind
) -> Closure:
    if isinstance(decision, ContextRecord):
        projector.adopt(decision)
        return Closure(closing=decision)
    if isinstance(decision, Loss):
        return Closure(closing=decision, entries=decision.entries())
    if isinstance(decision, Ending):
        return Closure(closing=decision, entries=projector.finish(decision).entries)
    if isinstance(decision, Rewind):
        return Closure(closing=decision, entries=projector.rewind(decision).entries)
    step = assemble(decision, source.messages_of(decision))
    return Closure(closing=decision, entries=projector.project(step).entries)


def entries_of(index: Index, run_id: str) -> Iterator[StoredEntry]:
    """Yield the entries of a run's outbox, in order."""
    position = 0
    while batch := index.outbox(run_id, position, _BATCH_ENTRIES):
        yield from batch
        position = batch[-1].position + 1


def _compare(recorded: Index, rebuilt: Index, run_id: str, *, is_ended: bool) -> Comparison:
    before, after = entries_of(recorded, run_id), entries_of(rebuilt, run_id)
    num_recorded = num_rebuilt = num_rows = 0
    difference: int | None = None
    while True:
        old, new = next(before, None), next(after, None)
        if old is None and new is None:
            break
        if old != new and difference is None:
            difference = max(num_recorded, num_rebuilt) if old is None or new is None else new.position
        num_recorded += old is not None
        num_rebuilt += new is not None
        num_rows += new is not None and new.row_number is not None
    return Comparison(
        run_id=run_id,
        entries=num_rebuilt,
        rows=num_rows,
        recorded=num_recorded,
        is_ended=is_ended,
        first_difference=difference,
    )


def _replayed(source: Journal, run_id: str, target: Index) -> Comparison:
    """Rebuild a run, or where its messages are gone, bring over what is recorded of it."""
    if not source.missing_messages(run_id):
        try:
            return replay_run(source, run_id, target)
        except JournalError:
            if not source.missing_messages(run_id):  # else a segment turned out to be broken on the way
                raise
    _copy_opening(source.index, run_id, target)
    copy_run(source.index.database, run_id, target.database)
    decisions = source.index.closings(run_id)
    is_ended = any(isinstance(each, Ending) for each in decisions[-1:])
    return replace(_compare(source.index, target, run_id, is_ended=is_ended), missing=source.missing_messages(run_id))


def write_rows(index: Index, run_ids: Sequence[str], file: Path) -> None:
    """Write the runs' entries as lines of JSON: the payload with its run, position and kind.

    Raises:
        OSError: the file cannot be written.
    """
    fresh = file.with_name(f".{file.name}.new")
    with fresh.open("wb") as lines:
        for run_id in run_ids:
            for each in entries_of(index, run_id):
                head = canonical({"run_id": run_id, "position": each.position, "kind": each.kind})
                lines.write(head[:-1] + b',"payload":' + each.payload + b"}\n")
    fresh.replace(file)


def replay(journal: Path, out: Path, tell: Callable[[Comparison], None]) -> tuple[Path, list[Comparison]]:
    """Rebuild every run of ``journal`` into a fresh journal in ``out``; return its folder and the comparisons.

    Raises:
        JournalError: the journal cannot be read, or ``out`` already holds another.
    """
    folder = out / "journal"
    if folder.exists():
        raise JournalError(f"{folder} is there already; name another --out")
    source = Journal(journal, read_only=True)
    made = []
    try:
        target = Journal(folder, on_network_fs=True)  # what is lost of it can be made again
        try:
            for run_id in source.index.runs():
                made.append(_replayed(source, run_id, target.index))
                tell(made[-1])
            write_rows(target.index, source.index.runs(), out / ROWS_FILE)
        finally:
            target.close()
    finally:
        source.close()
    return folder, made
