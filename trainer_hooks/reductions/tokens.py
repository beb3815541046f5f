"""Token counts of a micro-batch (docs/metrics.md, ``tokens/``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidestep.protocol.messages import Role, Tokens
from sidestep.trainer_hooks.reductions.alignment import AlignedBatch

OUTSIDE_VOCABULARY = -1
"""The id under which ids below 0 or beyond the vocabulary are counted together."""


def reduce_tokens(batch: AlignedBatch, vocabulary_size: int) -> dict[str, Tensor]:
    """Count the ids of a micro-batch over the whole vocabulary.

    Args:
        batch: with ``input_ids``.
        vocabulary_size: ids from 0 up to it have a count each; all others share one, and never index out of bounds.

    Returns:
        ``token_counts``, int32 [3, vocabulary_size + 1]: ids at real positions, targets at labelled positions, targets
        before their answer's first EOS; the last column is that of ids outside the vocabulary. ``token_totals``,
        int64 [3]: answers, padding positions (-1 where unknown), positions.

    Raises:
        ValueError: the batch has no ``input_ids``.
    """
    if batch.input_ids is None:
        raise ValueError("token counts need input_ids that go with the labels")
    return _counts_on_host(batch, vocabulary_size) if batch.on_host else _counts_on_device(batch, vocabulary_size)


def _counts_on_device(batch: AlignedBatch, vocabulary_size: int) -> dict[str, Tensor]:
    ids, runs = batch.input_ids, batch.runs
    if ids is None:
        raise ValueError("token counts need input_ids that go with the labels")
    real = torch.ones_like(batch.labelled) if batch.real is None else batch.real
    weights = torch.stack((real, batch.labelled, runs.content)).flatten(1).to(torch.int32)
    slots = torch.stack((ids, batch.targets, batch.targets)).flatten(1).to(torch.int64)
    slots = torch.where((slots >= 0) & (slots < vocabulary_size), slots, vocabulary_size)
    counts = torch.zeros((3, vocabulary_size + 1), dtype=torch.int32, device=ids.device)
    padding = real.logical_not().sum() if batch.padding_known else torch.full((), -1, device=ids.device)
    positions = torch.full((), ids.numel(), device=ids.device)
    return {
        "token_counts": counts.scatter_add_(1, slots, weights),
        "token_totals": torch.stack((runs.starts.sum(), padding, positions)),
    }


def _counts_on_host(batch: AlignedBatch, vocabulary_size: int) -> dict[str, Tensor]:
    if batch.input_ids is None:
        raise ValueError("token counts need input_ids that go with the labels")
    ids: NDArray[Any] = batch.input_ids.numpy()
    real: NDArray[Any] = ids.reshape(-1) if batch.real is None else ids[batch.real.numpy()]
    runs = batch.runs_on_host
    targets = batch.targets.numpy().reshape(-1)[runs.rows]
    content = targets[runs.roles & np.uint8(Role.CONTENT) != 0]
    counts = np.stack([_count(values, vocabulary_size) for values in (real, targets, content)])
    padding = ids.size - real.size if batch.padding_known else -1
    totals = np.array([runs.first.size, padding, ids.size], np.int64)
    return {"token_counts": torch.from_numpy(counts), "token_totals": torch.from_numpy(totals)}


def _count(ids: NDArray[Any], vocabulary_size: int) -> NDArray[np.int32]:
    inside = (ids >= 0) & (ids < vocabulary_size)
    slots = ids if inside.all() else np.where(inside, ids, vocabulary_size)
    return np.bincount(slots, minlength=vocabulary_size + 1).astype(np.int32)


def tokens_message(*, step: int, microstep: int, arrays: Mapping[str, NDArray[Any]]) -> Tokens:
    """Compact what ``reduce_tokens`` returned, once it is on the host."""
    real, labelled, content = arrays["token_counts"]
    answers, padding, positions = (int(total) for total in arrays["token_totals"])
    real_ids, real_counts = _compact(real, real)
    labelled_ids, labelled_counts = _compact(labelled, labelled)
    _, content_counts = _compact(labelled, content)
    return Tokens(
        step=step,
        microstep=microstep,
        positions=positions,
        padding=padding,
        answers=answers,
        real_ids=real_ids,
        real_counts=real_counts,
        labelled_ids=labelled_ids,
        labelled_counts=labelled_counts,
        content_counts=content_counts,
    )


def _compact(where: NDArray[Any], counts: NDArray[Any]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the ids that ``where`` counts, ascending, and their ``counts``; the outsiders come first, as -1."""
    where, counts = np.roll(where, 1), np.roll(counts, 1)
    ids = np.flatnonzero(where)
    return (ids + OUTSIDE_VOCABULARY).astype(np.int32), counts[ids].astype(np.int64)
