"""An exact bound for shares of few samples."""

from __future__ import annotations

import math
from typing import Final

LIKELY: Final = 0.01
"""Probability below which a share of few samples is not chance."""


def is_clearly_below(hits: int, total: int, share: float, *, likely: float = LIKELY) -> bool:
    """Whether so few ``hits`` among ``total`` would be unlikely if each were one with probability ``share``.

    The exact binomial tail P(X <= hits); False without a trial. A probability of 1 makes any other outcome unlikely.
    """
    if total <= 0 or share <= 0:
        return False
    if share >= 1:
        return hits < total
    logs = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)
        + k * math.log(share) + (total - k) * math.log1p(-share)
        for k in range(min(hits, total) + 1)
    ]  # fmt: skip
    return math.fsum(math.exp(each) for each in logs) <= likely
