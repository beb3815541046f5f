"""What a step's record says of the model's insides: sampled weights over ranks, and each module's gradient."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.messages import Json, Signals
from sidestep.worker.copy_norms import norms_by_copy, weight_norms_by_copy
from sidestep.worker.records import RunContext
from sidestep.worker.step_record import MAX_MODULES

MAX_NAMED_RANKS: Final = 8
TRAINABLE: Final = 1
VISUAL: Final = 2
_VISUAL_NAME: Final = re.compile(
    r"vis|image|img|pixel|patch|project|connector|siglip|clip|vit|mm_|resampler|(^|[._])mp([._]|$)", re.IGNORECASE
)


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
        "weights_digest": _digest(lowest.heartbeat.tobytes()),
        "weights_kind": _digest(f"{lowest.heartbeat_digest} {lowest.heartbeat.size}".encode()),
        "desynced_ranks": tuple(desynced[:MAX_NAMED_RANKS]),
        "nonfinite_weight_ranks": tuple(nonfinite[:MAX_NAMED_RANKS]),
    }


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1 or 1


def module_names(context: RunContext) -> list[str]:
    """Return the modules of the table ``parameters``, in its order."""
    names = context.parameters.get("modules")
    return [str(name) for name in names] if isinstance(names, list | tuple) else []


def module_facts(signals: Sequence[tuple[int, Signals]], context: RunContext) -> dict[str, Any]:
    """Merge the modules' norms, of gradients and of weights, over ranks."""
    names = module_names(context)
    trainable = _trainable(context.parameters, len(names))
    gradients = _largest([norms for norms, _ in norms_by_copy(signals, context).values()])
    weights = _largest(list(weight_norms_by_copy(signals, context).values()))
    known = max(gradients.size, weights.size)
    if not known:
        return {}
    flags = tuple(_flag(names, trainable, place) for place in range(known))
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


def _flag(names: Sequence[str], trainable: Sequence[bool], place: int) -> int:
    if place >= len(names):
        return 0
    return (TRAINABLE if trainable[place] else 0) | (VISUAL if _VISUAL_NAME.search(names[place]) else 0)


def _trainable(table: Mapping[str, Json], num_modules: int) -> list[bool]:
    """Whether any parameter of a module is trainable, by the table."""
    found = [False] * num_modules
    rows = table.get("parameters")
    for row in rows if isinstance(rows, list | tuple) else ():
        place = row.get("module") if isinstance(row, Mapping) else None
        if isinstance(place, int) and 0 <= place < num_modules and row.get("trainable", True):
            found[place] = True
    return found
