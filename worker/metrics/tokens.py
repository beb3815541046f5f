"""``tokens/``: counts of one step, merged over ranks and micro-batches (docs/metrics.md, ``tokens/``)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.merge import merge_counts
from sidestep.protocol.messages import Tokens
from sidestep.worker.metrics.measurement import (
    Measurement,
    distinct_batches,
    messages_of,
    most_common,
    notice_once,
    same_length,
)
from sidestep.worker.records import Part, RunContext


def measure_tokens(parts: Sequence[Part], context: RunContext) -> Measurement:
    """Return ``tokens/*`` of one step from the ``Tokens`` of all its ranks and micro-batches."""
    found = Measurement()
    received = [message for _, message in messages_of(distinct_batches(parts, context), Tokens)]
    batches = [message for message in received if _is_sound(message)]
    found.malformed_parts = len(received) - len(batches)
    if batches:
        _measure_positions(batches, context, found)
        _measure_answers(batches, context, found)
    return found


def _is_sound(batch: Tokens) -> bool:
    return (
        same_length(batch.real_ids, batch.real_counts)
        and same_length(batch.labelled_ids, batch.labelled_counts, batch.content_counts)
        and min(batch.positions, batch.answers, batch.padding + 1) >= 0
        and batch.padding <= batch.positions
        and bool((batch.real_counts >= 0).all())
        and bool((batch.content_counts >= 0).all())
        and bool((batch.content_counts <= batch.labelled_counts).all())
    )


def _measure_positions(batches: Sequence[Tokens], context: RunContext, found: Measurement) -> None:
    positions = sum(batch.positions for batch in batches)
    ids, counts = merge_counts([(batch.real_ids, batch.real_counts) for batch in batches])
    present = ids[counts > 0]
    found.put("tokens/total_tokens", positions)
    found.put("tokens/unique_tokens", len(present))
    found.put_ratio("tokens/unique_token_ratio", len(present), context.vocabulary_size or 0)
    if context.image_token_id is not None:
        real_positions = int(counts.sum())
        found.put_ratio("tokens/image_token_ratio", _count_of(context.image_token_id, ids, counts), real_positions)
    if any(batch.padding < 0 for batch in batches):
        text = (
            "padding and EOS share an id and the batches have no attention mask: tokens/eos_count and "
            "tokens/pad_ratio cannot be told and are left out"
        )
        found.notices.append(notice_once("eos_is_padding", text, batches[0].step))
        return
    found.put_ratio("tokens/pad_ratio", sum(batch.padding for batch in batches), positions)
    if context.eos_id is not None:
        found.put("tokens/eos_count", _count_of(context.eos_id, ids, counts))


def _measure_answers(batches: Sequence[Tokens], context: RunContext, found: Measurement) -> None:
    answers = sum(batch.answers for batch in batches)
    ids, labelled = merge_counts([(batch.labelled_ids, batch.labelled_counts) for batch in batches])
    _, content = merge_counts([(batch.labelled_ids, batch.content_counts) for batch in batches])
    num_content = int(content.sum())
    found.put("tokens/answers", answers)
    found.put("tokens/answer_tokens", int(labelled.sum()))
    found.put("tokens/unique_answer_tokens", int((labelled > 0).sum()))
    if context.eos_id is not None:
        found.put("tokens/answer_eos_count", _count_of(context.eos_id, ids, labelled))
    found.put_ratio("tokens/answer_length", num_content, answers)
    common = most_common(ids.tolist(), content.tolist())
    if common is not None:
        found.put_ratio("tokens/answer_diversity_ratio", common[1], num_content)
        found.values["tokens/answer_most_common_token_text"] = context.text.token(common[0])


def _count_of(token_id: int, ids: NDArray[np.int64], counts: NDArray[np.int64]) -> int:
    return int(counts[ids == token_id].sum())
