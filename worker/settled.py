"""Runs that had ended before a worker started, and of which nothing more has come: known, but not woken.

A journal may hold thousands of them. A pipeline reads an attempt's tables, state and last messages and decodes them;
for a run that only has to be listed that is not worth its time. It is made when a message of the run comes after all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from sidestep.worker.intake.decisions import Incarnation
from sidestep.worker.intake.index import Index
from sidestep.worker.intake.journal import Journal
from sidestep.worker.pipeline import Outcome, RunPipeline


class SettledRun:
    """A run that has ended, as a pipeline of it would answer; what needs a real one is not offered."""

    def __init__(self, index: Index, run_id: str, newest: Incarnation) -> None:
        """Read nothing yet."""
        self._index = index
        self._closed_step: int | None = None
        self.run_id = run_id
        self.newest = newest
        self.is_ended = True
        self.open_incarnations: list[Incarnation] = []

    def recovery_start(self) -> None:
        """Nothing waits to be read back."""

    def advance(self, now: float, lost: Mapping[str, str]) -> Outcome:  # noqa: ARG002  (as a pipeline is asked)
        """Nothing is left to be done."""
        return Outcome()

    def standing(self, now: float) -> tuple[int, float]:  # noqa: ARG002  (the same)
        """Return the newest closed step, and that no step waits; raises JournalError where it cannot be read."""
        if self._closed_step is None:
            last = self._index.last_step_closing(self.run_id, self.newest.attempt)
            self._closed_step = -1 if last is None else last.step
        return self._closed_step, 0.0

    def statistics(self) -> dict[str, int]:
        """Return what a pipeline counts; nothing has happened since the start."""
        return {"open_steps": 0, "late_parts": 0, "attempts": self.newest.attempt + 1, "unprojected": 0}


KnownRun: TypeAlias = RunPipeline | SettledRun


def open_runs(journal: Journal, make: Callable[[str], RunPipeline]) -> dict[str, KnownRun]:
    """Return every run of the journal, the oldest first: a pipeline by ``make``, or a settled run where it needs none.

    Raises:
        JournalError: what the journal holds cannot be read.
    """
    index = journal.index
    newest: dict[str, Incarnation] = {}
    last_arrival: dict[str, int] = {}
    arrivals = journal.segments.last_arrivals()
    for each in index.incarnations():  # by run, then by attempt
        newest[each.run_id] = each
        last_arrival[each.run_id] = max(last_arrival.get(each.run_id, -1), arrivals.get(each.incarnation, -1))
    ended = index.ended_attempts()
    return {
        run_id: SettledRun(index, run_id, newest[run_id])
        if (run_id, newest[run_id].attempt) in ended and last_arrival[run_id] < index.pending_arrival(run_id)
        else make(run_id)
        for run_id in index.runs()
    }
