"""One run from journaled messages to its outbox: assemble, project, and write both in one transaction."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from sidestep.protocol.messages import Command, Goodbye, Notice, StepEnd
from sidestep.worker.contexts import is_whole, survey
from sidestep.worker.errors import JournalError, JournalWriteError
from sidestep.worker.intake.assembler import Assembler
from sidestep.worker.intake.assembly import Journaled
from sidestep.worker.intake.decisions import Closure, ContextRecord, Decision, Ending, Incarnation, Repeat
from sidestep.worker.intake.journal import Journal
from sidestep.worker.intake.state_history import is_snapshot
from sidestep.worker.outbox import StoredEntry
from sidestep.worker.projection import Projection
from sidestep.worker.projector import RunProjector
from sidestep.worker.records import StepClosing
from sidestep.worker.rewinding import MessagesOf, plan_rewind

_LOG: Final = logging.getLogger(__name__)
_WRITE_AGAIN_SECONDS: Final = 1.0
QUIET_SECONDS: Final = 2.0
"""Silence after which an incarnation that another one has followed has said all: what was on its way is here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one advance brought."""

    entries: tuple[StoredEntry, ...] = ()
    """Entries that are now in the outbox."""
    notices: tuple[Notice, ...] = ()
    """Lines for the trainer's console."""
    closings: int = 0
    """Decisions that were written with them."""
    requests: tuple[Command, ...] = ()
    """What the trainer is asked for."""


@dataclass(slots=True)
class _Batch:
    closures: list[Closure] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    requests: list[Command] = field(default_factory=list)


class RunPipeline:
    """All attempts of one run. One thread calls it; times are seconds of one monotonic clock, passed in."""

    def __init__(
        self,
        journal: Journal,
        run_id: str,
        *,
        deadline_seconds: float,
        clock: Callable[[], float] = time.time,
        messages_of: MessagesOf | None = None,
    ) -> None:
        """Continue where the journal stands; messages since then are brought by ``add`` again.

        Args:
            journal: where decisions and entries are kept.
            run_id: one of its runs.
            deadline_seconds: how long a step waits for missing parts.
            clock: gives the unix time that an attempt's end is stamped with.
            messages_of: finds the messages of past closings, where they are not in ``journal``.

        Raises:
            JournalError: what the journal holds cannot be read.
            ValueError: its projection's state is of another version.
        """
        self.run_id = run_id
        self._journal = journal
        self._deadline_seconds = deadline_seconds
        self._clock = clock
        self._projector = RunProjector(journal.index, messages_of or journal.messages_of)
        self._assemblers: dict[str, Assembler] = {}
        self._ended: set[str] = set()
        self._contexts: dict[int, ContextRecord] = {}
        self._context_since: dict[int, float] = {}
        self._found_wanting: set[int] = set()
        """Attempts of which a Hello or a table was missing when they were looked at, and none has come since."""
        self._heard_at: dict[str, float] = {}
        self._followed_at: dict[str, float] = {}
        self._survey_due = True
        self._batch = _Batch()
        self._repeats: list[int] = []
        self._write_at = 0.0
        self._taken_arrival = -1
        self._counts: Counter[str] = Counter()
        self._begun_attempt = journal.index.newest_attempt(run_id)
        self._pending_arrival = journal.index.pending_arrival(run_id)
        self._consumed = {
            (closing.incarnation, *key)
            for closing in journal.index.closings_using(run_id, self._pending_arrival)
            for key in (*closing.parts, *closing.late_parts)
        }
        self.refresh()
        self._restore()

    def _restore(self) -> None:
        index = self._journal.index
        by_attempt = {each.incarnation.attempt: name for name, each in self._assemblers.items()}
        self._ended = {by_attempt[ending.attempt] for ending in index.endings(self.run_id)}
        for record in index.contexts(self.run_id):
            self._contexts[record.attempt] = record
            self._projector.adopt(record)
        if self._contexts:
            old = index.state(self.run_id)
            self._projector.restore(index.pieces(self.run_id), None if old is None else old.body)

    @property
    def newest(self) -> Incarnation:
        """The run's newest incarnation."""
        assemblers = list(self._assemblers.values())  # asked for on another thread, too
        return max((each.incarnation for each in assemblers), key=lambda each: each.attempt)

    @property
    def is_ended(self) -> bool:
        """Whether the newest attempt has ended, and all of it is in the outbox."""
        return self.newest.incarnation in self._ended and not self._batch.closures

    @property
    def open_incarnations(self) -> list[Incarnation]:
        """Incarnations that have not ended, the oldest first."""
        return [each.incarnation for name, each in self._assemblers.items() if name not in self._ended]

    def recovery_start(self) -> int | None:
        """Return the arrival number from which the journal has messages that are not accounted for, None for none."""
        segments = self._journal.segments
        found = [segments.first_since(name, self._pending_arrival) for name in self._assemblers]
        return min((arrival for arrival in found if arrival is not None), default=None)

    # ------------------------------------------------------------------------------------------------ taking in

    def refresh(self) -> None:
        """A Hello or a table of this run has come."""
        self._survey_due = True
        self._found_wanting.clear()
        for incarnation in self._journal.index.incarnations(self.run_id):
            if incarnation.incarnation not in self._assemblers:
                self._assemblers[incarnation.incarnation] = self._assembler(incarnation)

    def _assembler(self, incarnation: Incarnation) -> Assembler:
        last = self._journal.index.last_step_closing(self.run_id, incarnation.attempt)
        if last is None:
            return Assembler(incarnation, deadline_seconds=self._deadline_seconds)
        made = Assembler(incarnation, deadline_seconds=self._deadline_seconds, last_closed=last.step)
        floors: dict[int, int] = {}
        for (rank, sequence), each in self._journal.messages(last.incarnation, last.parts).items():
            if isinstance(each.message, StepEnd):
                floors[rank] = max(floors.get(rank, 0), sequence)
        for rank in range(incarnation.world_size):
            held = self._journal.segments.committed(incarnation.incarnation, rank)
            made.restore_stream(rank, held, floors.get(rank, 0))
        return made

    def add(self, each: Journaled, now: float) -> None:
        """Take one journaled message of this run in."""
        name = each.envelope.incarnation
        self._taken_arrival = max(self._taken_arrival, each.arrival)
        if each.arrival < self._pending_arrival or (self._consumed and (name, *each.key) in self._consumed):
            return
        if name not in self._assemblers:
            self.refresh()
        self._heard_at[name] = now
        if name in self._ended:
            if name == self.newest.incarnation:
                self._ended.discard(name)  # it was given up too early
            else:
                self._assemblers[name].shut()
                self._counts["after_the_end"] += 1
        self._assemblers[name].add(each, now)

    def refuse(self, incarnation: str, rank: int, sequence: int) -> None:
        """A message of this number will never come."""
        if incarnation in self._assemblers:
            self._assemblers[incarnation].pass_over(rank, sequence)

    def repeat(self, row_numbers: Sequence[int]) -> None:
        """Append these tables once more: a sink that was killed may have left their upload undone."""
        self._repeats += row_numbers

    # ------------------------------------------------------------------------------------------------ going on

    def advance(self, now: float, lost: Mapping[str, str]) -> Outcome:
        """Close what can be closed, project it and write it; what cannot be written is kept and tried again.

        Args:
            now: seconds of the clock that ``add`` was given.
            lost: incarnations that went without a Goodbye, with the reason.
        """
        if not self._batch.closures:
            self._close(now, lost)
        if not self._batch.closures or now < self._write_at:
            return Outcome()
        try:
            self._add_state()
            entries = self._journal.index.write(self.run_id, self._batch.closures)
        except JournalWriteError as error:
            self._write_at = now + _WRITE_AGAIN_SECONDS
            self._counts["failed_writes"] += 1
            _LOG.warning("run %s: %s", self.run_id, error)
            return Outcome()
        done, self._batch = self._batch, _Batch()
        return Outcome(
            entries=tuple(entries),
            notices=tuple(done.notices),
            closings=len(done.closures),
            requests=tuple(done.requests),
        )

    def _add_state(self) -> None:
        """The newest closing carries what of the state has changed; what a failed write has not stored it still has."""
        last = self._batch.closures[-1]
        changed = self._projector.changed_pieces()
        self._batch.closures[-1] = replace(last, pieces={**last.pieces, **changed})

    def _append(
        self, decision: Decision, made: Projection, *, pending_arrival: int = 0, last_arrival: int = -1
    ) -> None:
        number = self._journal.index.next_closed_number(self.run_id) + len(self._batch.closures)
        self._batch.notices += made.notices
        self._batch.requests += made.requests
        self._batch.closures.append(
            Closure(
                closing=decision,
                entries=made.entries,
                pending_arrival=pending_arrival,
                last_arrival=last_arrival,
                pieces=self._projector.changed_pieces(is_snapshot=True) if is_snapshot(number) else {},
            )
        )

    def _repeat(self) -> None:
        attempt = max(self._contexts)
        decision = Repeat(run_id=self.run_id, attempt=attempt, row_numbers=tuple(sorted(self._repeats)))
        entries = self._journal.index.entries_of_rows(self.run_id, decision.row_numbers)
        self._append(decision, Projection(entries=entries))
        self._repeats = []

    def _close(self, now: float, lost: Mapping[str, str]) -> None:
        if self._repeats and self._contexts:
            self._repeat()
            return
        for name, assembler in self._assemblers.items():
            if name in self._ended:
                if assembler.has_leftovers() and self._is_quiet(name, now):
                    self._close_steps(assembler, now, ended=True)
            else:
                self._close_open(name, assembler, now, lost)
            if self._batch.closures or name not in self._ended:
                return  # one attempt at a time

    def _close_open(self, name: str, assembler: Assembler, now: float, lost: Mapping[str, str]) -> None:
        is_over = assembler.has_ended(now)
        is_followed = name != self.newest.incarnation and self._is_quiet(name, now)
        ended = is_over or is_followed or name in lost
        if not self._adopt(assembler, now, at_once=ended):
            return
        self._close_steps(assembler, now, ended=ended)
        if ended and not assembler.has_leftovers():
            reason = lost.get(name, "the trainer went without a goodbye, and started again")
            self._end(assembler, is_clean=is_over and name not in lost, reason=reason)

    def _is_quiet(self, name: str, now: float) -> bool:
        """Whether what an incarnation had sent before another followed it has come: nothing came for a while."""
        followed = self._followed_at.setdefault(name, now)
        heard = max(followed, self._heard_at.get(name, followed))
        return now - heard >= min(QUIET_SECONDS, self._deadline_seconds) or now - followed >= self._deadline_seconds

    def _close_steps(self, assembler: Assembler, now: float, *, ended: bool) -> None:
        for closed in assembler.close_ready(now, ended=ended):
            if closed.closing.reason != "tail" and closed.closing.attempt > self._begun_attempt:
                self._begin(closed.closing)
            made = self._projector.project(closed.step)
            self._append(
                closed.closing,
                made,
                pending_arrival=self._accounted(assembler, closed.pending_arrival),
                last_arrival=closed.last_arrival,
            )
            self._counts[f"closed_{closed.closing.reason}"] += 1

    def _accounted(self, assembler: Assembler, arrival: int) -> int:
        """Return before which arrival all is accounted for, where ``assembler``'s own messages are so before this."""
        others = [each.oldest_waiting() for each in self._assemblers.values() if each is not assembler]
        return min([arrival, *(each for each in others if each is not None)])

    def _begin(self, closing: StepClosing) -> None:
        """At a new attempt's first step: where the trainer went back, what was known before it is known again."""
        self._begun_attempt = closing.attempt
        planned = plan_rewind(self._journal.index, self.run_id, closing.attempt, closing.step)
        if planned is None:
            return
        tries = (planned, replace(planned, is_exact=False), replace(planned, is_exact=False, snapshot_number=-1))
        for rewind in tries:
            try:
                made = self._projector.rewind(rewind)
            except (JournalError, ValueError) as error:
                _LOG.warning("run %s, resumed at step %d: %s", self.run_id, closing.step, error)
                continue
            self._append(rewind, made)
            self._counts["rewinds" if rewind.is_exact else "inexact_rewinds"] += 1
            return

    def _adopt(self, assembler: Assembler, now: float, *, at_once: bool) -> bool:
        """Take up what is newly known of an attempt; return whether its steps can be projected."""
        incarnation = assembler.incarnation
        known = self._contexts.get(incarnation.attempt)
        if known is not None and (not self._survey_due or is_whole(known, incarnation)):
            return True
        waited = now - self._context_since.setdefault(incarnation.attempt, now)
        waits = known is None and not at_once and waited < self._deadline_seconds
        if waits and not self._may_be_whole(incarnation):
            return False
        record = survey(self._journal.index, incarnation, 0 if known is None else known.revision + 1)
        if waits and not is_whole(record, incarnation):
            self._found_wanting.add(incarnation.attempt)
            return False
        self._survey_due = False
        if known is None or (record.ranks, record.missing) != (known.ranks, known.missing):
            self._projector.adopt(record)
            self._contexts[incarnation.attempt] = record
            self._append(record, Projection())
        return True

    def _may_be_whole(self, incarnation: Incarnation) -> bool:
        """Whether looking at an attempt can find it whole: while its ranks come, nobody reads all Hellos every turn."""
        if incarnation.attempt in self._found_wanting:
            return False
        return self._journal.index.num_hellos(incarnation.incarnation) >= incarnation.world_size

    def _end(self, assembler: Assembler, *, is_clean: bool, reason: str) -> None:
        exit_code = 1
        if is_clean:
            byes = [each.message for _, each in sorted(assembler.goodbyes.items())]
            said = [bye for bye in byes if isinstance(bye, Goodbye)]
            chosen = next((bye for bye in said if bye.exit_code), said[0])
            exit_code, reason = chosen.exit_code, chosen.reason
        ending = Ending(
            run_id=self.run_id,
            attempt=assembler.incarnation.attempt,
            exit_code=exit_code,
            reason=reason,
            tail_unknown=not is_clean,
            unix_time=self._clock(),
            newest_step=assembler.newest_step,
        )
        made = self._projector.finish(ending)
        self._append(ending, made, pending_arrival=self._accounted(assembler, self._taken_arrival + 1))
        self._ended.add(assembler.incarnation.incarnation)

    def standing(self, now: float) -> tuple[int, float]:
        """Return the newest closed step, -1 for none, and how long the oldest open step has waited, in seconds.

        ``now`` is on the clock of ``add``; any thread may ask.
        """
        assemblers = list(self._assemblers.values())
        waiting = [each.open_since for each in assemblers if each.open_since is not None]
        closed = assemblers[-1].last_closed if assemblers else -1
        return closed, max(0.0, now - min(waiting)) if waiting else 0.0

    def statistics(self) -> dict[str, int]:
        """Return exact counts since the start, and what is open."""
        assemblers = list(self._assemblers.values())  # asked for on another thread
        return {
            **dict(self._counts),
            "open_steps": sum(each.open_steps for each in assemblers),
            "late_parts": sum(each.late_parts for each in assemblers),
            "attempts": len(assemblers),
            "unprojected": self._projector.failures,
        }
