"""Norms of the model's copies, of gradients and of weights: of each rank where it holds a whole one, else joined."""

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
    sent = [(rank, message, message.module_norms) for rank, message in signals]
    clipped = {rank: message.norms_clipped for rank, message in signals}
    joined = _of_copies(sent, context)
    return {ranks[0]: (norms, any(clipped[rank] for rank in ranks)) for ranks, norms in joined}


def weight_norms_by_copy(signals: Sequence[tuple[int, Signals]], context: RunContext) -> dict[int, NDArray[np.float64]]:
    """Return the lowest rank of each copy to the norms of its modules' weights [modules]; as ``norms_by_copy``."""
    sent = [(rank, message, message.weight_norms) for rank, message in signals]
    return {ranks[0]: norms for ranks, norms in _of_copies(sent, context)}


def _of_copies(
    sent: Sequence[tuple[int, Signals, NDArray[np.float32]]], context: RunContext
) -> list[tuple[tuple[int, ...], NDArray[np.float64]]]:
    """Return the ranks of each copy that is whole, and its norms; by its lowest rank."""
    found: list[tuple[tuple[int, ...], NDArray[np.float64]]] = []
    shares: dict[int, list[tuple[int, int, NDArray[np.float64]]]] = {}
    for rank, message, given in sent:
        if not given.size or given.ndim != 1:
            continue
        norms = given.astype(np.float64)
        if message.norm_shares > 0:
            shares.setdefault(copy_of(rank, context), []).append((rank, message.norm_shares, norms))
        else:
            found.append(((rank,), norms))
    for held in shares.values():
        parts = [norms for _, _, norms in held]
        if len(held) == held[0][1] and len({each.size for each in parts}) == 1:
            found.append((tuple(rank for rank, _, _ in held), _joined(np.stack(parts))))
    return sorted(found, key=lambda each: each[0])


def _joined(norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Root of the sum of squares over shares; -1 for a module of which no share has one."""
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
