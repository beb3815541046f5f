"""What the index records beside messages: incarnations, and every decision that a replay must obey."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from sidestep.worker.intake.schema import unpack_pairs
from sidestep.worker.outbox import OutboxEntry, entry
from sidestep.worker.records import StepClosing


@dataclass(frozen=True, slots=True, kw_only=True)
class Incarnation:
    """One start of a trainer, all its ranks together."""

    incarnation: str
    run_id: str
    attempt: int
    """0, 1, 2, ... in the order of the first Hello of each of the run's incarnations."""
    first_seen: float
    world_size: int
    start_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """The recorded end of an attempt."""

    run_id: str
    attempt: int
    exit_code: int
    reason: str
    tail_unknown: bool
    """True where the trainer went without a Goodbye: what it had not sent is not known."""
    unix_time: float
    newest_step: int
    closed_number: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextRecord:
    """Which ranks' tables a projection was made with, from which closing on."""

    run_id: str
    attempt: int
    revision: int
    incarnation: str
    ranks: tuple[int, ...]
    """Ranks whose Hello was there."""
    missing: tuple[str, ...] = ()
    """Digests of tables that were not."""
    closed_number: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """Tables whose upload a killed sink may have left undone: their rows are appended once more."""

    run_id: str
    attempt: int
    row_numbers: tuple[int, ...]
    closed_number: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewind:
    """A new attempt begins at a step that an earlier one had passed: what was known before that step is known again."""

    run_id: str
    attempt: int
    step: int
    """The new attempt's first step."""
    source_number: int
    """The closing after which the state is taken up again: the newest of the largest step before; -1: nothing was."""
    snapshot_number: int
    """The closing whose state was at hand, at or before the source; -1: none."""
    is_exact: bool
    """Whether the steps between snapshot and source are worked out again; else they are missing, which is said."""
    closed_number: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A file of the journal broke, and what that means for the run; said once in it."""

    run_id: str
    attempt: int
    file: str
    """The name that the broken file was given."""
    text: str
    closed_number: int = -1

    def entries(self) -> tuple[OutboxEntry, ...]:
        """Return what the run says of it."""
        return (entry("notice", {"text": self.text, "level": "critical", "code": "journal_damaged"}),)


Decision: TypeAlias = StepClosing | Ending | ContextRecord | Repeat | Rewind | Loss
"""What is recorded in the order it was decided, and obeyed by a replay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Closure:
    """One decision with all that it makes the run's outbox say."""

    closing: Decision
    entries: tuple[OutboxEntry, ...] = ()
    pending_arrival: int = 0
    """Messages that arrived before it are all accounted for."""
    last_arrival: int = -1
    """The latest message that this closing used."""
    pieces: Mapping[str, bytes] = field(default_factory=dict)
    """Pieces of the projection's state as they are after it, those that changed since they were stored last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A projection's state as a journal of schema 1 holds it: one body, after the newest closing."""

    closed_number: int
    attempt: int
    step: int
    body: bytes


def step_closing_of_row(row: tuple[Any, ...]) -> StepClosing:
    """Return a row of ``step_closed``."""
    run_id, attempt, step, reason, incarnation, parts, late, expected, number, *_ = row
    return StepClosing(
        run_id=run_id, attempt=attempt, step=step, reason=reason, incarnation=incarnation, parts=unpack_pairs(parts),
        late_parts=unpack_pairs(late), ranks_expected=expected, closed_number=number,
    )  # fmt: skip


def ending_of_row(row: tuple[Any, ...]) -> Ending:
    """Return a row of ``ending``."""
    run_id, attempt, number, exit_code, reason, tail_unknown, unix_time, newest_step, _ = row
    return Ending(
        run_id=run_id, attempt=attempt, closed_number=number, exit_code=exit_code, reason=reason,
        tail_unknown=bool(tail_unknown), unix_time=unix_time, newest_step=newest_step,
    )  # fmt: skip


def context_of_row(row: tuple[Any, ...]) -> ContextRecord:
    """Return a row of ``context``."""
    run_id, attempt, revision, number, incarnation, ranks, missing = row
    return ContextRecord(
        run_id=run_id, attempt=attempt, revision=revision, closed_number=number, incarnation=incarnation,
        ranks=tuple(rank for rank, _ in unpack_pairs(ranks)), missing=tuple(str(missing).split()),
    )  # fmt: skip


def repeat_of_row(row: tuple[Any, ...]) -> Repeat:
    """Return a row of ``repeat``."""
    run_id, attempt, number, rows = row
    numbers = tuple(row_number for row_number, _ in unpack_pairs(rows))
    return Repeat(run_id=run_id, attempt=attempt, closed_number=number, row_numbers=numbers)


def rewind_of_row(row: tuple[Any, ...]) -> Rewind:
    """Return a row of ``rewind``."""
    run_id, attempt, number, step, source_number, snapshot_number, is_exact = row
    return Rewind(
        run_id=run_id, attempt=attempt, closed_number=number, step=step, source_number=source_number,
        snapshot_number=snapshot_number, is_exact=bool(is_exact),
    )  # fmt: skip


def loss_of_row(row: tuple[Any, ...]) -> Loss:
    """Return a row of ``loss``."""
    run_id, attempt, number, file, text = row
    return Loss(run_id=run_id, attempt=attempt, closed_number=number, file=file, text=text)
