"""Loops in sequences of ids: an exact one at the end, and one that is nearly so.

Both speak of ids, never of characters: whitespace and compression mislead in other languages
(docs/detection.md). Tables and lists repeat on purpose: compare with the same score of the targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

MAX_PERIOD: Final = 64
"""Longest period of a loop in tokens (measured: periods 1 to 64)."""
MIN_COPIES: Final = 3
MIN_TOKENS: Final = 12
"""Tokens that a loop must cover: bytes of one character may repeat three times by themselves."""
SOFT_WINDOW: Final = 128
"""Last tokens over which matches are counted."""
SOFT_SHARE: Final = 0.75
"""Share of matches from which a sequence repeats itself nearly (measured: recall 100 % at 5 % noise)."""
MIN_COMPARED: Final = 24


def suffix_loop(
    ids: Sequence[int], *, max_period: int = MAX_PERIOD, min_copies: int = MIN_COPIES, min_tokens: int = MIN_TOKENS
) -> int:
    """Return the shortest period of the loop that ``ids`` end in; 0 where they end in none.

    A loop is ``min_copies`` whole copies of the same ``period`` tokens in a row, at the end, of ``min_tokens`` in all.
    """
    values = np.asarray(ids, np.int64)
    for period in range(1, min(max_period, values.size // min_copies) + 1):
        need = max(min_copies * period, -(-min_tokens // period) * period)
        if need <= values.size and (values[-need:-period] == values[-need + period :]).all():
            return period
    return 0


def soft_period(ids: Sequence[int], *, window: int = SOFT_WINDOW, max_period: int = MAX_PERIOD) -> float:
    """Return the largest share of the last ``window`` tokens that equal the token some period before; 0.0 if too short.

    Periods are at most ``max_period``, and at least ``MIN_COMPARED`` tokens must have one before them.
    """
    values = np.asarray(ids, np.int64)
    best = 0.0
    for period in range(1, max_period + 1):
        compared = min(window, values.size - period)
        if compared < max(MIN_COMPARED, period):
            break
        best = max(best, float((values[-compared:] == values[-compared - period : values.size - period]).mean()))
    return best


def is_looping(ids: Sequence[int]) -> bool:
    """Whether ``ids`` end in an exact loop."""
    return suffix_loop(ids) > 0


def is_nearly_looping(ids: Sequence[int]) -> bool:
    """Whether ``ids`` repeat themselves over their last tokens, noise and counters let through."""
    return soft_period(ids) >= SOFT_SHARE
