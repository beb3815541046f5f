"""Content lengths of every answer of every step, due or not (docs/metrics.md, ``data/``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidestep.protocol.messages import Answers
from sidestep.trainer_hooks.reductions.alignment import AlignedBatch
from sidestep.trainer_hooks.reductions.runs import content_lengths

_LABELLED, _BATCHES, _BATCHES_WITHOUT_LABELS, _LENGTHS = range(4)


def reduce_answers(batch: AlignedBatch) -> Tensor:
    """Count the answers of a micro-batch by content length.

    Returns:
        int64 [3 + T + 1] on the batch's device: labelled positions, batches (1), batches without labels (0 or 1), then
        the number of answers of content length 0, 1, ... T. Sums of these are the counts of several micro-batches.
    """
    return _count_on_host(batch) if batch.on_host else _count_on_device(batch)


def _count_on_device(batch: AlignedBatch) -> Tensor:
    labelled = batch.labelled.sum()
    head = torch.stack((labelled, torch.ones_like(labelled), (labelled == 0).to(torch.int64)))
    return torch.cat((head, content_lengths(batch.runs)))


def _count_on_host(batch: AlignedBatch) -> Tensor:
    runs = batch.runs_on_host
    counts = np.zeros(_LENGTHS + batch.targets.shape[1] + 1, np.int64)
    counts[_LABELLED] = runs.rows.size
    counts[_BATCHES] = 1
    counts[_BATCHES_WITHOUT_LABELS] = not runs.rows.size
    if runs.rows.size:
        lengths = np.bincount(runs.lengths())
        counts[_LENGTHS : _LENGTHS + lengths.size] = lengths
    return torch.from_numpy(counts)


def answers_message(*, step: int, epoch: int, arrays: Mapping[str, NDArray[Any]]) -> Answers:
    """Compact what ``reduce_answers`` returned for the micro-batches of a step, once it is on the host.

    Args:
        step: the optimizer step.
        epoch: the epoch it belongs to.
        arrays: one per micro-batch, or sums of several of one length; the names do not matter.
    """
    counts = np.zeros(max((array.size for array in arrays.values()), default=_LENGTHS), np.int64)
    for array in arrays.values():
        counts[: array.size] += array
    lengths = np.flatnonzero(counts[_LENGTHS:])
    return Answers(
        step=step,
        epoch=epoch,
        lengths=lengths.astype(np.int32),
        counts=counts[_LENGTHS:][lengths],
        labelled=int(counts[_LABELLED]),
        batches=int(counts[_BATCHES]),
        batches_without_labels=int(counts[_BATCHES_WITHOUT_LABELS]),
    )
