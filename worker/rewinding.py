"""A trainer that goes back: which earlier state its new attempt goes on from, and how that state is made again.

A resume at step 1,000 after 1,500 is a new attempt: its steps are logged again, and detectors and the epoch's counts go
on from what was known before step 1,000 (docs/delivery.md, section 1). The journal keeps snapshots of that state, the
thinner the longer ago (intake/state_history.py); the steps from the snapshot on are projected once more from their
messages, and nothing of it is shown. So the state is exact. Where that is too long, or messages are gone, the state is
the snapshot's, and what lies between is said. The decision is recorded, and a replay obeys it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Final, TypeAlias

from sidestep.protocol.messages import Answers, Notice
from sidestep.worker.contexts import build_context
from sidestep.worker.intake.assembly import Journaled, Key, assemble, step_of
from sidestep.worker.intake.decisions import ContextRecord, Decision, Rewind
from sidestep.worker.intake.index import Index
from sidestep.worker.intake.state_history import snapshots
from sidestep.worker.own_detectors import recorded
from sidestep.worker.projection import RunProjection
from sidestep.worker.records import StepClosing

_LOG: Final = logging.getLogger(__name__)

MAX_REDONE_STEPS: Final = 2_048
"""Steps that are projected again at most: some seconds. It is enough for a way back of some 16,000 steps."""
_BATCH_DECISIONS: Final = 256

MessagesOf: TypeAlias = Callable[[StepClosing], Mapping[Key, Journaled]]
"""Returns the messages that a closing used; raises JournalError where they cannot be read."""


def plan_rewind(index: Index, run_id: str, attempt: int, step: int) -> Rewind | None:
    """Return what an attempt that begins at ``step`` goes back to; None where it goes on from where the run stands.

    All closings before it have to be written.
    """
    newest = index.newest_step_closing(run_id)
    source = index.newest_step_closing(run_id, before=step)
    if newest is None or newest == source:
        return None
    made = Rewind(
        run_id=run_id, attempt=attempt, step=step, source_number=-1, snapshot_number=-1, is_exact=True
    )  # fmt: skip
    if source is None:
        return made
    made = replace(made, source_number=source[0])
    snapshot = _newest_snapshot(index, made)
    num_steps = sum(index.count_steps(run_id, first, last) for first, last in _to_redo(index, made, snapshot))
    return replace(made, snapshot_number=snapshot, is_exact=num_steps <= MAX_REDONE_STEPS)


def _spans(index: Index, run_id: str, source_number: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of the closings that led to the state after ``source_number``, the newest first.

    Closings are numbered over all attempts; where a rewind stands among them, what led to it comes before its source.
    """
    last = source_number
    for rewind in reversed(index.rewinds(run_id)):
        if rewind.closed_number <= last:
            yield rewind.closed_number, last
            last = rewind.source_number if rewind.is_exact else rewind.snapshot_number
    if last >= 0:
        yield 0, last


def _newest_snapshot(index: Index, rewind: Rewind) -> int:
    kept = snapshots(index.next_closed_number(rewind.run_id) + 1)  # they are still there when the rewind is written
    for first, last in _spans(index, rewind.run_id, rewind.source_number):
        within = (number for number in reversed(kept) if first <= number <= last)
        found = next((number for number in within if index.has_snapshot(rewind.run_id, number)), None)
        if found is not None:
            return found
    return -1


def _to_redo(index: Index, rewind: Rewind, snapshot: int) -> list[tuple[int, int]]:
    """Return (first, last) of the closings from the snapshot to the source, the oldest first."""
    found: list[tuple[int, int]] = []
    for first, last in _spans(index, rewind.run_id, rewind.source_number):
        if first <= snapshot <= last:
            found.append((snapshot + 1, last))
            break
        found.append((first, last))
    return found[::-1]


class EarlierState:
    """Makes the projection that a rewind goes back to."""

    def __init__(self, index: Index, messages_of: MessagesOf) -> None:
        """Read decisions, snapshots, Hellos and tables from ``index``."""
        self._index = index
        self._messages_of = messages_of

    def make(self, rewind: Rewind, otherwise: ContextRecord) -> RunProjection:
        """Return a projection as it was after the rewind's source, or after its snapshot where it is not exact.

        Args:
            rewind: as it was planned or recorded.
            otherwise: the context of a run of which nothing is known before.

        Raises:
            JournalError: a message that is needed is gone or cannot be read.
            ValueError: the snapshot is of another version.
        """
        before = [each for each in self._index.contexts(rewind.run_id) if each.closed_number <= rewind.snapshot_number]
        context, hello = build_context(self._index, before[-1] if before else otherwise)
        projection = RunProjection(context, hello, own_detectors=recorded(self._index))
        if rewind.snapshot_number >= 0:
            projection.restore_pieces(self._index.pieces(rewind.run_id, rewind.snapshot_number))
        if rewind.is_exact and rewind.source_number >= 0:
            for decision in self._decisions(rewind):
                self._redo(projection, decision)
            self._count_late(projection, rewind)
        return projection

    def _decisions(self, rewind: Rewind) -> Iterator[Decision]:
        for first, last in _to_redo(self._index, rewind, rewind.snapshot_number):
            for start in range(first, last + 1, _BATCH_DECISIONS):
                yield from self._index.closings(rewind.run_id, start, min(last, start + _BATCH_DECISIONS - 1))

    def _redo(self, projection: RunProjection, decision: Decision) -> None:
        if isinstance(decision, ContextRecord):
            projection.adopt(*build_context(self._index, decision))
        elif isinstance(decision, StepClosing):
            step = assemble(decision, self._messages_of(decision))
            try:
                projection.project(step)
            except Exception as error:  # noqa: BLE001  (it did so when the step was closed, and was told and counted)
                _LOG.debug("step %d cannot be worked out again: %s", decision.step, error)

    def _count_late(self, projection: RunProjection, rewind: Rewind) -> None:
        """Answers of steps before the rewind may have come after its source; they count once, as before."""
        for closing in self._index.closings_with_late_parts(rewind.run_id, rewind.source_number):
            messages = self._messages_of(closing)
            late = [messages[key] for key in sorted(closing.late_parts) if key in messages]
            parts = [each.part() for each in late if isinstance(each.message, Answers)]
            projection.count_late([part for part in parts if step_of(part.message) < rewind.step], closing.attempt)


def rewind_notice(index: Index, rewind: Rewind) -> Notice | None:
    """Return what is to be said of a rewind; None where nothing is missing."""
    if rewind.is_exact:
        return None
    known = index.newest_step_until(rewind.run_id, rewind.snapshot_number)
    state = "the empty state" if known is None else f"the state after step {known}"
    text = (
        f"resumed at step {rewind.step}, and what was known just before it cannot be worked out any more: detectors "
        f"and data/* of the epoch go on from {state}, and lack the steps from there on; their rows are untouched"
    )
    return Notice(text=text, code=f"rewound:{rewind.attempt}", step=rewind.step)
