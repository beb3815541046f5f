"""What a step's record says of the model's insides: sampled weights over ranks, and each module's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.messages import Signals
from sidestep.worker.copy_norms import norms_by_copy, weight_norms_by_copy
from sidestep.worker.record_batches import content_digest
from sidestep.worker.records import RunContext
from sidestep.worker.step_record import MAX_MODULES

MAX_NAMED_RANKS: Final = 8


def weight_facts(signals: Sequence[tuple[int, Signals]]) -> dict[str, Any]:
    """Compare the sampled weights of ranks that hold the same ones, bit by bit."""
    sent = [(rank, m) for rank, m in signals if m.heartbeat.size and m.heartbeat.ndim == 1]
    if not sent:
        return {}
    first: dict[tuple[int, int], bytes] = {}
    desynced, nonfinite = [], []
    for rank, message in sent:
        if not np.isfinite(message.heartbeat).all():
            nonfinite.append(rank)
        content = message.heartbeat.tobytes()
        if first.setdefault((message.heartbeat_digest, message.heartbeat.size), content) != content:
            desynced.append(rank)
    lowest = sent[0][1]
    return {
        "weights": lowest.heartbeat.astype(np.float32, copy=False),
        "weights_ungrouped": min(max(lowest.heartbeat_ungrouped, 0), lowest.heartbeat.size),
        "weights_digest": content_digest(lowest.heartbeat.tobytes()),
        "weights_kind": content_digest(f"{lowest.heartbeat_digest} {lowest.heartbeat.size}".encode()),
        "desynced_ranks": tuple(desynced[:MAX_NAMED_RANKS]),
        "nonfinite_weight_ranks": tuple(nonfinite[:MAX_NAMED_RANKS]),
    }


def module_facts(signals: Sequence[tuple[int, Signals]], context: RunContext) -> dict[str, Any]:
    """Merge the modules' norms, of gradients and of weights, over ranks."""
    gradients = _largest([norms for norms, _ in norms_by_copy(signals, context).values()])
    weights = _largest(list(weight_norms_by_copy(signals, context).values()))
    known = max(gradients.size, weights.size)
    if not known:
        return {}
    flags = context.module_flags[:known]
    flags += (0,) * (known - len(flags))
    return {"module_norms": gradients, "weight_norms": weights, "module_flags": flags}


def _largest(sent: Sequence[NDArray[np.float64]]) -> NDArray[np.float32]:
    """The largest over ranks, which is every rank's own where they hold the same; NaN where one is no number."""
    if not sent or len({norms.size for norms in sent}) > 1:
        return np.zeros(0, np.float32)
    stacked: NDArray[np.float64] = np.stack(sent)[:, :MAX_MODULES]
    is_finite = np.atleast_1d(np.isfinite(stacked).all(axis=0))
    norms: NDArray[np.float64] = np.max(stacked, axis=0, initial=-1.0, where=np.isfinite(stacked))
    norms[~is_finite] = np.nan
    return norms.astype(np.float32)
