"""Partial statistics of gradients by operations of torch, on any device, whatever the values are; nothing is read.

Many small tensors, or few large ones, become rows of equal length, so that a handful of operations serve all of them
and the memory in use is that of one block of rows. Sums over a row are float32 with the row's own scale and centre;
rows are summed in float64, where neither squares of float32 values nor sums of them over- or underflow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from sidestep.protocol.limits import GRADIENT_HISTOGRAM_BINS, GRADIENT_HISTOGRAM_LOG10_RANGE
from sidestep.trainer_hooks.reductions.gradient_pieces import COLUMNS, FINITE_NOT_ZERO, ROW_ELEMENTS, Piece

BLOCK_ROWS = 4096
"""Rows that are reduced together; a block takes 5 times its 16 MB while it is."""

_LEAST, _MOST = 2.0**-120, 2.0**120


def reduce_by_rows(device: torch.device, pieces: Sequence[Piece], slots: int, modules: int) -> tuple[Tensor, Tensor]:
    """Sum the rows of every gradient on one device.

    Args:
        device: where all of them lie.
        pieces: any sizes but 0, any mix of dtypes.
        slots: rows of the sums.
        modules: rows of the histograms.

    Returns:
        float64 [slots, 6] and int64 [modules, bins].
    """
    sums = torch.zeros((slots, COLUMNS - 1), dtype=torch.float64, device=device)
    largest = torch.zeros(slots, dtype=torch.float32, device=device)
    histograms = torch.zeros((modules, GRADIENT_HISTOGRAM_BINS), dtype=torch.int64, device=device)
    filler = torch.full((ROW_ELEMENTS,), torch.nan, device=device)
    for block in _blocks(pieces, BLOCK_ROWS):
        values = _in_rows(block, filler)
        owners = _owners(block, device)
        finite = torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        magnitudes = finite.abs()
        row_sums, row_absmax = _row_sums(values, finite, magnitudes)
        sums.index_add_(0, owners, row_sums)
        largest.scatter_reduce_(0, owners, row_absmax, "amax")
        _count_magnitudes(histograms, block, magnitudes, row_sums.select(1, FINITE_NOT_ZERO))
    return torch.cat((sums, largest.to(torch.float64).unsqueeze(1)), dim=1), histograms


def _in_rows(block: Sequence[Piece], filler: Tensor) -> Tensor:
    """Lay the pieces out in rows; float32 [rows, ROW_ELEMENTS], a copy."""
    filler = filler.to(block[0].values.dtype)
    parts: list[Tensor] = []
    for piece in block:
        parts.append(piece.values)
        if missing := -piece.values.shape[0] % ROW_ELEMENTS:
            parts.append(filler.narrow(0, 0, missing))
    return torch.cat(parts).view(-1, ROW_ELEMENTS).to(torch.float32)


def _owners(block: Sequence[Piece], device: torch.device) -> Tensor:
    """Return the slot of each row; int64 [rows]."""
    owners = torch.from_numpy(np.repeat([piece.slot for piece in block], [piece.rows for piece in block]))
    if device.type == "cuda" and torch.cuda.is_available():
        owners = owners.pin_memory()
    return owners.to(device, non_blocking=True)


def _row_sums(values: Tensor, finite: Tensor, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """Return float64 [rows, 5] and the largest magnitudes, float32 [rows]; ``values`` and ``finite`` are used up."""
    # Written into floats that are to be overwritten anyway, since sums of booleans are slow on a host.
    scratch = torch.empty_like(values)
    not_zero = torch.ne(values, 0.0, out=scratch).sum(dim=1)
    finite_not_zero = torch.ne(finite, 0.0, out=scratch).sum(dim=1)
    count = ROW_ELEMENTS - not_zero + finite_not_zero
    absmax = magnitudes.amax(dim=1)
    factor = torch.exp2(-absmax.clamp(_LEAST, _MOST).log2_().floor_())
    # Centre by the row's own mean, then correct by what rounding left of it: accurate at any ratio of mean to std.
    centre = finite.mul_(factor.unsqueeze(1)).sum(dim=1) / count.clamp(min=1.0)
    rest = torch.nan_to_num_(
        values.mul_(factor.unsqueeze(1)).sub_(centre.unsqueeze(1)), nan=0.0, posinf=0.0, neginf=0.0
    )
    wide_count, unit = count.to(torch.float64), factor.to(torch.float64).reciprocal_()
    left = rest.sum(dim=1).to(torch.float64) / wide_count.clamp(min=1.0)
    spread = (rest.square_().sum(dim=1).to(torch.float64) - wide_count * left.square()).clamp_(min=0.0)
    mean = (centre.to(torch.float64) + left) * unit
    total = wide_count * mean
    columns = (
        not_zero.to(torch.float64),
        finite_not_zero.to(torch.float64),
        total,
        spread * unit.square(),
        total * mean,
    )
    return torch.stack(columns, dim=1), absmax


def _count_magnitudes(histograms: Tensor, block: Sequence[Piece], magnitudes: Tensor, finite_not_zero: Tensor) -> None:
    """Add each row's log10 magnitudes to its module's histogram; ``magnitudes`` are used up."""
    low, high = GRADIENT_HISTOGRAM_LOG10_RANGE
    density = GRADIENT_HISTOGRAM_BINS / (high - low)
    slots = magnitudes.log10_().sub_(low).mul_(density).clamp_(0.0, GRADIENT_HISTOGRAM_BINS - 1)
    start = 0
    for module in sorted({piece.module for piece in block}):
        rows = sum(piece.rows for piece in block if piece.module == module)
        counts = _bin_counts(slots.narrow(0, start, rows))
        # Zeros, what is not finite and the filling have magnitude 0, whose logarithm fell into the first bin.
        others = rows * ROW_ELEMENTS - finite_not_zero.narrow(0, start, rows).sum().to(torch.int64)
        histograms.select(0, module).add_(counts)
        histograms.select(0, module).select(0, 0).sub_(others)
        start += rows


def _bin_counts(slots: Tensor) -> Tensor:
    """Count whole parts of 0 to 63; int64 [64]."""
    # One column of counters per column of the rows: a device's threads then never meet at one counter.
    counts = torch.zeros((GRADIENT_HISTOGRAM_BINS, ROW_ELEMENTS), dtype=torch.int32, device=slots.device)
    one = torch.ones((1, 1), dtype=torch.int32, device=slots.device).expand(slots.shape)
    return counts.scatter_add_(0, slots.to(torch.int64), one).sum(dim=1)


def _blocks(pieces: Sequence[Piece], most_rows: int) -> Iterator[list[Piece]]:
    """Cut the pieces into blocks of at most ``most_rows`` rows and one dtype."""
    block: list[Piece] = []
    room = most_rows
    for piece in sorted(pieces, key=lambda piece: (str(piece.values.dtype), piece.module)):
        start, total = 0, piece.values.shape[0]
        while start < total:
            if not room or (block and block[0].values.dtype != piece.values.dtype):
                yield block
                block, room = [], most_rows
            taken = min(room * ROW_ELEMENTS, total - start)
            block.append(piece.part(start, taken))
            start += taken
            room -= block[-1].rows
    if block:
        yield block
