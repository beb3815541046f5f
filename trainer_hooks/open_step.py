"""One optimizer step while it goes on: what was reduced so far, and how it becomes messages at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray

from sidestep.protocol.limits import MAX_EXACT_LOSS_TOKENS_PER_STEP
from sidestep.protocol.messages import Kind, Message, Scalars
from sidestep.trainer_hooks.gradient_scale import has_overflowed, with_flag
from sidestep.trainer_hooks.late_answers import LabelReading, LateAnswers
from sidestep.trainer_hooks.reductions.gradients import gradients_message
from sidestep.trainer_hooks.reductions.learning_rate import learning_rates_message
from sidestep.trainer_hooks.reductions.loss_message import losses_message
from sidestep.trainer_hooks.reductions.tokens import tokens_message
from sidestep.trainer_hooks.signals.microbatch import MicroSignals
from sidestep.trainer_hooks.staging import Staging, arrays_below
from sidestep.trainer_hooks.step_counts import StepCounts

Tensors = Mapping[str, torch.Tensor]
Arrays = Mapping[str, NDArray[Any]]


@dataclass(slots=True, eq=False)
class MicroBatch:
    """What was reduced of one forward; none of its tensors is the trainer's."""

    captured: bool
    """Seen by the forward hook, not passed by the trainer."""
    epoch: int
    """The one that it was seen in; a step has several where an epoch left micro-batches over."""
    answers: torch.Tensor | None = None
    labels: tuple[LabelReading, NDArray[Any]] | None = None
    """In place of ``answers``: a copy of labels that are still to be counted."""
    tokens: Tensors = field(default_factory=dict)
    losses: Tensors = field(default_factory=dict)
    reason: str = ""
    """Why there are no per-token losses, where there are none."""
    signals: MicroSignals | None = None
    """What the detectors get of it."""

    @property
    def has_labels(self) -> bool:
        """Whether there were labels to count."""
        return self.answers is not None or self.labels is not None


@dataclass(slots=True, eq=False)
class StepGradients:
    """What was reduced of a step's gradients."""

    tensors: Tensors
    without_gradient: tuple[int, ...]
    clipped: bool
    partial: tuple[int, ...] = ()
    """Rows whose gradient no rank has."""


@dataclass(slots=True, eq=False)
class LoggedValues:
    """One call of ``log``: plain values, and device scalars that are on their way."""

    values: dict[str, Any]
    tensors: Tensors
    step_key: str
    key_step: int | None
    reduce: str = ""


@dataclass(slots=True, eq=False)
class OpenStep:
    """The step that has not ended."""

    expected: int
    """The number that it will probably carry."""
    due: frozenset[str]
    """Families that are due at that number."""
    microbatches: list[MicroBatch] = field(default_factory=list)
    gradients: StepGradients | None = None
    rates: Tensors | None = None
    logged: list[LoggedValues] = field(default_factory=list)
    stepped: bool = False
    """The optimizer's own step has ended."""
    overflow: torch.Tensor | None = None
    """Not 0 where the optimizer's own kernel leaves out the step [1]; it may still be on a device."""


@dataclass(slots=True, kw_only=True)
class StepFacts:
    """What only the end of a step tells."""

    step: int
    applied: bool
    due: frozenset[str]
    world_size: int
    staging_bytes: int


def stage_step(opened: OpenStep, facts: StepFacts, staging: Staging) -> StepCounts:
    """Launch the copies of all that a step has gathered; the messages follow on the publisher's thread."""
    counts = StepCounts()
    _stage_small(opened, facts, staging, counts)
    if not facts.due:
        return counts
    for numbered in _groups(opened.microbatches, facts):
        _stage_batches(numbered, len(opened.microbatches), facts, staging, counts)
    gradients = opened.gradients
    if gradients is not None and facts.applied and "gradients" in facts.due:
        step = facts.step

        def finish(arrays: Arrays) -> Sequence[Message]:
            if has_overflowed(arrays):
                return []  # counted as given up; the step was none
            made = gradients_message(
                step=step,
                arrays=arrays,
                without_gradient=gradients.without_gradient,
                clipped=gradients.clipped,
                partial=gradients.partial,
            )
            return [made]

        kinds, tensors = (Kind.GRADIENTS,), with_flag(gradients.tensors, opened.overflow)
        counts.add(kinds, staged=staging.stage(tensors, finish, kinds=kinds, step=step, owned=True))
    return counts


def _stage_small(opened: OpenStep, facts: StepFacts, staging: Staging, counts: StepCounts) -> None:
    """Stage what comes at every step: answers; with rates and what the trainer logged, where there are some."""
    late = LateAnswers(facts.step)
    for batch in opened.microbatches:
        late.add(batch.epoch, batch.answers, batch.labels)
    rates = opened.rates if facts.applied and "lr" in facts.due else None
    if late.num_messages and not late.counted and not rates and not opened.logged:  # a step with nothing due
        _stage_labels(late, facts.step, staging, counts)
        return
    kinds = [Kind.ANSWERS] * late.num_messages
    tensors = {f"answers/{name}": counted for name, counted in late.counted.items()}
    if rates is not None:
        kinds.append(Kind.LEARNING_RATES)
        tensors |= {f"rates/{name}": tensor for name, tensor in with_flag(rates, opened.overflow).items()}
    logged = list(opened.logged)
    for place, entry in enumerate(logged):
        kinds.append(Kind.SCALARS)
        tensors |= {f"logged{place}/{name}": tensor for name, tensor in entry.tensors.items()}
    if not kinds:
        return
    plain = [(entry.values, entry.step_key, entry.key_step, entry.reduce) for entry in logged]
    step, with_rates = facts.step, rates is not None

    def finish(arrays: Arrays) -> Sequence[Message]:
        made: list[Message] = [*late(arrays_below("answers/", arrays))]
        if with_rates and not has_overflowed(rates_arrays := arrays_below("rates/", arrays)):
            made.append(learning_rates_message(step=step, arrays=rates_arrays))
        for place, (values, step_key, key_step, reduce) in enumerate(plain):
            arrived = {name: array.item() for name, array in arrays_below(f"logged{place}/", arrays).items()}
            at = step if key_step is None else key_step
            told = {**values, **arrived}
            made.append(Scalars(step=step, values=told, step_key=step_key, key_step=at, reduce=reduce))
        return made

    staged = staging.stage(tensors, finish, kinds=kinds, step=step, owned=True, held_bytes=late.size_bytes)
    counts.add(kinds, staged=staged)


def _stage_labels(late: LateAnswers, step: int, staging: Staging, counts: StepCounts) -> None:
    """The shortest way: at most steps this is all that there is."""

    def finish(arrays: Arrays) -> Sequence[Message]:
        return late(arrays)

    kinds = (Kind.ANSWERS,) * late.num_messages
    counts.add(kinds, staged=staging.stage({}, finish, kinds=kinds, step=step, held_bytes=late.size_bytes))


def _stage_batches(
    numbered: Sequence[tuple[int, MicroBatch]],
    num_microbatches: int,
    facts: StepFacts,
    staging: Staging,
    counts: StepCounts,
) -> None:
    """Stage token counts and losses of some micro-batches with one copy."""
    tensors: dict[str, torch.Tensor] = {}
    plan: list[tuple[int, Kind, str]] = []
    for number, batch in numbered:
        for kind, parts in _due_parts(batch, facts):
            plan.append((number, kind, batch.reason))
            tensors |= {f"{number}/{kind.name}/{name}": tensor for name, tensor in parts.items()}
    if not plan:
        return
    step = facts.step
    exact_rows_limit = MAX_EXACT_LOSS_TOKENS_PER_STEP // max(1, num_microbatches * facts.world_size)

    def finish(arrays: Arrays) -> Sequence[Message]:
        made: list[Message] = []
        for number, kind, reason in plan:
            parts = arrays_below(f"{number}/{kind.name}/", arrays)
            if kind is Kind.TOKENS:
                made.append(tokens_message(step=step, microstep=number, arrays=parts))
            else:
                made.append(
                    losses_message(
                        step=step, microstep=number, arrays=parts, exact_rows_limit=exact_rows_limit, reason=reason
                    )
                )
        return made

    kinds = [kind for _, kind, _ in plan]
    counts.add(kinds, staged=staging.stage(tensors, finish, kinds=kinds, step=step, owned=True))


def _due_parts(batch: MicroBatch, facts: StepFacts) -> Iterator[tuple[Kind, Tensors]]:
    if batch.tokens and "tokens" in facts.due:
        yield Kind.TOKENS, batch.tokens
    if batch.losses and "loss" in facts.due:
        yield Kind.LOSSES, batch.losses


def _groups(batches: Sequence[MicroBatch], facts: StepFacts) -> Iterator[list[tuple[int, MicroBatch]]]:
    """Cut the micro-batches into groups of at most a quarter of what staging may hold: one copy each."""
    group: list[tuple[int, MicroBatch]] = []
    size_bytes = 0
    for numbered in enumerate(batches):
        needed = sum(t.nbytes for _, parts in _due_parts(numbered[1], facts) for t in parts.values())
        if group and size_bytes + needed > facts.staging_bytes // 4:
            yield group
            group, size_bytes = [], 0
        group.append(numbered)
        size_bytes += needed
    if group:
        yield group
