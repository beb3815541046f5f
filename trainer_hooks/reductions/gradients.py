"""Partial statistics of local gradients (docs/metrics.md, ``gradients/``).

Three ways lead to the same numbers: a kernel, on a device or on the host (``kernels/``), blocks that stay in a core's
caches where gradients lie in the host's memory (``gradient_blocks.py``), and operations of torch for all else
(``gradient_rows.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidestep.protocol.limits import GRADIENT_HISTOGRAM_BINS
from sidestep.protocol.messages import Gradients
from sidestep.trainer_hooks.kernels.choice import HOST_GRADIENT, kernels
from sidestep.trainer_hooks.kernels.chunk_table import Stretch
from sidestep.trainer_hooks.kernels.gradient_launch import DTYPES, reduce_stretches
from sidestep.trainer_hooks.kernels.host_launch import host_kernel
from sidestep.trainer_hooks.reductions.gradient_blocks import reduce_on_host
from sidestep.trainer_hooks.reductions.gradient_pieces import (
    ABSMAX,
    BETWEEN,
    COLUMNS,
    FINITE_NOT_ZERO,
    NOT_ZERO,
    ROW_ELEMENTS,
    SUM,
    WITHIN,
    Piece,
)
from sidestep.trainer_hooks.reductions.gradient_rows import reduce_by_rows


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
    by_device: dict[torch.device, list[Piece]] = {}
    for slot, (each, flat) in enumerate(zip(gradients, flats, strict=True)):
        if flat.shape[0]:
            module = number[each.module] if each.is_first else len(modules)  # a histogram that nobody reads
            by_device.setdefault(flat.device, []).append(Piece(slot=slot, module=module, values=flat))
    home = next((device for device in by_device if device.type != "cpu"), torch.device("cpu"))
    sums = torch.zeros((len(flats), COLUMNS), dtype=torch.float64, device=home)
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


def _reduce_on(device: torch.device, pieces: Sequence[Piece], slots: int, modules: int) -> tuple[Tensor, Tensor]:
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
    if device.type != "cpu":
        return reduce_by_rows(device, pieces, slots, modules)
    if kernels.can_run_on_host([piece.values for piece in pieces]):
        made = kernels.attempt(HOST_GRADIENT, lambda: host_kernel.reduce(pieces, slots=slots, modules=modules))
        if made is not None:
            return made
    return reduce_on_host(pieces, slots, modules)


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
    not_zero, finite_not_zero = (sums[:, column].astype(np.int64) for column in (NOT_ZERO, FINITE_NOT_ZERO))
    filling = arrays["rows"] * ROW_ELEMENTS - counts
    nonfinite = not_zero - finite_not_zero - filling
    zeros = counts + filling - not_zero
    finite = counts - nonfinite
    mean = sums[:, SUM] / np.maximum(finite, 1)
    m2 = sums[:, WITHIN] + np.maximum(sums[:, BETWEEN] - sums[:, SUM] * mean, 0.0)
    exponents = np.frexp(sums[:, ABSMAX])[1].astype(np.int32)
    return Gradients(
        step=step,
        parameters=arrays["parameters"],
        counts=counts,
        nonfinite=nonfinite,
        zeros=zeros,
        exponents=exponents,
        means=np.ldexp(mean, -exponents),
        m2=np.ldexp(m2, -2 * exponents),
        absmax=sums[:, ABSMAX].copy(),
        without_gradient=np.asarray(without_gradient, np.int32),
        histogram_modules=arrays["histogram_modules"],
        histograms=arrays["histograms"],
        scale=float(arrays["scale"][0]),
        clipped=clipped,
        partial=np.asarray(partial, np.int32),
    )
