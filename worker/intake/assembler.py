"""Decides when a step is whole (docs/delivery.md, section 2). Time is passed in; nothing is read or written here.

A step closes when every rank has ended it and all that they announced is here; or its incarnation ended; or the
deadline passed. Steps close in order. A stream whose sequence numbers have a hole is waited for: what fills it may
belong to an earlier step (a worker that was killed gets the newer messages first and the lost ones after).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from sidestep.protocol.frames import UnknownMessage
from sidestep.protocol.messages import STEP_KINDS, Goodbye, Message, Notice, StepEnd
from sidestep.protocol.ranges import RangeSet
from sidestep.worker.intake.assembly import Journaled, Key, assemble, step_of
from sidestep.worker.intake.decisions import Incarnation
from sidestep.worker.records import AssembledStep, ClosingReason, StepClosing

_NAME_OF_KIND = {kind: kind.name.lower() for kind in STEP_KINDS}
_KIND_NAMES = frozenset(_NAME_OF_KIND.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedStep:
    """A decision with the step that it makes, and what it says of the journal."""

    closing: StepClosing
    step: AssembledStep
    pending_arrival: int
    """Messages of the run that arrived before it are accounted for; 0 where a later closing of the batch says it."""
    last_arrival: int
    """The newest message that was used."""


@dataclass(slots=True)
class _OpenStep:
    first_part_at: float
    messages: dict[Key, Journaled] = field(default_factory=dict)
    ends: dict[int, Journaled] = field(default_factory=dict)
    counts: dict[tuple[int, str], int] = field(default_factory=dict)
    """(rank, kind's name) to messages that are here."""
    num_complete: int = 0
    """Of the ranks 0, 1, 2, ... so many, in a row, are known to be complete."""


class Assembler:
    """Joins the ranks' parts of the steps of one incarnation of a run."""

    def __init__(self, incarnation: Incarnation, *, deadline_seconds: float, last_closed: int = -1) -> None:
        """Start after step ``last_closed``, -1 where none has closed."""
        self.incarnation = incarnation
        self.last_closed = last_closed
        self._any_closed = last_closed >= 0
        self._deadline_seconds = deadline_seconds
        self._open: dict[int, _OpenStep] = {}
        self._late: dict[Key, Journaled] = {}
        self._notices: dict[Key, Journaled] = {}
        self._seen: dict[int, RangeSet] = {}
        self._floors: dict[int, int] = {}
        self.goodbyes: dict[int, Journaled] = {}
        self._first_goodbye_at: float | None = None
        self._told: dict[int, tuple[int, ...]] = {}
        self._used_goodbyes: set[Key] = set()
        self._is_shut = False
        self.late_parts = 0
        """Parts that came after their step had closed."""

    # ------------------------------------------------------------------------------------------------ taking in

    def restore_stream(self, rank: int, held: RangeSet, floor: int) -> None:
        """Continue a stream after a restart: what the journal holds, and the newest ``StepEnd`` that was used."""
        self._seen[rank] = held
        self._floors[rank] = floor

    def shut(self) -> None:
        """Take all that still comes for late: the incarnation has ended and another one has followed it."""
        self._is_shut = True

    def pass_over(self, rank: int, sequence: int) -> None:
        """Count a sequence number as arrived that brings nothing: a refused message, or one of an unknown kind."""
        seen = self._seen.get(rank)
        if seen is None:
            seen = self._seen[rank] = RangeSet()
        seen.add(sequence)

    def add(self, each: Journaled, now: float) -> None:
        """Take one journaled message in; ``now`` is when, in seconds of the clock that ``close_ready`` is asked by."""
        key = rank, sequence = each.key
        self.pass_over(rank, sequence)
        message = each.message
        if isinstance(message, Goodbye):
            self.goodbyes[rank] = each
            self._first_goodbye_at = now if self._first_goodbye_at is None else self._first_goodbye_at
        elif isinstance(message, Notice):
            self._notices[key] = each
        elif not isinstance(message, UnknownMessage):
            self._add_part(key, each, message, now)

    def _add_part(self, key: Key, each: Journaled, message: Message, now: float) -> None:
        step = step_of(message)
        if self._is_shut or (self._any_closed and step <= self.last_closed):
            if not isinstance(message, StepEnd):
                self._late[key] = each
                self.late_parts += 1
            return
        held = self._open.get(step)
        if held is None:
            held = self._open[step] = _OpenStep(first_part_at=now)
        held.messages[key] = each
        rank, sequence = key
        if isinstance(message, StepEnd):
            before = held.ends.get(rank)
            if before is None or before.envelope.sequence < sequence:
                held.ends[rank] = each
                held.num_complete = min(held.num_complete, rank)
        else:
            counted = rank, _NAME_OF_KIND.get(message.kind, "")
            held.counts[counted] = held.counts.get(counted, 0) + 1

    # ------------------------------------------------------------------------------------------------ deciding

    @property
    def open_steps(self) -> int:
        """Steps of which something is here and that have not closed."""
        return len(self._open)

    @property
    def open_since(self) -> float | None:
        """When the first message of the oldest open step came, on the clock of ``add``; None where no step is open."""
        return min((held.first_part_at for held in list(self._open.values())), default=None)

    @property
    def newest_step(self) -> int:
        """The newest step of which anything has come, -1 for none."""
        return max([self.last_closed, *self._open])

    def has_ended(self, now: float) -> bool:
        """Return whether every rank has said goodbye, and all that they had sent is here (or was waited for)."""
        ranks = range(self.incarnation.world_size)
        if not all(rank in self.goodbyes for rank in ranks):
            return False
        if all(self._is_whole(rank, self.goodbyes[rank].envelope.sequence) for rank in ranks):
            return True
        return now - (self._first_goodbye_at or now) >= self._deadline_seconds

    def oldest_waiting(self) -> int | None:
        """Return the arrival number of the oldest message that no closing has counted in, None for none."""
        open_messages = (each for held in self._open.values() for each in held.messages.values())
        goodbyes = () if self._is_shut else self.goodbyes.values()
        waiting = (*open_messages, *self._late.values(), *self._notices.values(), *goodbyes)
        return min((each.arrival for each in waiting), default=None)

    def has_leftovers(self) -> bool:
        """Return whether something waits for a closing to be counted in."""
        return bool(self._open or self._has_tail())

    def _has_tail(self) -> bool:
        return bool(self._late or self._notices or self._goodbyes_with_news())

    def _goodbyes_with_news(self) -> dict[Key, Journaled]:
        """Return the goodbyes not yet counted in, where one tells of losses that no message before it told of."""
        fresh = {each.key: each for each in self.goodbyes.values() if each.key not in self._used_goodbyes}
        has_news = any(
            any(told > known for told, known in zip(_losses(each), self._told.get(rank, (0, 0, 0)), strict=True))
            for (rank, _), each in fresh.items()
        )
        return fresh if has_news else {}

    def close_ready(self, now: float, *, ended: bool = False, limit: int = 256) -> list[ClosedStep]:
        """Close what can be closed, in order, ``limit`` steps at most; with ``ended`` everything can be.

        They are written together: only the last one says what is accounted for.
        """
        closed: list[ClosedStep] = []
        for step in sorted(self._open):
            reason = self._reason(self._open[step], now, ended=ended)
            if reason is None or len(closed) >= limit:
                break
            closed.append(self._close(step, reason))
        if ended and not self._open and self._has_tail() and len(closed) < limit:
            closed.append(self._close(max(0, self.last_closed), "tail"))
        if closed:
            newest = max(each.last_arrival for each in closed)
            closed[-1] = replace(closed[-1], pending_arrival=self._pending_arrival(newest + 1))
        return closed

    def _reason(self, held: _OpenStep, now: float, *, ended: bool) -> ClosingReason | None:
        if self._is_complete(held):
            return "complete"
        if ended:
            return "ended"
        return "deadline" if now - held.first_part_at >= self._deadline_seconds else None

    def _is_whole(self, rank: int, sequence: int) -> bool:
        seen = self._seen.get(rank)
        return seen is not None and seen.covers(self._floors.get(rank, 0) + 1, sequence)

    def _is_complete(self, held: _OpenStep) -> bool:
        """Return whether all ranks are done with a step; a rank that was found so is not asked again."""
        world_size = self.incarnation.world_size
        if len(held.ends) < world_size:
            return False
        for rank in range(held.num_complete, world_size):
            end = held.ends.get(rank)
            if end is None or not isinstance(end.message, StepEnd):
                return False
            for name, announced in end.message.sent.items():
                if held.counts.get((rank, name), 0) < announced and name in _KIND_NAMES:
                    return False
            if not self._is_whole(rank, end.envelope.sequence):
                return False
            held.num_complete = rank + 1
        return True

    def _close(self, step: int, reason: ClosingReason) -> ClosedStep:
        held = _OpenStep(first_part_at=0.0) if reason == "tail" else self._open.pop(step)
        goodbyes = self._goodbyes_with_news() if reason == "tail" else {}
        own = {**held.messages, **self._notices, **goodbyes}
        late, self._late, self._notices = self._late, {}, {}
        closing = StepClosing(
            run_id=self.incarnation.run_id,
            attempt=self.incarnation.attempt,
            step=step,
            reason=reason,
            incarnation=self.incarnation.incarnation,
            parts=tuple(sorted(own)),
            late_parts=tuple(sorted(late)),
            ranks_expected=self.incarnation.world_size,
        )
        used = {**own, **late}
        self._used_goodbyes.update(goodbyes)
        newest: dict[int, Journaled] = {}
        for key in sorted(used):
            newest[key[0]] = used[key]  # what it tells is cumulative
        for rank, each in newest.items():
            losses, known = _losses(each), self._told.get(rank, (0, 0, 0))
            if losses != known:
                self._told[rank] = tuple(map(max, known, losses))
        for rank, end in held.ends.items():
            self._floors[rank] = max(self._floors.get(rank, 0), end.envelope.sequence)
        if reason != "tail":
            self.last_closed, self._any_closed = step, True
        last_arrival = max([each.arrival for each in used.values()], default=-1)
        return ClosedStep(
            closing=closing,
            step=assemble(closing, used),
            pending_arrival=0,
            last_arrival=last_arrival,
        )

    def _pending_arrival(self, otherwise: int) -> int:
        waiting = [each.arrival for held in self._open.values() for each in held.messages.values()]
        waiting += [each.arrival for each in self.goodbyes.values()]
        return min(waiting, default=otherwise)


def _losses(each: Journaled) -> tuple[int, int, int]:
    """Return how many messages its stream had dropped, was refused and had sent again."""
    dropped = refused = 0
    for _, more_dropped, more_refused in each.envelope.accounts.values():
        dropped += more_dropped
        refused += more_refused
    return dropped, refused, each.envelope.resent
