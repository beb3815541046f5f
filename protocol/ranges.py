"""Sets of sequence numbers as few inclusive ranges: what the journal holds of one (incarnation, rank)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.limits import MAX_RANGES


class RangeSet:
    """A set of integers, kept as sorted, disjoint, non-adjacent inclusive ranges.

    Adding in order is O(1); membership is O(log ranges).
    """

    __slots__ = ("_firsts", "_lasts")

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        """Start with ``numbers``."""
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        for number in numbers:
            self.add(number)

    @classmethod
    def from_ranges(cls, ranges: NDArray[np.int64]) -> RangeSet:
        """Return the set of the inclusive ranges [n, 2], in whatever order.

        Raises:
            ValueError: a range ends before it begins, or they are more than ``MAX_RANGES``.
        """
        if len(ranges) > MAX_RANGES:
            raise ValueError(f"{len(ranges)} ranges, more than {MAX_RANGES}")
        made = cls()
        if len(ranges) > 1 and (ranges[1:, 0] < ranges[:-1, 0]).any():  # inserted in order, each costs the same
            ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
        for first, last in ranges.tolist():
            made.add_range(first, last)
        return made

    def add(self, number: int) -> bool:
        """Add ``number``; return False where it was there already."""
        lasts = self._lasts
        if lasts and number == lasts[-1] + 1:
            lasts[-1] = number
            return True
        if number in self:
            return False
        self.add_range(number, number)
        return True

    def add_all(self, numbers: Sequence[int]) -> None:
        """Add numbers of which none is there twice, in whatever order; those in a row cost as one."""
        first, last = min(numbers), max(numbers)
        if last - first + 1 == len(numbers):
            self.add_range(first, last)
            return
        for number in numbers:
            self.add(number)

    def add_range(self, first: int, last: int) -> None:
        """Add every number from ``first`` to ``last``, both included.

        Raises:
            ValueError: ``last`` is below ``first``.
        """
        if last < first:
            raise ValueError(f"the range {first}..{last} ends before it begins")
        if self._lasts and first == self._lasts[-1] + 1:
            self._lasts[-1] = last
            return
        if not self._lasts or first > self._lasts[-1]:
            self._firsts.append(first)
            self._lasts.append(last)
            return
        low = bisect_right(self._lasts, first - 2)
        high = bisect_right(self._firsts, last + 1)
        if low < high:
            first, last = min(first, self._firsts[low]), max(last, self._lasts[high - 1])
        self._firsts[low:high] = [first]
        self._lasts[low:high] = [last]

    def __contains__(self, number: int) -> bool:
        """Return whether ``number`` is in the set."""
        at = bisect_right(self._firsts, number) - 1
        return at >= 0 and number <= self._lasts[at]

    def covers(self, first: int, last: int) -> bool:
        """Return whether every number from ``first`` to ``last`` is in the set."""
        at = bisect_right(self._firsts, first) - 1
        return last < first or (at >= 0 and last <= self._lasts[at])

    def ranges(self) -> NDArray[np.int64]:
        """Return the inclusive ranges, ascending [n, 2]."""
        return np.array([self._firsts, self._lasts], np.int64).T.copy()

    @property
    def num_ranges(self) -> int:
        """How many ranges it takes."""
        return len(self._firsts)

    @property
    def newest(self) -> int | None:
        """The highest number, None for none."""
        return self._lasts[-1] if self._lasts else None

    def __len__(self) -> int:
        """Return how many numbers are in the set."""
        return sum(last - first + 1 for first, last in zip(self._firsts, self._lasts, strict=True))

    def __iter__(self) -> Iterator[int]:
        """Yield every number, ascending."""
        for first, last in zip(self._firsts, self._lasts, strict=True):
            yield from range(first, last + 1)

    def __eq__(self, other: object) -> bool:
        """Return whether both hold the same numbers."""
        return isinstance(other, RangeSet) and (self._firsts, self._lasts) == (other._firsts, other._lasts)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Return the ranges, readable."""
        return f"RangeSet({', '.join(f'{a}..{b}' for a, b in zip(self._firsts, self._lasts, strict=True))})"
