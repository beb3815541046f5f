"""The epoch's answers, counted once each (docs/metrics.md, ``data/``).

Where a trainer goes back, the projection returns to the counts that stood before the first repeated step
(worker/rewinding.py); here it is only seen to that nothing of a repeated step comes in late.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final, cast

from sidestep.protocol.messages import Json

MAX_EPOCHS: Final = 3
"""Newest epochs that are kept: late answers may belong to the one before."""


class AnswerCounts:
    """Counts per length, per epoch; ``state()`` is all of it."""

    def __init__(self) -> None:
        self.batches_without_labels = 0
        """Micro-batches so far without one labelled position, over all attempts: a finding is not taken back."""
        self._totals: dict[int, Counter[int]] = {}
        self._starts: dict[int, int] = {}  # attempt to its first step
        self._current_epoch: int | None = None
        self._ended: list[int] = []

    def begin(self, attempt: int, step: int) -> bool:
        """Start an attempt at its first step; returns whether it is newer than all that were started before.

        One that is not changes nothing.
        """
        is_new = not self._starts or attempt > max(self._starts)
        if is_new:
            self._starts[attempt] = step
        return is_new

    def add(self, *, attempt: int, step: int, epoch: int, lengths: Mapping[int, int]) -> None:
        """Count the answers of one step of one rank, unless a later attempt repeats that step."""
        if any(step >= start for later, start in self._starts.items() if later > attempt):
            return
        if self._current_epoch is not None and epoch > self._current_epoch:
            self._ended.append(self._current_epoch)
        self._current_epoch = epoch if self._current_epoch is None else max(epoch, self._current_epoch)
        self._totals.setdefault(epoch, Counter()).update(lengths)
        for old in sorted(self._totals)[:-MAX_EPOCHS]:
            del self._totals[old]

    def lengths(self, epoch: int) -> Mapping[int, int]:
        """Return length to count of an epoch so far; empty where nothing was counted."""
        return self._totals.get(epoch, {})

    def take_ended(self, epoch: int) -> list[int]:
        """Return the epochs before ``epoch`` that ended since the last call."""
        ended, self._ended = sorted({e for e in self._ended if e < epoch}), []
        return ended

    def state(self) -> Json:
        """Return all of it as a plain map, for ``restore``."""
        return {
            "batches_without_labels": self.batches_without_labels,
            "totals": _as_table(self._totals),
            "starts": [list(pair) for pair in sorted(self._starts.items())],
            "current_epoch": self._current_epoch,
            "ended": self._ended,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state; raises KeyError, TypeError or ValueError where it is none."""
        self.batches_without_labels = int(state["batches_without_labels"])
        self._totals = _from_table(state["totals"])
        self._starts = {int(attempt): int(step) for attempt, step in _pairs(state["starts"])}
        self._current_epoch = cast("int | None", state["current_epoch"])
        self._ended = [int(epoch) for epoch in state["ended"]]


def _as_table(totals: Mapping[int, Mapping[int, int]]) -> Json:
    """Pairs, not maps: a table's keys are small natural numbers, and an epoch may be anything."""
    return [[epoch, [list(pair) for pair in sorted(counts.items())]] for epoch, counts in sorted(totals.items())]


def _pairs(table: Any) -> Iterable[tuple[Any, Any]]:
    """Return the pairs of a table; version 2 of a projection's state has maps."""
    return table.items() if isinstance(table, Mapping) else table


def _from_table(table: Any) -> dict[int, Counter[int]]:
    return {int(epoch): Counter({int(n): int(c) for n, c in _pairs(counts)}) for epoch, counts in _pairs(table)}
