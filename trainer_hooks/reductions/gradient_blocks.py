"""Partial statistics of gradients in the host's memory, a block at a time.

A block goes through all passes while it lies in a core's cache; the operations are those of numpy that run at the
cache's speed on one thread, whatever the trainer's number of threads is. Sums of a few thousand values are float32, all
beyond is float64. What this way cannot do (values that are not finite, very large, very small, or far from zero
compared with how they differ) is left to the operations of ``gradient_rows.py``, and small tensors are too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidestep.protocol.limits import GRADIENT_HISTOGRAM_BINS
from sidestep.trainer_hooks.reductions.gradient_magnitudes import MagnitudeCounter
from sidestep.trainer_hooks.reductions.gradient_pieces import (
    ABSMAX,
    BETWEEN,
    COLUMNS,
    FINITE_NOT_ZERO,
    NOT_ZERO,
    ROW_ELEMENTS,
    SUM,
    WITHIN,
    Piece,
)
from sidestep.trainer_hooks.reductions.gradient_rows import reduce_by_rows

HOST = torch.device("cpu")
SUMMED_ELEMENTS = 4096
"""Summed in float32; so few are also summed by one thread, since no BLAS would start others for them."""
BLOCK_ELEMENTS = 24 * SUMMED_ELEMENTS
"""A block and its magnitudes together take 0.8 MB."""
LEAST_ELEMENTS = 8192
"""Of a tensor that is read in blocks."""
LEAST, MOST = 2.0**-40, 2.0**50
"""The largest magnitudes of a block whose squares neither vanish nor overflow."""


def reduce_on_host(
    pieces: Sequence[Piece], slots: int, modules: int, *, counts_magnitudes: bool = True
) -> tuple[Tensor, Tensor]:
    """Reduce what lies in the host's memory.

    Args:
        pieces: whole flat tensors; any sizes but 0, any mix of dtypes.
        slots: rows of the sums.
        modules: rows of the histograms.
        counts_magnitudes: whether blocks add to the histograms; a benchmark measures them without.

    Returns:
        float64 [slots, 6] and int64 [modules, bins]; the same bits for the same gradients.
    """
    large = [piece for piece in pieces if _is_read_in_blocks(piece.values)]
    if not large:
        return reduce_by_rows(HOST, pieces, slots, modules)
    left = [piece for piece in pieces if not _is_read_in_blocks(piece.values)]
    histograms = np.zeros((modules, GRADIENT_HISTOGRAM_BINS), np.int64)
    room = min(BLOCK_ELEMENTS, max(piece.values.shape[0] for piece in large))
    counter = MagnitudeCounter(room) if counts_magnitudes else None
    reader = _Reader(room, sum(-(-piece.values.shape[0] // SUMMED_ELEMENTS) for piece in large), counter)
    for module, blocks in groupby(_blocks(large), key=lambda block: block.module):
        left += [block for block in blocks if not reader.read(block)]
        if counter is not None:
            counter.move_to(histograms[module])
    sums, again = reader.sums(slots)
    if left or again:
        # Magnitudes of what is summed again have been counted: this time they go to a histogram that nobody reads.
        left += [Piece(slot=block.slot, module=modules, values=block.values) for block in again]
        by_rows, counts = (part.numpy() for part in reduce_by_rows(HOST, left, slots, modules + 1))
        largest = np.maximum(sums[:, ABSMAX], by_rows[:, ABSMAX])
        sums += by_rows
        sums[:, ABSMAX] = largest
        histograms += counts[:modules]
    return torch.from_numpy(sums), torch.from_numpy(histograms)


def _is_read_in_blocks(values: Tensor) -> bool:
    # Subclasses (fake, functional) have no memory to look at.
    return values.shape[0] >= LEAST_ELEMENTS and type(values) is Tensor and not values.is_neg()


def _blocks(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Cut pieces into blocks of about the same size, module by module."""
    for piece in sorted(pieces, key=lambda piece: piece.module):
        size = piece.values.shape[0]
        number = -(-size // BLOCK_ELEMENTS)
        step = -(-size // (number * SUMMED_ELEMENTS)) * SUMMED_ELEMENTS
        for start in range(0, size, step):
            yield piece if number == 1 else piece.part(start, min(step, size - start))


class _Block(NamedTuple):
    """What is known of a block besides its sums."""

    piece: Piece
    first_row: int
    zeros: int
    largest: float


class _Reader:
    """Reads blocks, into memory of its own."""

    def __init__(self, most_elements: int, most_rows: int, counter: MagnitudeCounter | None) -> None:
        """Make room for blocks of at most so many elements, and for the sums of so many rows in all of them."""
        self._counter = counter
        self._blocks: list[_Block] = []
        self._copied: Tensor | None = None
        self._magnitudes = np.empty(most_elements, np.float32)
        self._is_zero = np.empty(most_elements, np.bool_)
        self._ones = np.ones((SUMMED_ELEMENTS, 1), np.float32)
        self._totals, self._squares = (np.empty((most_rows, 1, 1), np.float32) for _ in range(2))
        self._num_rows = 0

    def read(self, block: Piece) -> bool:
        """Read a block; False where it has to go by rows."""
        size = block.values.shape[0]
        values = self._float32(block.values)
        magnitudes = np.abs(values, out=self._magnitudes[:size])
        # Without a sign, the order of floats is that of their bits: NaN is above all, and no pass looks for it.
        bits = magnitudes.view(np.int32)
        largest = np.maximum.reduce(bits).view(np.float32)
        if largest != 0.0 and not LEAST <= largest <= MOST:
            return False
        smallest = np.minimum.reduce(bits).view(np.float32)
        zeros = 0
        if smallest == 0.0:
            zeros = int(np.count_nonzero(np.equal(bits, 0, out=self._is_zero[:size])))
        self._blocks.append(_Block(block, self._num_rows, zeros, float(largest)))
        self._sum(values)
        if self._counter is not None and zeros < size:
            self._counter.count(magnitudes, float(smallest), float(largest), zeros)
        return True

    def _float32(self, values: Tensor) -> NDArray[np.float32]:
        """Return the values themselves where they are float32 and lie side by side, else a copy."""
        if values.dtype != torch.float32 or values.stride(0) != 1:
            if self._copied is None:
                self._copied = torch.empty(self._magnitudes.size, dtype=torch.float32)
            values = self._copied[: values.shape[0]].copy_(values)
        made: NDArray[np.float32] = values.numpy()
        return made

    def _sum(self, values: NDArray[np.float32]) -> None:
        """Add up values and squares, row by row: products of short vectors, which a BLAS has its best code for."""
        first, full = self._num_rows, values.size // SUMMED_ELEMENTS
        last = first + full
        rows = values[: full * SUMMED_ELEMENTS].reshape(full, 1, SUMMED_ELEMENTS)
        np.matmul(rows, self._ones, out=self._totals[first:last])
        np.matmul(rows, rows.reshape(full, SUMMED_ELEMENTS, 1), out=self._squares[first:last])
        rest = values[full * SUMMED_ELEMENTS :]
        if rest.size:
            self._totals[last] = np.dot(rest, self._ones[: rest.size, 0])
            self._squares[last] = np.dot(rest, rest)
            last += 1
        self._num_rows = last

    def sums(self, slots: int) -> tuple[NDArray[np.float64], list[Piece]]:
        """Return float64 [slots, 6], and the blocks that are missing there: their means are too far from zero."""
        made = np.zeros((slots, COLUMNS))
        if not self._blocks:
            return made, []
        starts = np.array([block.first_row for block in self._blocks])
        totals, squares = (
            np.add.reduceat(part[: self._num_rows, 0, 0].astype(np.float64), starts)
            for part in (self._totals, self._squares)
        )
        sizes = np.array([block.piece.values.shape[0] for block in self._blocks])
        zeros = np.array([block.zeros for block in self._blocks])
        largest = np.array([block.largest for block in self._blocks])
        between = totals * totals / sizes
        is_spread = between <= 0.5 * squares
        columns: dict[int, NDArray[Any]] = {
            NOT_ZERO: sizes - zeros + -sizes % ROW_ELEMENTS,
            FINITE_NOT_ZERO: sizes - zeros,
            SUM: totals,
            WITHIN: squares - between,
            BETWEEN: between,
        }
        owners = np.array([block.piece.slot for block in self._blocks])[is_spread]
        for column, values in columns.items():
            np.add.at(made[:, column], owners, values[is_spread])
        np.maximum.at(made[:, ABSMAX], owners, largest[is_spread])
        return made, [block.piece for block, is_in in zip(self._blocks, is_spread, strict=True) if not is_in]
