"""The table ``loss/highest_tokens``: which tokens cost most and what stood before them (docs/metrics.md)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sidestep.protocol.limits import MAX_HIGHEST_TOKENS
from sidestep.protocol.messages import Losses
from sidestep.worker.metrics.measurement import Table
from sidestep.worker.records import RunContext

COLUMNS = ("token", "context", "loss", "rank")


@dataclass(frozen=True, slots=True, kw_only=True)
class _HighToken:
    loss: float
    target: int
    context: tuple[int, ...]
    rank: int


def highest_tokens(batches: Sequence[tuple[int, Losses]], context: RunContext) -> Table | None:
    """Return the 32 tokens with the largest finite losses over all (rank, ``Losses``), largest first; None without one.

    Among equal losses the lower rank comes first, then the order within the message.
    """
    proposed = [token for rank, batch in batches for token in _proposed(rank, batch)]
    chosen = sorted(proposed, key=lambda token: -token.loss)[:MAX_HIGHEST_TOKENS]
    if not chosen:
        return None
    rows = tuple((context.text.token(t.target), context.text.text(t.context), t.loss, t.rank) for t in chosen)
    return Table(key="loss/highest_tokens", columns=COLUMNS, rows=rows)


def _proposed(rank: int, batch: Losses) -> Iterator[_HighToken]:
    """A message without a proposal of its own is searched; contexts that do not fit its rows are left out."""
    contexts = batch.contexts
    pairs: list[tuple[float, int] | None]
    if batch.highest.size:
        pairs = [_pair_at(batch, place) for place in batch.highest.tolist()]
    elif batch.highest_losses.size and batch.highest_losses.shape == batch.highest_targets.shape:
        pairs = list(zip(batch.highest_losses.tolist(), batch.highest_targets.tolist(), strict=True))
    else:
        ranked = np.where(np.isfinite(batch.losses), batch.losses, -np.inf)
        order = np.argsort(-ranked, kind="stable")[:MAX_HIGHEST_TOKENS]
        pairs = [_pair_at(batch, place) for place in order.tolist()]
        contexts = contexts[:0]
    has_contexts = len(contexts) == len(pairs)
    for place, pair in enumerate(pairs):
        if pair is not None and math.isfinite(pair[0]):
            before = tuple(i for i in contexts[place].tolist() if i >= 0) if has_contexts else ()
            yield _HighToken(loss=pair[0], target=pair[1], context=before, rank=rank)


def _pair_at(batch: Losses, place: int) -> tuple[float, int] | None:
    return (float(batch.losses[place]), int(batch.target_ids[place])) if 0 <= place < batch.losses.size else None
