"""Partial statistics of gradients in the host's memory, a block at a time.

A block goes through all passes while it lies in a core's cache; the operations are those of numpy that run at the
cache's speed on one thread, whatever the trainer's number of threads is. Sums of a few thousand values are float32, all
beyond is float64. All is float64 where float32 would not do (very large or very small values, or a mean far from zero),
where some values are not finite, and for small tensors, which are joined.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidestep.protocol.limits import GRADIENT_HISTOGRAM_BINS
from sidestep.trainer_hooks.reductions.gradient_magnitudes import MagnitudeCounter, float32_bits
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
BLOCK_ELEMENTS = 32 * SUMMED_ELEMENTS
"""A block and its magnitudes together take 1 MB."""
SMALL_ELEMENTS = SUMMED_ELEMENTS
"""Tensors of fewer are joined."""
_LEAST, _MOST, _NOT_FINITE = (float32_bits(value) for value in (2.0**-40, 2.0**50, np.inf))
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
    others: list[Piece] = []
    by_module: dict[int, tuple[list[Piece], list[Piece]]] = {}
    total = 0
    for piece in pieces:
        size = piece.values.shape[0]
        if not _has_memory(piece.values):
            others.append(piece)
            continue
        by_module.setdefault(piece.module, ([], []))[size >= SMALL_ELEMENTS].append(piece)
        total += size
    histograms = np.zeros((modules, GRADIENT_HISTOGRAM_BINS), np.int64)
    room = min(BLOCK_ELEMENTS, total)
    counter = MagnitudeCounter(room) if counts_magnitudes else None
    reader = _Reader(slots, room, counter)
    for module, (small, large) in by_module.items():
        for joined in _joined(small):
            reader.read_joined(joined)
        for piece in large:
            reader.read(piece)
        if counter is not None:
            counter.move_to(histograms[module])
    sums = reader.sums()
    made = torch.from_numpy(sums), torch.from_numpy(histograms)
    if others:  # in slots of their own
        by_rows = reduce_by_rows(HOST, others, slots, modules)
        made = made[0] + by_rows[0], made[1] + by_rows[1]
    return made


def _has_memory(values: Tensor) -> bool:
    """Tell whether a tensor's memory holds its values: not so of subclasses (fake, functional)."""
    return type(values) is Tensor and not values.is_neg()


def _float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float32 else values.to(torch.float32)


def _is_to_be_copied(values: Tensor) -> bool:
    """Tell whether values are not float32, or do not lie side by side."""
    return values.dtype != torch.float32 or values.stride(0) != 1


def _lengths_and_starts(sizes: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return how long stretches are that lie one after the other, and where they begin; int64 [n] each."""
    lengths = np.array(sizes, np.int64)
    return lengths, np.cumsum(lengths) - lengths


def _joined(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Gather small pieces into blocks."""
    block: list[Piece] = []
    room = BLOCK_ELEMENTS
    for piece in pieces:
        room -= piece.values.shape[0]
        if room < 0:
            yield block
            block, room = [], BLOCK_ELEMENTS - piece.values.shape[0]
        block.append(piece)
    if block:
        yield block


class _Block(NamedTuple):
    """A block that has been summed in float32."""

    piece: Piece
    start: int
    size: int
    zeros: int
    largest: int
    """As ``float32_bits``."""
    first_row: int


class _Reader:
    """Reads blocks, into memory of its own."""

    def __init__(self, slots: int, most_elements: int, counter: MagnitudeCounter | None) -> None:
        """Make room for blocks of at most so many elements; without a counter, magnitudes are not counted."""
        self._counter = counter
        self._sums = np.zeros((slots, COLUMNS))
        self._copied: NDArray[np.float32] | None = None
        self._magnitudes = np.empty(most_elements, np.float32)
        self._bits = self._magnitudes.view(np.int32)  # without a sign, the order of floats is that of their bits
        self._is_zero = np.empty(most_elements, np.bool_)
        self._ones = np.ones((SUMMED_ELEMENTS, 1), np.float32)
        self._blocks: list[_Block] = []
        self._totals: list[float] = []
        self._squares: list[float] = []

    def read(self, piece: Piece) -> None:
        """Read a piece in blocks of about the same size."""
        size = piece.values.shape[0]
        number = -(-size // BLOCK_ELEMENTS)
        step = -(-size // (number * SUMMED_ELEMENTS)) * SUMMED_ELEMENTS
        values = None if _is_to_be_copied(piece.values) else piece.values.numpy()
        for start in range(0, size, step):
            end = min(start + step, size)
            self._read_block(piece, start, self._copy(piece.values[start:end]) if values is None else values[start:end])

    def _copy(self, values: Tensor) -> NDArray[np.float32]:
        """Return values as float32, side by side, in memory that the next copy overwrites."""
        if self._copied is None:
            self._copied = np.empty_like(self._magnitudes)
        made = self._copied[: values.shape[0]]
        torch.from_numpy(made).copy_(values)
        return made

    def _read_block(self, piece: Piece, start: int, values: NDArray[np.float32]) -> None:
        size = values.size
        magnitudes, bits = self._magnitudes[:size], self._bits[:size]
        np.abs(values, out=magnitudes)
        largest = int(np.maximum.reduce(bits))
        if largest >= _NOT_FINITE:  # NaN is above all numbers
            self._read_broken(piece.slot, values)
            return
        smallest = int(np.minimum.reduce(bits))
        zeros = 0 if smallest else int(np.count_nonzero(np.equal(bits, 0, out=self._is_zero[:size])))
        if not largest or _LEAST <= largest <= _MOST:
            self._blocks.append(_Block(piece, start, size, zeros, largest, len(self._totals)))
            self._sum_rows(values)
        else:
            self._sum_wide([piece.slot], [size], values, [zeros], [largest])
        if self._counter is not None and zeros < size:
            self._counter.count(magnitudes, smallest, largest, zeros)

    def _read_broken(self, slot: int, values: NDArray[np.float32]) -> None:
        """Read a block some of whose values are not finite: the others of them, in a copy."""
        kept = values[np.isfinite(values)]
        self._sums[slot, NOT_ZERO] += values.size - kept.size + -values.size % ROW_ELEMENTS - -kept.size % ROW_ELEMENTS
        if kept.size:
            magnitudes = np.abs(kept)
            smallest, largest = (float32_bits(value) for value in (magnitudes.min(), magnitudes.max()))
            zeros = kept.size - int(np.count_nonzero(kept))
            self._sum_wide([slot], [kept.size], kept, [zeros], [largest])
            if self._counter is not None and zeros < kept.size:
                self._counter.count(magnitudes, smallest, largest, zeros)

    def _sum_rows(self, values: NDArray[np.float32]) -> None:
        """Add up values and squares, row by row: products of short vectors, which a BLAS has its best code for."""
        full, rest = divmod(values.size, SUMMED_ELEMENTS)
        if full:
            rows = values[: values.size - rest].reshape(full, 1, SUMMED_ELEMENTS)
            self._totals += np.matmul(rows, self._ones).ravel().tolist()
            self._squares += np.matmul(rows, rows.reshape(full, SUMMED_ELEMENTS, 1)).ravel().tolist()
        if rest:
            row = values[values.size - rest :]
            self._totals.append(float(np.dot(row, self._ones[:rest, 0])))
            self._squares.append(float(np.dot(row, row)))

    def _sum_wide(
        self,
        slots: Sequence[int],
        sizes: Sequence[int],
        values: NDArray[np.float32],
        zeros: Sequence[int],
        largest: Sequence[int],
    ) -> None:
        """Add up stretches that lie one after the other, and squared distances from their means, in float64."""
        lengths, starts = _lengths_and_starts(sizes)
        wide = values.astype(np.float64)
        totals = np.add.reduceat(wide, starts)
        wide -= np.repeat(totals / lengths, lengths)
        within = np.add.reduceat(np.square(wide, out=wide), starts)
        self._add(slots=slots, sizes=sizes, zeros=zeros, largest=largest, totals=totals, within=within)

    def read_joined(self, pieces: Sequence[Piece]) -> None:
        """Read small pieces of one module."""
        sizes = [piece.values.shape[0] for piece in pieces]
        _, starts = _lengths_and_starts(sizes)
        size = sum(sizes)
        values = np.concatenate([_float32(piece.values).numpy() for piece in pieces])
        magnitudes, bits = self._magnitudes[:size], self._bits[:size]
        np.abs(values, out=magnitudes)
        largest = np.maximum.reduceat(bits, starts)
        if largest.max() >= _NOT_FINITE:
            for piece, value in zip(pieces, largest, strict=True):
                self.read(piece) if value >= _NOT_FINITE else self.read_joined([piece])
            return
        zeros = np.add.reduceat(np.equal(bits, 0, out=self._is_zero[:size]), starts, dtype=np.int64)
        self._sum_wide([piece.slot for piece in pieces], sizes, values, zeros.tolist(), largest.tolist())
        num_zeros = int(zeros.sum())
        if self._counter is not None and num_zeros < size:
            smallest = int(np.minimum.reduce(bits))
            self._counter.count(magnitudes, smallest, int(largest.max()), num_zeros)

    def _add(
        self,
        *,
        slots: Sequence[int],
        sizes: Sequence[int],
        zeros: Sequence[int],
        largest: Sequence[int],
        totals: NDArray[np.float64],
        within: NDArray[np.float64],
    ) -> None:
        """Add what was found of some stretches to their slots."""
        lengths = np.array(sizes, np.int64)
        not_zero = lengths - zeros
        columns = np.zeros((len(slots), COLUMNS))
        columns[:, NOT_ZERO] = not_zero + -lengths % ROW_ELEMENTS
        columns[:, FINITE_NOT_ZERO] = not_zero
        columns[:, SUM], columns[:, WITHIN], columns[:, BETWEEN] = totals, within, totals * totals / lengths
        np.add.at(self._sums, slots, columns)
        np.maximum.at(self._sums[:, ABSMAX], slots, np.array(largest, np.int32).view(np.float32))

    def sums(self) -> NDArray[np.float64]:
        """Return float64 [slots, 6] of all that was read; to be called once."""
        if not self._blocks:
            return self._sums
        starts = [block.first_row for block in self._blocks]
        totals, squares = (np.add.reduceat(np.array(part), starts) for part in (self._totals, self._squares))
        between = totals * totals / np.array([block.size for block in self._blocks])
        is_spread = between <= 0.5 * squares  # else the difference of the two is less exact than they are
        spread = [block for block, is_in in zip(self._blocks, is_spread, strict=True) if is_in]
        self._add(
            slots=[block.piece.slot for block in spread],
            sizes=[block.size for block in spread],
            zeros=[block.zeros for block in spread],
            largest=[block.largest for block in spread],
            totals=totals[is_spread],
            within=(squares - between)[is_spread],
        )
        for block, is_in in zip(self._blocks, is_spread, strict=True):
            if not is_in:
                values = block.piece.values[block.start : block.start + block.size]
                here = self._copy(values) if _is_to_be_copied(values) else values.numpy()
                self._sum_wide([block.piece.slot], [block.size], here, [block.zeros], [block.largest])
        return self._sums
