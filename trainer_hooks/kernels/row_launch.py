"""What the model says at rows of its logits, by the kernel: no row is copied, and those of weight 0 are not read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LANES, DEPTH, NUM_WARPS = 1024, 4, 4
"""A program of ``read_rows``: 32 logits of each of its threads are on their way at a time."""
MEAN_LANES, MEAN_WARPS = 1024, 4
LEAST_GROUP_ROWS, MOST_GROUPS = 32, 32
"""Of ``add_probabilities``: its partial sums are at most ``MOST_GROUPS`` rows of the vocabulary's width."""
MAX_ROWS = 1 << 31
"""More programs than a launch may have."""


class RowNumbers(NamedTuple):
    """What was read of n rows; on the logits' device."""

    numbers: Tensor
    """Loss, entropy, probability of EOS, highest probability; float32 [4, n], 0 at rows of weight 0."""
    predictions: Tensor
    """int32 [n]"""
    mean_sum: Tensor | None
    """Sum of the rows' probabilities times their weights, float32 [V]; where it was asked for."""


def fits(logits: Tensor) -> bool:
    """Tell whether logits [B, T, V] lie as the kernel reads them."""
    return logits.dim() == 3 and logits.stride(2) == 1 and 0 < logits.shape[2] < MAX_ROWS


def read_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    listed: tuple[Tensor, Tensor] | None = None,
    positions: int = 0,
    weights: Tensor | None = None,
    eos_id: int | None = None,
    with_mean: bool = True,
) -> RowNumbers:
    """Read rows of logits; the same bits for the same logits.

    Args:
        logits: [B, T, V] of ``DTYPES``, of which ``fits`` is true.
        targets: int64 [n]; outside the vocabulary the loss is NaN.
        listed: rows and places, int64 [n] each; None: all, B * ``positions`` of them in order.
        positions: places of a row, where none are listed; one beyond the logits' T is brought to the last.
        weights: [n], what each row counts for in the mean; at 0 it is not read. None: all count.
        eos_id: the id whose probability is wanted, within the vocabulary.
        with_mean: whether the sum of probabilities is wanted, a second pass over the rows.
    """
    from sidestep.trainer_hooks.kernels.row_kernel import read_rows  # noqa: PLC0415  (loads Triton)

    count, device = targets.shape[0], logits.device
    places_of_logits, width = logits.shape[1], logits.shape[2]
    numbers = torch.empty((4, count), dtype=torch.float32, device=device)
    predictions = torch.empty(count, dtype=torch.int32, device=device)
    normalizers = torch.empty((2, count), dtype=torch.float32, device=device)
    rows, places = (targets, targets) if listed is None else listed
    mask = targets if weights is None else weights
    if count:
        with torch.cuda.device(device if device.type == "cuda" else -1):
            read_rows[(count,)](
                logits, rows, places, targets, mask, numbers, predictions, normalizers, count,
                max(1, positions), places_of_logits - 1, logits.stride(0), logits.stride(1), width,
                0 if eos_id is None else eos_id,
                is_listed=listed is not None, is_weighted=weights is not None, has_eos=eos_id is not None,
                lanes=LANES, depth=DEPTH, rounds=-(-width // (LANES * DEPTH)), native=device.type == "cuda",
                num_warps=NUM_WARPS,
            )  # fmt: skip
    mean_sum = None
    if with_mean:
        given = listed is not None, weights is not None
        mean_sum = _mean_sum(logits, (rows, places, mask), normalizers, given, positions)
    return RowNumbers(numbers, predictions, mean_sum)


def _mean_sum(
    logits: Tensor, which: tuple[Tensor, Tensor, Tensor], normalizers: Tensor, given: tuple[bool, bool], positions: int
) -> Tensor:
    """Add up the rows' probabilities: groups of rows in their order, then the groups in theirs."""
    from sidestep.trainer_hooks.kernels.row_kernel import add_probabilities  # noqa: PLC0415  (loads Triton)

    count, width = normalizers.shape[1], logits.shape[2]
    if not count:
        return torch.zeros(width, dtype=torch.float32, device=logits.device)
    group = LEAST_GROUP_ROWS
    while group * MOST_GROUPS < count:  # a power of two, since each is compiled
        group *= 2
    groups = -(-count // group)
    partials = torch.empty((groups, width), dtype=torch.float32, device=logits.device)
    with torch.cuda.device(logits.device if logits.device.type == "cuda" else -1):
        add_probabilities[(-(-width // MEAN_LANES), groups)](
            logits, *which, normalizers, partials, count, max(1, positions), logits.shape[1] - 1, logits.stride(0),
            logits.stride(1), width, is_listed=given[0], is_weighted=given[1], lanes=MEAN_LANES, group=group,
            native=logits.is_cuda, num_warps=MEAN_WARPS,
        )  # fmt: skip
    return partials.sum(dim=0)
