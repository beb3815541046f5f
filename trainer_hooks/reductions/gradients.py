"""Partial statistics of local gradients (docs/metrics.md, ``gradients/``).

Many small tensors, or few large ones, become rows of equal length, so that a handful of operations serve all of them
and the memory in use is that of one block of rows. Sums over a row are float32 with the row's own scale and centre;
rows are summed in float64, where neither squares of float32 values nor sums of them over- or underflow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidestep.protocol.limits import GRADIENT_HISTOGRAM_BINS, GRADIENT_HISTOGRAM_LOG10_RANGE
from sidestep.protocol.messages import Gradients
from sidestep.trainer_hooks.kernels.choice import kernels
from sidestep.trainer_hooks.kernels.chunk_table import Stretch
from sidestep.trainer_hooks.kernels.gradient_launch import DTYPES, reduce_stretches

ROW_ELEMENTS = 1024
"""Elements of a row; a tensor's last row is filled up with NaN, which is not counted."""
BLOCK_ROWS = 4096
"""Rows that are reduced together; a block takes 5 times its 16 MB while it is."""

HOST_BLOCK_ROWS = 256
"""The same on the host: few enough for its caches."""

_COLUMNS = 6
_NOT_ZERO, _FINITE_NOT_ZERO, _SUM, _WITHIN, _BETWEEN, _ABSMAX = range(_COLUMNS)
_LEAST, _MOST = 2.0**-120, 2.0**120


class LocalGradient(NamedTuple):
    """This rank's share of one parameter's gradient."""

    parameter: int
    """Its row in the table ``parameters``."""
    module: int
    """The module of that row."""
    gradient: Tensor
    """Any shape, floating, dense; a DTensor stands for its local share."""
    is_first: bool = True
    """Whether its elements count in the module's histogram: another rank's copy of the same share does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A stretch of a flattened gradient that begins a row."""

    slot: int
    module: int
    values: Tensor

    @property
    def rows(self) -> int:
        return -(-self.values.shape[0] // ROW_ELEMENTS)


def reduce_gradients(gradients: Sequence[LocalGradient], scale: Tensor | float | None = None) -> dict[str, Tensor]:
    """Reduce all gradients of a step; a few operations per block of 4 million elements.

    Args:
        gradients: what this rank holds; float16, bfloat16, float32 (float64 is read as float32), any strides.
        scale: the GradScaler's factor that the gradients still carry; a tensor on a device is not read.

    Returns:
        On the host, known before any work: ``parameters`` int32 [n], ``counts`` int64 [n], ``rows`` int64 [n],
        ``histogram_modules`` int32 [m]. On the gradients' device: ``sums`` float64 [n, 6] and ``histograms`` int64
        [m, 64], which ``gradients_message`` reads, and ``scale`` float32 [1].

    Raises:
        TypeError: a gradient is sparse, or not floating.
    """
    flats = [_flat(each.gradient) for each in gradients]
    modules = sorted({each.module for each in gradients})
    number = {module: index for index, module in enumerate(modules)}
    by_device: dict[torch.device, list[_Piece]] = {}
    for slot, (each, flat) in enumerate(zip(gradients, flats, strict=True)):
        if flat.shape[0]:
            module = number[each.module] if each.is_first else len(modules)  # a histogram that nobody reads
            by_device.setdefault(flat.device, []).append(_Piece(slot=slot, module=module, values=flat))
    home = next((device for device in by_device if device.type != "cpu"), torch.device("cpu"))
    sums = torch.zeros((len(flats), _COLUMNS), dtype=torch.float64, device=home)
    num_histograms = len(modules) + any(not each.is_first for each in gradients)
    histograms = torch.zeros((num_histograms, GRADIENT_HISTOGRAM_BINS), dtype=torch.int64, device=home)
    with torch.no_grad():
        for device, pieces in by_device.items():
            part, counts = _reduce_on(device, pieces, len(flats), num_histograms)
            sums += part.to(home, non_blocking=True)  # a parameter lies on one device: elsewhere its sums are 0
            histograms += counts.to(home, non_blocking=True)
    sizes = np.array([flat.shape[0] for flat in flats], np.int64)
    return {
        "parameters": torch.tensor([each.parameter for each in gradients], dtype=torch.int32),
        "counts": torch.from_numpy(sizes),
        "rows": torch.from_numpy(-(-sizes // ROW_ELEMENTS)),
        "histogram_modules": torch.tensor(modules, dtype=torch.int32),
        "sums": sums,
        "histograms": histograms.narrow(0, 0, len(modules)),
        "scale": _one_element(scale, home),
    }


def _flat(gradient: Tensor) -> Tensor:
    """Return the local values in one axis; in the order of memory where that spares a copy."""
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    local = local.detach()
    if local.layout is not torch.strided or not local.is_floating_point():
        raise TypeError(f"gradients are dense and floating, not {local.layout} {local.dtype}")
    if local.is_contiguous():
        return local.view(-1)
    order = sorted(range(local.dim()), key=local.stride, reverse=True)
    return local.permute(order).reshape(-1)


def _blocks(pieces: Sequence[_Piece], most_rows: int) -> Iterator[list[_Piece]]:
    """Cut the pieces into blocks of at most ``most_rows`` rows and one dtype."""
    block: list[_Piece] = []
    room = most_rows
    for piece in sorted(pieces, key=lambda piece: (str(piece.values.dtype), piece.module)):
        start, total = 0, piece.values.shape[0]
        while start < total:
            if not room or (block and block[0].values.dtype != piece.values.dtype):
                yield block
                block, room = [], most_rows
            taken = min(room * ROW_ELEMENTS, total - start)
            values = piece.values.narrow(0, start, taken)
            block.append(_Piece(slot=piece.slot, module=piece.module, values=values))
            start += taken
            room -= block[-1].rows
    if block:
        yield block


def _reduce_on(device: torch.device, pieces: Sequence[_Piece], slots: int, modules: int) -> tuple[Tensor, Tensor]:
    """Sum the rows of every gradient on one device; float64 [slots, 6] and int64 [modules, bins]."""
    if kernels.can_run("gradient", [piece.values for piece in pieces], DTYPES):
        # One axis need not be contiguous: of every other element there is such a view, and only that one is copied.
        stretches = [Stretch(piece.slot, piece.module, piece.values.contiguous()) for piece in pieces]
        made = kernels.attempt(
            "gradient",
            lambda: reduce_stretches(device, stretches, slots=slots, modules=modules, filled_to=ROW_ELEMENTS),
        )
        if made is not None:
            return made
    return _reduce_by_rows(device, pieces, slots, modules)


def _reduce_by_rows(device: torch.device, pieces: Sequence[_Piece], slots: int, modules: int) -> tuple[Tensor, Tensor]:
    """Do the same by operations of torch."""
    sums = torch.zeros((slots, _COLUMNS - 1), dtype=torch.float64, device=device)
    largest = torch.zeros(slots, dtype=torch.float32, device=device)
    histograms = torch.zeros((modules, GRADIENT_HISTOGRAM_BINS), dtype=torch.int64, device=device)
    filler = torch.full((ROW_ELEMENTS,), torch.nan, device=device)
    on_host = device.type == "cpu"
    for block in _blocks(pieces, min(BLOCK_ROWS, HOST_BLOCK_ROWS) if on_host else BLOCK_ROWS):
        values = _in_rows(block, filler)
        owners = _owners(block, device)
        magnitudes = values.abs()
        if on_host and bool((row_absmax := magnitudes.amax(dim=1)).isfinite().all()):
            row_sums = _finite_row_sums(values, row_absmax)
        else:
            finite = torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
            magnitudes = torch.abs(finite, out=magnitudes)
            row_sums, row_absmax = _row_sums(values, finite, magnitudes)
        sums.index_add_(0, owners, row_sums)
        largest.scatter_reduce_(0, owners, row_absmax, "amax")
        _count_magnitudes(histograms, block, magnitudes, row_sums.select(1, _FINITE_NOT_ZERO))
    return torch.cat((sums, largest.to(torch.float64).unsqueeze(1)), dim=1), histograms


def _in_rows(block: Sequence[_Piece], filler: Tensor) -> Tensor:
    """Lay the pieces out in rows; float32 [rows, ROW_ELEMENTS], a copy."""
    filler = filler.to(block[0].values.dtype)
    parts: list[Tensor] = []
    for piece in block:
        parts.append(piece.values)
        if missing := -piece.values.shape[0] % ROW_ELEMENTS:
            parts.append(filler.narrow(0, 0, missing))
    return torch.cat(parts).view(-1, ROW_ELEMENTS).to(torch.float32)


def _owners(block: Sequence[_Piece], device: torch.device) -> Tensor:
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


def _finite_row_sums(values: Tensor, absmax: Tensor) -> Tensor:
    """Return what ``_row_sums`` does of rows that are full and finite, in half the passes; ``values`` are used up."""
    not_zero = torch.ne(values, 0.0, out=torch.empty_like(values)).sum(dim=1).to(torch.float64)
    factor = torch.exp2(-absmax.clamp(_LEAST, _MOST).log2_().floor_())
    unit = factor.to(torch.float64).reciprocal_()
    centre = values.mul_(factor.unsqueeze(1)).sum(dim=1) / ROW_ELEMENTS
    rest = values.sub_(centre.unsqueeze(1))
    left = rest.sum(dim=1).to(torch.float64) / ROW_ELEMENTS
    spread = (torch.linalg.vecdot(rest, rest).to(torch.float64) - ROW_ELEMENTS * left.square()).clamp_(min=0.0)
    mean = (centre.to(torch.float64) + left) * unit
    total = mean * ROW_ELEMENTS
    return torch.stack((not_zero, not_zero, total, spread * unit.square(), total * mean), dim=1)


def _count_magnitudes(histograms: Tensor, block: Sequence[_Piece], magnitudes: Tensor, finite_not_zero: Tensor) -> None:
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
    if slots.device.type == "cpu":
        return torch.bincount(slots.flatten().to(torch.uint8), minlength=GRADIENT_HISTOGRAM_BINS)
    # One column of counters per column of the rows: a device's threads then never meet at one counter.
    counts = torch.zeros((GRADIENT_HISTOGRAM_BINS, ROW_ELEMENTS), dtype=torch.int32, device=slots.device)
    one = torch.ones((1, 1), dtype=torch.int32, device=slots.device).expand(slots.shape)
    return counts.scatter_add_(0, slots.to(torch.int64), one).sum(dim=1)


def _one_element(scale: Tensor | float | None, device: torch.device) -> Tensor:
    if isinstance(scale, Tensor):
        return scale.detach().reshape(-1).narrow(0, 0, 1).to(torch.float32)
    return torch.full((1,), 1.0 if scale is None else scale, dtype=torch.float32, device=device)


def gradients_message(
    *,
    step: int,
    arrays: Mapping[str, NDArray[Any]],
    without_gradient: Sequence[int] = (),
    clipped: bool = False,
    partial: Sequence[int] = (),
) -> Gradients:
    """Compact what ``reduce_gradients`` returned, once it is on the host.

    Args:
        step: the optimizer step.
        arrays: host copies, by the names of ``reduce_gradients``.
        without_gradient: rows of trainable parameters that had no gradient.
        clipped: whether the gradients were taken after clipping.
        partial: rows whose gradient is a term of a sum over ranks.
    """
    sums, counts = arrays["sums"], arrays["counts"]
    not_zero, finite_not_zero = (sums[:, column].astype(np.int64) for column in (_NOT_ZERO, _FINITE_NOT_ZERO))
    filling = arrays["rows"] * ROW_ELEMENTS - counts
    nonfinite = not_zero - finite_not_zero - filling
    zeros = counts + filling - not_zero
    finite = counts - nonfinite
    mean = sums[:, _SUM] / np.maximum(finite, 1)
    m2 = sums[:, _WITHIN] + np.maximum(sums[:, _BETWEEN] - sums[:, _SUM] * mean, 0.0)
    exponents = np.frexp(sums[:, _ABSMAX])[1].astype(np.int32)
    return Gradients(
        step=step,
        parameters=arrays["parameters"],
        counts=counts,
        nonfinite=nonfinite,
        zeros=zeros,
        exponents=exponents,
        means=np.ldexp(mean, -exponents),
        m2=np.ldexp(m2, -2 * exponents),
        absmax=sums[:, _ABSMAX].copy(),
        without_gradient=np.asarray(without_gradient, np.int32),
        histogram_modules=arrays["histogram_modules"],
        histograms=arrays["histograms"],
        scale=float(arrays["scale"][0]),
        clipped=clipped,
        partial=np.asarray(partial, np.int32),
    )
