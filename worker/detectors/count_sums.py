"""Counts of several steps added up, until they are enough to be judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sidestep.protocol.messages import Json
from sidestep.worker.step_record import StepRecord


class CountSums:
    """Sums of a few of a step's counts since the last reading."""

    def __init__(self, *names: str) -> None:
        """Add up these; the first is the one that there must be enough of."""
        self._names = names
        self._sums = [0] * len(names)

    def take(self, record: StepRecord, enough: int) -> list[int] | None:
        """Add a step in that knows all of them; return the sums once the first is ``enough``, and begin anew."""
        counts = [count for name in self._names if (count := record.count(name)) is not None]
        if len(counts) < len(self._names):
            return None
        self._sums = [total + count for total, count in zip(self._sums, counts, strict=True)]
        if self._sums[0] < enough:
            return None
        found = self._sums
        self.clear()
        return found

    def clear(self) -> None:
        """Begin anew."""
        self._sums = [0] * len(self._names)

    def state(self) -> Json:
        """Return the sums."""
        return list(self._sums)

    def restore(self, state: Sequence[Any]) -> None:
        """Take over sums; none of them: begin anew, as where an older version did not count these."""
        self._sums = [int(count) for count in state] or [0] * len(self._names)
