"""``data/``: the lengths of all answers of an epoch so far (docs/metrics.md, ``data/``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sidestep.protocol.messages import Answers
from sidestep.worker.metrics.answer_counts import AnswerCounts
from sidestep.worker.metrics.measurement import (
    Measurement,
    Value,
    copies,
    length_histogram,
    messages_of,
    same_length,
)
from sidestep.worker.records import Part, RunContext

MAX_COUNT = 1 << 40
"""More answers than a step can have: sums of such counts stay exact for ever."""


def count_answers(parts: Sequence[Part], context: RunContext, attempt: int, counts: AnswerCounts) -> Measurement:
    """Take the ``Answers`` of a step, and late ones of any step of ``attempt``, into ``counts``.

    The measurement holds no values; its ``malformed_parts`` are those left out.
    """
    found = Measurement()
    sent = messages_of(parts, Answers)
    left_out = copies([rank for rank, _ in sent], context) if sent else set()
    merged: dict[tuple[int, int], dict[int, int]] = {}
    for rank, message in sent:
        if rank in left_out:
            continue
        lengths, numbers = message.lengths.tolist(), message.counts.tolist()
        if not _is_sound(message, lengths, numbers):
            found.malformed_parts += 1
            continue
        total = merged.setdefault((message.step, message.epoch), {})
        for length, number in zip(lengths, numbers, strict=True):
            total[length] = total.get(length, 0) + number
        counts.batches_without_labels += message.batches_without_labels
    for (step, epoch), total in merged.items():
        counts.add(attempt=attempt, step=step, epoch=epoch, lengths=total)
    return found


def _is_sound(message: Answers, lengths: list[int], counts: list[int]) -> bool:
    return (
        same_length(message.lengths, message.counts)
        and min(lengths, default=0) >= 0
        and min(counts, default=0) >= 0
        and sum(counts) <= MAX_COUNT
        and len(set(lengths)) == len(lengths)
        and 0 <= message.batches_without_labels <= MAX_COUNT
    )


def measure_answers(counts: AnswerCounts, epoch: int) -> Measurement:
    """Return ``data/*`` of the epoch so far, with the suffix and, against the axis ``epoch``, without it.

    An epoch that ended since the last row gets its closing values too, with the suffix alone: its last answers fell
    after its last due step.
    """
    found = Measurement()
    found.put("data/batches_without_labels", counts.batches_without_labels)
    for ended in counts.take_ended(epoch):
        found.values.update(_describe(counts.lengths(ended), f"_epoch_{ended}"))
    values = _describe(counts.lengths(epoch), "")
    if values:
        found.values.update({f"{key}_epoch_{epoch}": value for key, value in values.items()})
        found.values.update(values)
        found.put("epoch", epoch)
    return found


def _describe(lengths: Mapping[int, int], suffix: str) -> dict[str, Value]:
    present = {length: count for length, count in lengths.items() if count > 0}
    total = sum(present.values())
    if not total:
        return {}
    mean = sum(length * count for length, count in present.items()) / total
    values: dict[str, Value] = {
        f"data/answer_length_mean{suffix}": mean,
        f"data/answer_length_min{suffix}": min(present),
        f"data/answer_length_max{suffix}": max(present),
        f"data/single_token_answers_ratio{suffix}": present.get(1, 0) / total,
        f"data/answer_length_histogram{suffix}": length_histogram(present),
    }
    if total > 1:
        squares = math.fsum(count * (length - mean) ** 2 for length, count in present.items())
        values[f"data/answer_length_std{suffix}"] = math.sqrt(squares / (total - 1))
    return values
