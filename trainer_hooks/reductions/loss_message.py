"""The second half of the losses: from host copies to the message of the wire (docs/metrics.md, ``loss/``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.limits import (
    HIGHEST_TOKEN_CONTEXT_TOKENS,
    LOSS_HISTOGRAM_BINS,
    LOSS_HISTOGRAM_MAX_NATS,
    MAX_EXACT_LOSS_TOKENS_PER_STEP,
    MAX_HIGHEST_TOKENS,
)
from sidestep.protocol.messages import Losses, Role
from sidestep.trainer_hooks.reductions.loss import LABELLED


def losses_message(
    *,
    step: int,
    microstep: int,
    arrays: Mapping[str, NDArray[Any]],
    exact_rows_limit: int = MAX_EXACT_LOSS_TOKENS_PER_STEP,
    reason: str = "",
) -> Losses:
    """Compact what ``reduce_loss`` returned, once it is on the host.

    Args:
        step: the optimizer step.
        microstep: the micro-batch within it.
        arrays: host copies, by the names of ``reduce_loss``.
        exact_rows_limit: above this many losses a histogram and partial sums travel instead of them; the caller divides
            ``limits.MAX_EXACT_LOSS_TOKENS_PER_STEP`` by the micro-batches and ranks of a step.
        reason: why there are no losses, where there are none.
    """
    labelled = int(arrays["labelled"][0])
    trainer_loss = arrays.get("trainer_loss", np.zeros(0, np.float32))
    if "losses" not in arrays:
        return Losses(step=step, microstep=microstep, labelled=labelled, trainer_loss=trainer_loss, reason=reason)
    rows, losses, targets, roles = _compacted(arrays)
    highest = _highest(losses)
    keep = losses.size <= exact_rows_limit
    none = slice(None) if keep else slice(0)
    return Losses(
        step=step,
        microstep=microstep,
        labelled=labelled,
        sampled=losses.size < labelled,
        losses=losses[none],
        target_ids=targets[none],
        roles=roles[none],
        highest=highest[none].astype(np.int32),
        highest_losses=losses[highest],
        highest_targets=targets[highest],
        contexts=_contexts(arrays, rows[highest]),
        trainer_loss=trainer_loss,
        histogram=np.zeros(0, np.int64) if keep else _histogram(losses),
        partials=np.zeros(0, np.float64) if keep else _partials(losses, roles),
        reason="" if losses.size else "no labelled position",
    )


def _compacted(
    arrays: Mapping[str, NDArray[Any]],
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int32], NDArray[np.uint8]]:
    """Leave out the positions that do not count, and put the others in the batch's order."""
    roles: NDArray[np.uint8] = arrays["roles"]
    chosen = np.flatnonzero(roles & np.uint8(LABELLED))
    rows = arrays["rows"][chosen].astype(np.int64) if "rows" in arrays else chosen
    order = np.argsort(rows, kind="stable")
    chosen = chosen[order]
    return rows[order], arrays["losses"][chosen], arrays["targets"][chosen], roles[chosen] & np.uint8(LABELLED - 1)


def _highest(losses: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the indices of the largest finite losses, largest first, earlier ones first among equals."""
    finite = np.flatnonzero(np.isfinite(losses))
    order = np.argsort(-losses[finite], kind="stable")[:MAX_HIGHEST_TOKENS]
    return finite[order]


def _contexts(arrays: Mapping[str, NDArray[Any]], rows: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return the ids before each target, from its own row and document, -1 where there is none; [h, context]."""
    if "context_ids" not in arrays:
        return np.full((rows.size, 0), -1, np.int32)
    ids: NDArray[np.int32] = arrays["context_ids"]
    row, position = np.divmod(rows, ids.shape[1])
    first = np.zeros(rows.size, np.int64)
    if "document_starts" in arrays:
        # The target stands one position further; where that begins a document, nothing stands before it.
        starts = np.pad(arrays["document_starts"], ((0, 0), (0, 1)), mode="edge")
        first = starts[row, position + 1].astype(np.int64)
    places = position[:, None] + np.arange(1 - HIGHEST_TOKEN_CONTEXT_TOKENS, 1)
    found = ids[row[:, None], np.maximum(places, 0)]
    return np.where(places >= first[:, None], found, np.int32(-1))


def _histogram(losses: NDArray[np.float32]) -> NDArray[np.int64]:
    finite = losses[np.isfinite(losses)].astype(np.float64)
    slots = np.floor(finite * (LOSS_HISTOGRAM_BINS / LOSS_HISTOGRAM_MAX_NATS))
    slots = np.clip(slots, 0, LOSS_HISTOGRAM_BINS - 1).astype(np.int64)
    return np.bincount(slots, minlength=LOSS_HISTOGRAM_BINS).astype(np.int64)


def _partials(losses: NDArray[np.float32], roles: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return count, mean, M2, min, max, non-finite, first count, first sum, later count, later sum."""
    known = np.isfinite(losses)
    finite, roles = losses[known].astype(np.float64), roles[known]
    if not finite.size:
        return np.array([0, 0, 0, 0, 0, losses.size, 0, 0, 0, 0], np.float64)
    mean = finite.mean()
    first = finite[roles & np.uint8(Role.FIRST) != 0]
    later = finite[roles & np.uint8(Role.LATER) != 0]
    spread = np.square(finite - mean).sum()
    ends = (finite.min(), finite.max(), losses.size - finite.size)
    return np.array([finite.size, mean, spread, *ends, first.size, first.sum(), later.size, later.sum()])
