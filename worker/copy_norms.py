"""Gradient norms of the model's copies: of each rank where it holds a whole one, else joined of the shares' norms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.messages import Signals
from sidestep.worker.records import RunContext


def copy_of(rank: int, context: RunContext) -> int:
    """Return which copy of the parameters a rank holds all or a share of; its own where it does not say."""
    copy = context.topologies.get(rank, {}).get("copy", rank)
    return copy if isinstance(copy, int) else rank


def norms_by_copy(
    signals: Sequence[tuple[int, Signals]], context: RunContext
) -> dict[int, tuple[NDArray[np.float64], bool]]:
    """Return the lowest rank of each copy to its modules' norms [modules], and whether they are of clipped gradients.

    A copy of which a share's norms are missing is absent: a sum over some of the shares is no norm.
    """
    found: dict[int, tuple[NDArray[np.float64], bool]] = {}
    shares: dict[int, list[tuple[int, Signals]]] = {}
    for rank, message in signals:
        if not message.module_norms.size or message.module_norms.ndim != 1:
            continue
        if message.norm_shares > 0:
            shares.setdefault(copy_of(rank, context), []).append((rank, message))
        else:
            found[rank] = message.module_norms.astype(np.float64), message.norms_clipped
    for held in shares.values():
        norms = [message.module_norms.astype(np.float64) for _, message in held]
        if len(held) == held[0][1].norm_shares and len({each.size for each in norms}) == 1:
            found[held[0][0]] = _joined(np.stack(norms)), any(message.norms_clipped for _, message in held)
    return dict(sorted(found.items()))


def _joined(norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Root of the sum of squares over shares; -1 for a module of which no share has a gradient."""
    with np.errstate(invalid="ignore", over="ignore"):
        joined: NDArray[np.float64] = np.sqrt(np.square(np.where(norms < 0, 0.0, norms)).sum(axis=0))
    joined[(norms < 0).all(axis=0)] = -1.0
    return joined


def whole_norms(signals: Sequence[tuple[int, Signals]], context: RunContext) -> Mapping[int, float]:
    """Return a rank of each copy to the norm of the whole gradient before clipping, as told or as taken."""
    found = {rank: float(message.gradient_norm[0]) for rank, message in signals if message.gradient_norm.size}
    told = {copy_of(rank, context) for rank in found}
    sharing = [(rank, message) for rank, message in signals if message.norm_shares > 0]
    for rank, (norms, is_clipped) in norms_by_copy(sharing, context).items():
        if copy_of(rank, context) not in told and not is_clipped:
            found[rank] = math.sqrt(float(np.square(np.where(norms < 0, 0.0, norms)).sum()))
    return found
