"""Running statistics of one number a step, robust against the very thing that they are to find.

References are updated with clipped values (ZClip, arXiv 2504.02507: an outlier moves them as far as a large ordinary
value would), so that a failure does not become its own normal. All states are short lists of numbers; what is kept in
memory is what is saved, bit for bit.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, Final

from sidestep.protocol.messages import Json

MAD_TO_SD: Final = 1.4826
"""Standard deviations in a median absolute deviation of a normal distribution."""


SUSPECT_CLIP: Final = 6.0
"""Largest z-score that one step adds to a suspicion."""
FIRST: Final = 3.0
"""How much faster than their mean the first values are forgotten: a run's first steps, in which everything falls, must
not stand for its noise (real logs: 0 false alarms in 184,576 steps with 2, 3 and 4)."""


class RunningMoments:
    """Exponentially weighted mean and standard deviation; before there are many values, the last third counts.

    Args:
        rate: weight of the newest value once there are ``FIRST / rate`` of them.
        floor: smallest standard deviation, in the value's unit: noise below it is nobody's concern.
        clip: standard deviations that one value may move the statistics by.
    """

    def __init__(self, *, rate: float, floor: float, clip: float = 3.0) -> None:
        self.rate, self.floor, self.clip = rate, floor, clip
        self.count = 0
        self.mean = 0.0
        self.variance = 0.0

    @property
    def deviation(self) -> float:
        """Standard deviation, at least the floor."""
        return max(math.sqrt(max(self.variance, 0.0)), self.floor)

    def z(self, value: float, widen: float = 1.0) -> float:
        """Return by how many standard deviations, each ``widen`` times as wide, ``value`` is above the mean."""
        return (value - self.mean) / (self.deviation * widen)

    def update(self, value: float, widen: float = 1.0) -> None:
        """Take ``value`` in, clipped once there are a few."""
        if self.count >= 8:
            reach = self.clip * self.deviation * widen
            value = min(max(value, self.mean - reach), self.mean + reach)
        self.count += 1
        rate = max(self.rate, min(1.0, FIRST / (self.count + FIRST - 1.0)))
        delta = value - self.mean
        self.mean += rate * delta
        self.variance = (1.0 - rate) * (self.variance + rate * delta * delta / (widen * widen))

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        return [self.count, self.mean, self.variance]

    def restore(self, state: Sequence[Any]) -> None:
        """Take over a state."""
        count, mean, variance = state
        self.count, self.mean, self.variance = int(count), float(mean), float(variance)


class Cusum:
    """One-sided cumulative sum of z-scores over an allowance (Page 1954): slow rises add up, single ones do not.

    Args:
        allowance: k, standard deviations a step that are free.
        limit: h, the sum from which it is beyond; kept below ``3 * limit`` so that it comes down again.
        clip: largest z-score that one step adds.
    """

    def __init__(self, *, allowance: float, limit: float, clip: float = 6.0) -> None:
        self.allowance, self.limit, self.clip = allowance, limit, clip
        self.total = 0.0
        self._suspicion = 0.0  # the same sum, clipped at SUSPECT_CLIP: one step may be enough to suspect

    def add(self, z: float) -> float:
        """Take a step's z-score in; returns the sum."""
        self.total = self._moved(self.total, min(z, self.clip))
        self._suspicion = self._moved(self._suspicion, min(z, SUSPECT_CLIP))
        return self.total

    def _moved(self, total: float, z: float) -> float:
        return min(max(0.0, total + z - self.allowance), 3.0 * self.limit)

    @property
    def is_beyond(self) -> bool:
        """Whether the sum is over the limit."""
        return self.total > self.limit

    @property
    def is_suspicious(self) -> bool:
        """Whether it may come to that: references are not to learn from what is under suspicion."""
        return self._suspicion > self.limit / 2

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        return [self.total, self._suspicion]

    def restore(self, state: Any) -> None:
        """Take over a state; a number alone is one from before suspicions had a sum of their own."""
        self.total, self._suspicion = map(float, state if isinstance(state, Sequence) else (state, state))


class Window:
    """The last values, in their order and sorted, for medians: a step moves one value, and nothing is sorted anew."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: list[float] = []
        self._ordered: list[float] = []

    def __len__(self) -> int:
        """Return how many values there are."""
        return len(self._values)

    @property
    def values(self) -> list[float]:
        """A copy of the last values, oldest first."""
        return list(self._values)

    @values.setter
    def values(self, values: list[float]) -> None:
        self._values = values
        self._ordered = sorted(values)

    def add(self, value: float) -> None:
        """Take a value in, unless it is none; the oldest one goes."""
        if math.isnan(value):
            return
        self._values.append(value)
        insort(self._ordered, value)
        if len(self._values) > self.size:
            oldest = self._values.pop(0)
            del self._ordered[bisect_left(self._ordered, oldest)]

    def median(self) -> float:
        """Return the median of at least one value."""
        return _middle(self._ordered)

    def largest(self) -> float:
        """Return the largest of at least one value."""
        return self._ordered[-1]

    def robust_z(self, value: float, floor: float) -> float | None:
        """Return the deviation from the median in robust standard deviations; None below 16 values."""
        ordered = self._ordered
        if len(ordered) < 16:
            return None
        middle = _middle(ordered)
        spread = MAD_TO_SD * _median_distance(ordered, middle)
        return (value - middle) / max(spread, floor)


class Freeze:
    """Whether references stand still: while something is suspicious, but not for ever."""

    def __init__(self, limit_steps: int) -> None:
        self.limit_steps = limit_steps
        self.steps = 0

    def holds(self, *, is_suspicious: bool) -> bool:
        """Take a step in; returns whether references stand still at it."""
        self.steps = self.steps + 1 if is_suspicious else 0
        return 0 < self.steps <= self.limit_steps


def median(values: Sequence[float]) -> float:
    """Return the median of at least one value."""
    return _middle(sorted(values))


def _median_distance(ordered: Sequence[float], middle: float) -> float:
    """Return the median of the distances of at least two ascending values from ``middle``, which is among them.

    The nearest values stand in a row: where that row begins is found by bisection, and no distance is sorted.
    """
    number = (len(ordered) + 1) // 2
    low, high = 0, len(ordered) - number
    while low < high:
        first = (low + high) // 2
        if middle - ordered[first] > ordered[first + number] - middle:
            low = first + 1
        else:
            high = first
    farthest = max(middle - ordered[low], ordered[low + number - 1] - middle)
    if len(ordered) % 2:
        return farthest
    left = middle - ordered[low - 1] if low else math.inf
    right = ordered[low + number] - middle if low + number < len(ordered) else math.inf
    return (farthest + min(left, right)) / 2


def _middle(ordered: Sequence[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
