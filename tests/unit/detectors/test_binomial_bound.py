from __future__ import annotations

from math import comb

import pytest

from sidestep.worker.detectors.binomial import is_clearly_below


@pytest.mark.parametrize(
    ("hits", "total", "share"), [(6, 16, 0.7), (8, 16, 0.7), (0, 2, 0.7), (0, 4, 0.7), (21, 32, 0.7)]
)
def test_the_bound_is_the_exact_tail(hits: int, total: int, share: float) -> None:
    tail = sum(comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(hits + 1))
    assert is_clearly_below(hits, total, share) == (tail <= 0.01)
    assert is_clearly_below(hits, total, share, likely=tail * 1.001)
    assert not is_clearly_below(hits, total, share, likely=tail * 0.999)


def test_its_edges() -> None:
    assert not is_clearly_below(0, 0, 0.5)
    assert not is_clearly_below(0, 10, 0.0)
    assert is_clearly_below(9, 10, 1.0)
    assert not is_clearly_below(10, 10, 1.0)
    assert not is_clearly_below(10, 10, 0.5), "all of them is not below"
