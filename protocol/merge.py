"""Exact merges of partial statistics over micro-batches, shards and ranks, in float64.

Moments are merged by the pairwise rule of Chan, Golub and LeVeque (1983): sums of squares alone cancel
(docs/metrics.md, "Numerics"). Counts are integers and merge exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations from the mean (M2) of some values, scaled.

    The exponent keeps squares of very small and very large values inside float64: the values' mean is
    ``mean * 2**exponent``, the sum of their squared deviations ``m2 * 4**exponent``.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    exponent: int = 0

    @classmethod
    def from_values(cls, values: NDArray[Any]) -> Moments:
        """Return the moments of ``values`` (finite, any shape), computed in float64 in two passes."""
        if values.size == 0:
            return cls()
        wide = values.astype(np.float64, copy=False)
        mean = float(wide.mean())
        return cls(int(values.size), mean, float(np.square(wide - mean).sum()))

    @classmethod
    def from_scaled(cls, count: int, mean: float, m2: float, exponent: int) -> Moments:
        """Return the moments whose scaled form is given (``messages.Gradients``)."""
        return cls(int(count), float(mean), float(m2), int(exponent)) if count else cls()

    def at(self, exponent: int) -> Moments:
        """Return the same moments written with another exponent."""
        shift = self.exponent - exponent
        return Moments(self.count, math.ldexp(self.mean, shift), math.ldexp(self.m2, 2 * shift), exponent)

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of values together."""
        if not self.count or not other.count:
            return self if self.count else other
        exponent = max(self.exponent, other.exponent)
        a, b = self.at(exponent), other.at(exponent)
        count = a.count + b.count
        delta = b.mean - a.mean
        mean = a.mean + delta * (b.count / count)
        return Moments(count, mean, a.m2 + b.m2 + delta * delta * (a.count * (b.count / count)), exponent)

    def scaled_by(self, factor: float) -> Moments:
        """Return the moments of the values times ``factor``."""
        return Moments(self.count, self.mean * factor, self.m2 * factor * factor, self.exponent)

    @property
    def value_mean(self) -> float | None:
        """Mean of the values; None without one."""
        return _ldexp(self.mean, self.exponent) if self.count else None

    @property
    def std(self) -> float | None:
        """Standard deviation with n - 1; None below two values."""
        if self.count < 2:
            return None
        return _ldexp(math.sqrt(max(self.m2, 0.0) / (self.count - 1)), self.exponent)

    @property
    def norm(self) -> float | None:
        """L2 norm of the values; None without one."""
        if not self.count:
            return None
        return _ldexp(math.sqrt(max(self.m2, 0.0) + self.count * self.mean * self.mean), self.exponent)


def _ldexp(value: float, exponent: int) -> float:
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.inf


def merge_moments(parts: Iterable[Moments]) -> Moments:
    """Return the moments of all ``parts`` together, merged in the order given."""
    merged = Moments()
    for part in parts:
        merged = merged.merge(part)
    return merged


def root_sum_of_squares(norms: Iterable[float]) -> float:
    """Return the L2 norm of parts from their norms, without over- or underflow."""
    return math.hypot(*norms)


def merge_counts(parts: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return distinct ids, ascending, and the sum of their counts over ``parts`` of (ids [n], counts [n])."""
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    ids = np.concatenate([part[0] for part in parts]).astype(np.int64)
    counts = np.concatenate([part[1] for part in parts]).astype(np.int64)
    distinct, places = np.unique(ids, return_inverse=True)
    summed = np.zeros(len(distinct), np.int64)
    np.add.at(summed, places, counts)
    return distinct, summed
