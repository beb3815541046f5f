"""What the ways of reducing gradients share: stretches of flat tensors, and the columns of the sums."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

ROW_ELEMENTS = 1024
"""Elements of a row; a tensor's last row is filled up with NaN, which is not counted."""

COLUMNS = 6
NOT_ZERO, FINITE_NOT_ZERO, SUM, WITHIN, BETWEEN, ABSMAX = range(COLUMNS)
"""Of the sums: two counts, of which the first one has the filling; the sum of the values; squares of their distances
from the means of the parts; those means' squares times their counts; the largest magnitude."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A stretch of a flattened gradient that begins a row."""

    slot: int
    """Its row in the sums."""
    module: int
    """Its row among the histograms."""
    values: Tensor
    """[n], n > 0."""

    @property
    def rows(self) -> int:
        """Rows that it fills, the last one perhaps in part."""
        return -(-self.values.shape[0] // ROW_ELEMENTS)

    def part(self, start: int, size: int) -> Piece:
        """Return ``size`` of its elements from ``start`` on."""
        return Piece(slot=self.slot, module=self.module, values=self.values.narrow(0, start, size))
