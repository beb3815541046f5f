"""The table ``loss/highest_tokens``: which tokens cost most and what stood before them (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.limits import MAX_HIGHEST_TOKENS
from sidestep.protocol.messages import Losses
from sidestep.worker.metrics.measurement import Table
from sidestep.worker.records import RunContext

COLUMNS = ("token", "context", "loss", "rank")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Proposed:
    """What one message proposes, in its order."""

    losses: NDArray[np.float32]
    """Finite ones [n]."""
    targets: NDArray[np.int32]
    """[n]"""
    contexts: NDArray[np.int64]
    """Which row of the message's ``contexts`` stands before each [n]; -1: none."""


def highest_tokens(batches: Sequence[tuple[int, Losses]], context: RunContext) -> Table | None:
    """Return the 32 tokens with the largest finite losses over all (rank, ``Losses``), largest first; None without one.

    Among equal losses the lower rank comes first, then the order within the message.
    """
    proposed = [_proposed(batch) for _, batch in batches]
    ends = np.cumsum([each.losses.size for each in proposed])
    if not proposed or not ends[-1]:
        return None
    order = np.argsort(-np.concatenate([each.losses for each in proposed]), kind="stable")[:MAX_HIGHEST_TOKENS]
    rows = []
    for number in order.tolist():
        which = int(np.searchsorted(ends, number, side="right"))
        (rank, batch), found = batches[which], proposed[which]
        place = number - int(ends[which]) + found.losses.size
        row = int(found.contexts[place])
        before = [i for i in batch.contexts[row].tolist() if i >= 0] if row >= 0 else []
        token = context.text.token(int(found.targets[place]))
        rows.append((token, context.text.text(before), float(found.losses[place]), rank))
    return Table(key="loss/highest_tokens", columns=COLUMNS, rows=tuple(rows))


def _proposed(batch: Losses) -> _Proposed:
    """A message without a proposal of its own is searched; contexts that do not fit its rows are left out."""
    num_contexts, places = len(batch.contexts), batch.highest
    if places.size:
        rows = np.flatnonzero((places >= 0) & (places < batch.losses.size))
        losses, targets, num_proposed = batch.losses[places[rows]], batch.target_ids[places[rows]], places.size
    elif batch.highest_losses.size and batch.highest_losses.shape == batch.highest_targets.shape:
        losses, targets, num_proposed = batch.highest_losses, batch.highest_targets, batch.highest_losses.size
        rows = np.arange(num_proposed)
    else:
        ranked = np.where(np.isfinite(batch.losses), batch.losses, -np.inf)
        rows = np.argsort(-ranked, kind="stable")[:MAX_HIGHEST_TOKENS]
        losses, targets, num_proposed = batch.losses[rows], batch.target_ids[rows], -1
    if num_contexts != num_proposed:
        rows = np.full(rows.size, -1)
    finite = np.isfinite(losses)
    if finite.all():
        return _Proposed(losses=losses, targets=targets, contexts=rows)
    return _Proposed(losses=losses[finite], targets=targets[finite], contexts=rows[finite])
