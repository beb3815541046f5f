"""All metrics of one step: which families are due, and what each of them measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.messages import Answers, Generation, Kind, Losses, Tokens
from sidestep.worker.metrics.answer_counts import AnswerCounts
from sidestep.worker.metrics.answers import count_answers, measure_answers
from sidestep.worker.metrics.generation import measure_generation
from sidestep.worker.metrics.gradients import measure_gradients
from sidestep.worker.metrics.learning_rate import measure_learning_rates
from sidestep.worker.metrics.loss import measure_loss
from sidestep.worker.metrics.measurement import Measurement, messages_of, notice_once
from sidestep.worker.metrics.sequences import GeneratedSamples, read_generated
from sidestep.worker.metrics.tokens import measure_tokens
from sidestep.worker.records import AssembledStep, Part, RunContext
from sidestep.worker.settings import RunSettings
from sidestep.worker.text.tables import samples_table


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """What was measured at a step."""

    found: Measurement
    generated: GeneratedSamples | None = None


def measure_step(step: AssembledStep, context: RunContext, settings: RunSettings, counts: AnswerCounts) -> StepMetrics:
    """Measure every family that has parts at this step, most often none; ``counts`` takes the step's answers in."""
    parts = step.parts
    found = Measurement()
    if tokens := parts.get(Kind.TOKENS):
        found.add(measure_tokens(tokens, context))
    if losses := parts.get(Kind.LOSSES):
        found.add(measure_loss(losses, context, high_loss_sigmas=settings.high_loss_sigmas))
    gradients = parts.get(Kind.GRADIENTS)
    if gradients and all(end.applied for end in step.ends.values()):
        found.add(measure_gradients(gradients, context, detail=settings.gradient_detail))
    if rates := parts.get(Kind.LEARNING_RATES):
        found.add(measure_learning_rates(rates, context))
    _measure_answers(step, context, settings, counts, found)
    generated = _measure_generated(step, context, settings, found)
    _tell_malformed(step, context, found)
    return StepMetrics(found=found, generated=generated)


def _measure_answers(
    step: AssembledStep, context: RunContext, settings: RunSettings, counts: AnswerCounts, found: Measurement
) -> None:
    parts = step.parts.get(Kind.ANSWERS, ())
    before = counts.batches_without_labels
    found.malformed_parts += count_answers((*step.late_parts, *parts), context, step.attempt, counts).malformed_parts
    if counts.batches_without_labels > before:
        text = (
            f"step {step.step} had a batch without one labelled position: there is nothing to learn in it and its loss "
            "is no number (look at the chat template, the truncation and ignore_index); such batches are counted in "
            "data/batches_without_labels"
        )
        found.put("data/batches_without_labels", counts.batches_without_labels)
        found.notices.append(notice_once("batches_without_labels", text, step.step))
    if settings.is_due(settings.answer_length_interval, step.step) and step.reason != "tail":
        epochs = [m.epoch for _, m in messages_of(parts, Answers)] or [end.epoch for end in step.ends.values()]
        if epochs:
            found.add(measure_answers(counts, max(epochs)))


def _measure_generated(
    step: AssembledStep, context: RunContext, settings: RunSettings, found: Measurement
) -> GeneratedSamples | None:
    """``generation/`` is shown when it is due, and when the trainer was asked for samples between two dues."""
    generated = read_generated(step.parts.get(Kind.GENERATION, ()), context.eos_id)
    if generated is None:
        return None
    is_for_collapse_only = settings.is_due(settings.collapse_detection_interval, step.step) and not settings.is_due(
        settings.generation_eval_interval, step.step
    )
    measured = measure_generation(generated, step.step)
    if is_for_collapse_only:
        found.notices.extend(measured.notices)
        found.malformed_parts += measured.malformed_parts
        return generated
    found.add(measured)
    table = samples_table(generated, context, step.step)
    if table is not None:
        found.tables.append(table)
    return generated


def _tell_malformed(step: AssembledStep, context: RunContext, found: Measurement) -> None:
    if found.malformed_parts:
        text = (
            f"step {step.step}: {found.malformed_parts} messages contradict themselves or the run's tables and are "
            "left out (counted in sidecar/malformed_parts); trainer and worker may be of different versions"
        )
        found.put("sidecar/malformed_parts", found.malformed_parts)
        found.notices.append(notice_once("malformed_parts", text, step.step))
    unknown = _count_unknown_ids(step, context.vocabulary_size or 0)
    if unknown:
        text = (
            f"step {step.step}: ids beyond the tokenizer's {context.vocabulary_size} (counted in sidecar/unknown_ids)"
        )
        found.put("sidecar/unknown_ids", unknown)
        found.notices.append(notice_once("unknown_ids", text, step.step))


def _count_unknown_ids(step: AssembledStep, vocabulary_size: int) -> int:
    """Ids outside the vocabulary among inputs, targets and generations; 0 where the vocabulary is not known."""
    if not vocabulary_size:
        return 0
    received: Sequence[Part] = [
        p for kind in (Kind.TOKENS, Kind.LOSSES, Kind.GENERATION) for p in step.parts.get(kind, ())
    ]
    arrays: list[NDArray[np.int32]] = [message.real_ids for _, message in messages_of(received, Tokens)]
    arrays += [message.target_ids for _, message in messages_of(received, Losses)]
    arrays += [message.ids for _, message in messages_of(received, Generation)]
    return sum(int(((ids < 0) | (ids >= vocabulary_size)).sum()) for ids in arrays)
