"""Which labelled rows are looked at, and what the model says there: one pass over their logits, a chunk at a time.

On a CUDA device with Triton the kernel reads them where they lie (``kernels/``), with the same results.

Whole answers are chosen, by a hash of where each begins, so that what is said of an answer (its end, its length, its
repetitions) holds for the sample. On the host the answers are listed; on a device the choice has a fixed shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidestep.trainer_hooks.kernels.choice import kernels
from sidestep.trainer_hooks.kernels.row_launch import read_logits
from sidestep.trainer_hooks.reductions.alignment import AlignedBatch
from sidestep.trainer_hooks.reductions.cross_entropy import CHUNK_BYTES, LogitsSource
from sidestep.trainer_hooks.reductions.position_hash import position_hash, position_hash_on_host
from sidestep.trainer_hooks.reductions.runs import HostRuns

_BYTES_PER_LOGIT = 12
"""Of a chunk's working memory: float32 logits, their exponentials, and one product."""
LEAST_LOGIT = -1e30
"""Stands for logits of minus infinity: their product with a probability of 0 is then 0 and not NaN."""


@dataclass(frozen=True, slots=True)
class HostChoice:
    """Chosen rows of a micro-batch whose labels are on the host."""

    index: NDArray[np.int64]
    """Flat indices of the positions, ascending [n]."""
    places: NDArray[np.int64]
    """Place of each within its answer [n]."""
    answers: NDArray[np.int64]
    """Number of each one's answer within the micro-batch [n]."""


def choose_on_host(runs: HostRuns, max_rows: int, seed: int) -> HostChoice:
    """Choose whole answers until ``max_rows`` rows are full; of a single longer answer, its beginning."""
    sizes = runs.stop - runs.first
    if runs.rows.size <= max_rows:
        taken = np.arange(sizes.size)
    else:
        order = np.argsort(position_hash_on_host(runs.rows[runs.first], seed), kind="stable")
        fitting = int(np.searchsorted(np.cumsum(sizes[order]), max_rows, side="right"))
        taken = np.sort(order[: max(1, fitting)])
    kept = np.minimum(sizes[taken], max_rows)
    answers = np.repeat(taken, kept)
    places = np.arange(answers.size) - np.repeat(np.cumsum(kept) - kept, kept)
    return HostChoice(runs.rows[runs.first[answers] + places], places, answers)


def choose_on_device(batch: AlignedBatch, max_rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose positions by the hash of where their answer begins, in a fixed shape.

    Returns:
        Flat indices, ascending, int64 [n], n = min(max_rows, B * T): where there are fewer labelled positions the rest
        are others; and for each the flat index at which its answer begins (any index at unlabelled ones).
    """
    runs = batch.runs
    rows, positions = batch.labelled.shape
    columns = torch.arange(positions, device=batch.labelled.device)
    begins = torch.where(runs.starts, columns, 0).cummax(dim=1).values
    origins = (begins + positions * torch.arange(rows, device=begins.device).unsqueeze(1)).flatten()
    hashes = position_hash(batch.labelled.numel(), seed, origins.device).index_select(0, origins)
    # 32 bits of hash, then the place from the end: of an answer that is cut, its beginning is kept.
    keys = (hashes << 31) - torch.arange(origins.shape[0], device=origins.device)
    keys = torch.where(batch.labelled.flatten(), keys, -1 - torch.arange(keys.shape[0], device=keys.device))
    index = keys.topk(min(max_rows, keys.shape[0]), sorted=False).indices.sort().values
    return index, origins.index_select(0, index)


@dataclass(frozen=True, slots=True)
class RowSignals:
    """What the model says at n rows; all on the logits' device."""

    numbers: Tensor
    """Loss, entropy, probability of EOS (0 without one), highest probability; float32 [4, n]."""
    predictions: Tensor
    """int32 [n]"""
    mean_sum: Tensor
    """Sum of the rows' probabilities, float32 [vocabulary]; rows of weight 0 are left out."""


def row_signals(
    source: LogitsSource, row: Tensor, position: Tensor, targets: Tensor, *, eos_id: int | None, weights: Tensor | None
) -> RowSignals:
    """Read the logits of chosen positions once, in float32, at most ``CHUNK_BYTES`` of them at a time.

    Args:
        source: where logits come from.
        row: int64 [n] on the source's device.
        position: int64 [n]; brought within the positions that have logits.
        targets: int64 [n]; outside the vocabulary the loss is NaN.
        eos_id: the id whose probability is wanted.
        weights: float32 [n], 0 for rows that do not count in the mean, whose numbers the kernel leaves at 0; None: all
            count.
    """
    width = source.vocabulary_size
    eos = eos_id if eos_id is not None and eos_id < width else None
    logits = source.logits
    if logits is not None and source.suits_kernel:
        read = kernels.attempt(
            "row", lambda: read_logits(logits, targets, listed=(row, position), weights=weights, eos_id=eos)
        )
        if read is not None and read.mean_sum is not None:
            return RowSignals(read.numbers, read.predictions, read.mean_sum)
    step = max(1, CHUNK_BYTES // (source.row_bytes - 4 * width + _BYTES_PER_LOGIT * width))
    position = position.clamp(max=source.positions - 1)
    with torch.no_grad(), torch.autocast(source.device.type, enabled=False):
        chunks = [torch.split(each, step) for each in (row, position, targets)]
        weighted = [None] * len(chunks[0]) if weights is None else torch.split(weights, step)
        made = [
            _reduce(source.read(of_row, at), wanted, eos, weight)
            for of_row, at, wanted, weight in zip(*chunks, weighted, strict=True)
        ]
    if len(made) == 1:
        return made[0]
    return RowSignals(
        torch.cat([each.numbers for each in made], dim=1),
        torch.cat([each.predictions for each in made]),
        torch.stack([each.mean_sum for each in made]).sum(dim=0),
    )


def _reduce(logits: Tensor, targets: Tensor, eos_id: int | None, weights: Tensor | None) -> RowSignals:
    """Reduce logits [n, V], which are this call's own and are overwritten where they are float32 already."""
    width = logits.shape[1]
    logits = logits.to(torch.float32)
    most = logits.max(dim=1, keepdim=True)
    logits.sub_(most.values).clamp_(min=LEAST_LOGIT)
    of_target = logits.gather(1, targets.clamp(0, width - 1).unsqueeze(1)).squeeze(1)
    known = (targets >= 0) & (targets < width)
    exponentials = logits.exp()
    total = exponentials.sum(dim=1)
    normalizer = total.log()
    losses = torch.where(known, normalizer - of_target, torch.nan)
    entropies = normalizer - logits.mul_(exponentials).sum(dim=1) / total
    exponentials.div_(total.unsqueeze(1))
    eos = torch.zeros_like(total) if eos_id is None else exponentials.select(1, eos_id).clone()
    if weights is not None:
        exponentials.mul_(weights.unsqueeze(1))
    numbers = torch.stack((losses, entropies, eos, total.reciprocal()))
    return RowSignals(numbers, most.indices.squeeze(1).to(torch.int32), exponentials.sum(dim=0))
