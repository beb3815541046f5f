"""How often magnitudes fall into the bins of a gradient histogram, on the host: exact, two magnitudes at a time."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from sidestep.protocol.limits import GRADIENT_HISTOGRAM_BINS, GRADIENT_HISTOGRAM_LOG10_RANGE

_LOW, _HIGH = GRADIENT_HISTOGRAM_LOG10_RANGE
_BINS_PER_DECADE = GRADIENT_HISTOGRAM_BINS / (_HIGH - _LOW)
_FIRST, _LAST = 1.0001 * 10.0**_LOW, 0.9999 * 10.0**_HIGH
"""Within the first and the last bin: what lies beyond counts as these."""
_SLOPE = -_BINS_PER_DECADE * math.log10(2.0)
_BELOW_ONE = np.float32(_SLOPE * (1.0 - 3e-7))
"""Times the base-2 logarithm of a magnitude below 1: bins that it lies under 1, a hair less, so that an edge counts
upwards."""
_FROM_LAST = np.float32(_SLOPE), np.float32(_BINS_PER_DECADE * _HIGH - 2e-6)
"""Times the logarithm of any magnitude, plus: bins that it lies under the last edge, a hair less."""
_ONE_THREADS = 32_768
"""For so few elements torch wakes no other threads, each of which would be waited for."""
_HIGHEST_BINS = int(-_BINS_PER_DECADE * _LOW) - 1, GRADIENT_HISTOGRAM_BINS - 1
"""The bins of code 0, by ``_BELOW_ONE`` and by ``_FROM_LAST``."""


def float32_bits(value: float) -> int:
    """Return a float32's representation as a whole number."""
    return int(np.float32(value).view(np.int32))


_FIRST_BITS, _LAST_BITS, _ONE_BITS = (float32_bits(value) for value in (_FIRST, _LAST, 1.0))


class MagnitudeCounter:
    """Counts blocks of magnitudes into one histogram after the other."""

    def __init__(self, most_elements: int) -> None:
        """Make room for blocks of at most so many elements."""
        self._codes = np.empty(most_elements, np.uint8)
        # By whether one of a block lies above 1: how often neighbours have each pair of codes, and codes without one.
        self._pairs = np.zeros((2, GRADIENT_HISTOGRAM_BINS * 256), np.int64)
        self._single = np.zeros((2, GRADIENT_HISTOGRAM_BINS), np.int64)

    def count(self, magnitudes: NDArray[np.float32], smallest: int, largest: int, zeros: int) -> None:
        """Count magnitudes [n], which are used up.

        Args:
            magnitudes: finite.
            smallest: the smallest of them, as ``float32_bits``.
            largest: the largest of them, likewise.
            zeros: how many are zero; they do not count.
        """
        size = magnitudes.size
        if smallest < _FIRST_BITS or largest > _LAST_BITS:
            for start in range(0, size, _ONE_THREADS):
                torch.from_numpy(magnitudes[start : start + _ONE_THREADS]).clamp_(_FIRST, _LAST)
        above_one = int(largest >= _ONE_BITS)
        _log2(magnitudes)
        codes = self._codes[:size]
        if above_one:
            np.multiply(magnitudes, _FROM_LAST[0], out=magnitudes)
            np.add(magnitudes, _FROM_LAST[1], out=codes, casting="unsafe")
        else:
            np.multiply(magnitudes, _BELOW_ONE, out=codes, casting="unsafe")
        # Two codes are one number of 16 bits: half as many to count, and seldom the same one twice in a row.
        pairs = codes[: size & ~1].view(np.int16)
        for start in range(0, pairs.size, _ONE_THREADS):
            counts = torch.bincount(torch.from_numpy(pairs[start : start + _ONE_THREADS])).numpy()
            self._pairs[above_one, : counts.size] += counts
        if size & 1:
            self._single[above_one, codes[-1]] += 1
        self._single[0, _HIGHEST_BINS[0]] -= zeros  # they have counted in the first bin

    def move_to(self, histogram: NDArray[np.int64]) -> None:
        """Add what has been counted since the last time to int64 [bins]."""
        for highest, pairs, single in zip(_HIGHEST_BINS, self._pairs, self._single, strict=True):
            table = pairs.reshape(GRADIENT_HISTOGRAM_BINS, 256)[:, :GRADIENT_HISTOGRAM_BINS]
            codes = table.sum(axis=1) + table.sum(axis=0) + single
            histogram[: highest + 1] += codes[highest::-1]
        self._pairs.fill(0)
        self._single.fill(0)


def _numpy_log2(magnitudes: NDArray[np.float32]) -> None:
    np.log2(magnitudes, out=magnitudes)


def _torch_log2(magnitudes: NDArray[np.float32]) -> None:
    torch.from_numpy(magnitudes).log2_()


def _fastest_log2() -> Callable[[NDArray[np.float32]], None]:
    """Return numpy's where it has vector code for it: elsewhere it takes 20 times as long, and torch's always has."""
    has_vectors = sys.platform == "linux" and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return _numpy_log2 if has_vectors else _torch_log2


_log2 = _fastest_log2()
