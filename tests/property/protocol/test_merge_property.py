"""Merges against one pass over all values, however they were split."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sidestep.protocol.merge import Moments, merge_counts, merge_moments, root_sum_of_squares

VALUES = arrays(np.float64, st.integers(0, 40), elements=st.floats(-1e3, 1e3, width=64))


@given(st.lists(VALUES, max_size=6))
def test_moments_do_not_depend_on_the_split(parts: list[np.ndarray]) -> None:
    whole = np.concatenate([*parts, np.zeros(0)])
    merged = merge_moments(Moments.from_values(part) for part in parts)
    assert merged.count == whole.size
    if whole.size == 0:
        assert merged.value_mean is merged.norm is merged.std is None
        return
    assert merged.value_mean == pytest.approx(whole.mean(), rel=1e-11, abs=1e-9)
    assert merged.norm == pytest.approx(np.linalg.norm(whole), rel=1e-11, abs=1e-9)
    if whole.size > 1:
        assert merged.std == pytest.approx(whole.std(ddof=1), rel=1e-9, abs=1e-9)
    else:
        assert merged.std is None


@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4, 1e6])
def test_the_std_stands_where_sums_of_squares_cancel(ratio: float) -> None:
    values = np.random.default_rng(0).normal(ratio, 1.0, 10_000)
    merged = merge_moments(Moments.from_values(part) for part in np.array_split(values, 7))
    assert merged.std == pytest.approx(values.std(ddof=1), rel=1e-9)


@pytest.mark.parametrize("exponent", [-600, -140, 0, 120, 600])
def test_scaled_moments_neither_overflow_nor_vanish(exponent: int) -> None:
    scaled = np.random.default_rng(1).normal(0.3, 1.0, 1_000)
    one, two = np.array_split(scaled, 2)
    plain = Moments.from_values(one), Moments.from_values(two)
    parts = [Moments.from_scaled(part.count, part.mean, part.m2, exponent) for part in plain]
    merged = merge_moments(parts)
    assert merged.std == pytest.approx(math.ldexp(scaled.std(ddof=1), exponent), rel=1e-12)
    assert merged.norm == pytest.approx(math.ldexp(float(np.linalg.norm(scaled)), exponent), rel=1e-12)


def test_parts_of_different_scale_merge_exactly() -> None:
    one, two = np.array([1e-20, -3e-20, 2e-20]), np.array([1e18, -2e18])
    parts = [
        Moments.from_scaled(3, float((one * 2.0**66).mean()), Moments.from_values(one * 2.0**66).m2, -66),
        Moments.from_scaled(2, float((two * 2.0**-60).mean()), Moments.from_values(two * 2.0**-60).m2, 60),
    ]
    merged = merge_moments(parts)
    assert merged.norm == pytest.approx(np.linalg.norm(np.concatenate([one, two])), rel=1e-12)
    assert merged.norm is not None
    assert merged.scaled_by(0.5).norm == pytest.approx(0.5 * merged.norm, rel=1e-12)


def test_norms_of_parts_give_the_norm_of_the_whole() -> None:
    assert root_sum_of_squares([3e200, 4e200]) == pytest.approx(5e200)
    assert root_sum_of_squares([]) == 0.0


@given(st.lists(st.dictionaries(st.integers(0, 9), st.integers(1, 5)), max_size=5))
def test_counts_add_up(parts: list[dict[int, int]]) -> None:
    ids, counts = merge_counts(
        [(np.array(list(part), np.int32), np.array(list(part.values()), np.int64)) for part in parts]
    )
    expected: dict[int, int] = {}
    for part in parts:
        for key, count in part.items():
            expected[key] = expected.get(key, 0) + count
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == expected
    assert ids.tolist() == sorted(expected)
