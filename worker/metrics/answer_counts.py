"""The epoch's answers, counted once each, with a memory of the last steps so that a rollback can take them off again.

A trainer that resumes at an earlier step repeats steps; what the rolled-back attempt counted at and after the first
repeated step is taken off (docs/metrics.md, ``data/``). The counts of the last steps are kept one by one, within
``MAX_LOG_BYTES``; of older ones only a few totals are kept, and a rollback beyond the log falls back on the nearest of
them and says so.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from typing import Any, Final, cast

from sidestep.protocol.messages import Json
from sidestep.protocol.tables import decode_table, encode_table

MAX_LOG_BYTES: Final = 96 << 10
"""Memory for the counts of the last steps: some 2,000 steps of a batch of short answers."""

MAX_TOTALS: Final = 16
"""Totals kept of steps before the log."""

FIRST_STRIDE: Final = 64
"""Steps between two of them at first; doubled whenever there are too many."""

MAX_EPOCHS: Final = 3
"""Newest epochs that are kept: a rollback may go back over an epoch's start."""


class AnswerCounts:
    """Counts per length, per epoch; ``state()`` is all of it."""

    def __init__(self) -> None:
        self.batches_without_labels = 0
        """Micro-batches so far without one labelled position, over all attempts: a finding is not taken back."""
        self._totals: dict[int, Counter[int]] = {}
        self._log: deque[tuple[int, int, bytes]] = deque()  # step, epoch, packed lengths to counts; in order of arrival
        self._log_bytes = 0
        self._folded_step = -1  # the newest step that is no longer in the log
        self._older: list[tuple[int, bytes]] = []  # step, packed totals up to and with it
        self._older_stride = FIRST_STRIDE
        self._num_folded = 0
        self._starts: dict[int, int] = {}  # attempt to its first step
        self._current_epoch: int | None = None
        self._ended: list[int] = []

    def begin(self, attempt: int, step: int) -> bool:
        """Start an attempt at its first step; returns False where older counts could not be restored exactly.

        An attempt that is known, or older than the newest, changes nothing.
        """
        if self._starts and attempt <= max(self._starts):
            return True
        is_first = not self._starts
        self._starts[attempt] = step
        return True if is_first else self._roll_back(step)

    def add(self, *, attempt: int, step: int, epoch: int, lengths: Mapping[int, int]) -> None:
        """Count the answers of one step of one rank, unless a later attempt repeats that step."""
        if any(step >= start for later, start in self._starts.items() if later > attempt):
            return
        if self._current_epoch is not None and epoch > self._current_epoch:
            self._ended.append(self._current_epoch)
        self._current_epoch = epoch if self._current_epoch is None else max(epoch, self._current_epoch)
        self._totals.setdefault(epoch, Counter()).update(lengths)
        packed = encode_table({length: count for length, count in sorted(lengths.items()) if count})
        self._log.append((step, epoch, packed))
        self._log_bytes += len(packed)
        while self._log_bytes > MAX_LOG_BYTES:
            self._fold()
        for old in sorted(self._totals)[:-MAX_EPOCHS]:
            del self._totals[old]

    def lengths(self, epoch: int) -> Mapping[int, int]:
        """Return length to count of an epoch so far; empty where nothing was counted."""
        return self._totals.get(epoch, {})

    def take_ended(self, epoch: int) -> list[int]:
        """Return the epochs before ``epoch`` that ended since the last call."""
        ended, self._ended = sorted({e for e in self._ended if e < epoch}), []
        return ended

    def _fold(self) -> None:
        """Let go of the oldest step, and at growing distances keep the totals up to it."""
        step, _, packed = self._log.popleft()
        self._log_bytes -= len(packed)
        self._num_folded += 1
        is_last_of_step = not self._log or self._log[0][0] > step
        self._folded_step = max(self._folded_step, step)
        if not is_last_of_step or self._num_folded % self._older_stride:
            return
        self._older.append((step, encode_table(_as_table(self._totals_without_log()))))
        if len(self._older) > MAX_TOTALS:
            self._older = self._older[1::2]
            self._older_stride *= 2

    def _totals_without_log(self) -> dict[int, Counter[int]]:
        totals = {epoch: Counter(counts) for epoch, counts in self._totals.items()}
        for _, epoch, packed in self._log:
            totals.setdefault(epoch, Counter()).subtract(decode_table(packed))
        return totals

    def _roll_back(self, step: int) -> bool:
        kept = [entry for entry in self._log if entry[0] < step]
        taken_off = [entry for entry in self._log if entry[0] >= step]
        if step > self._folded_step:
            for _, epoch, packed in taken_off:
                self._totals.get(epoch, Counter()).subtract(decode_table(packed))
            is_exact = True
        else:
            self._older = [older for older in self._older if older[0] < step]
            newest, packed = self._older[-1] if self._older else (-1, encode_table({}))
            self._totals = _from_table(decode_table(packed))
            kept, self._folded_step = [], newest
            is_exact = newest == step - 1
        self._log = deque(kept)
        self._log_bytes = sum(len(packed) for _, _, packed in kept)
        self._totals = {epoch: +counts for epoch, counts in self._totals.items() if +counts}
        self._current_epoch = max(self._totals, default=None)
        self._ended = []
        return is_exact

    def state(self) -> Json:
        """Return all of it as a plain map, for ``restore``."""
        return {
            "batches_without_labels": self.batches_without_labels,
            "totals": _as_table(self._totals),
            "log": [list(entry) for entry in self._log],
            "folded_step": self._folded_step,
            "older": [list(older) for older in self._older],
            "older_stride": self._older_stride,
            "num_folded": self._num_folded,
            "starts": dict(sorted(self._starts.items())),
            "current_epoch": self._current_epoch,
            "ended": self._ended,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state; raises KeyError, TypeError or ValueError where it is none."""
        self.batches_without_labels = int(state["batches_without_labels"])
        self._totals = _from_table(state["totals"])
        self._log = deque((int(step), int(epoch), bytes(packed)) for step, epoch, packed in state["log"])
        self._log_bytes = sum(len(packed) for _, _, packed in self._log)
        self._folded_step = int(state["folded_step"])
        self._older = [(int(step), bytes(packed)) for step, packed in state["older"]]
        self._older_stride = int(state["older_stride"])
        self._num_folded = int(state["num_folded"])
        self._starts = {int(attempt): int(step) for attempt, step in state["starts"].items()}
        self._current_epoch = cast("int | None", state["current_epoch"])
        self._ended = [int(epoch) for epoch in state["ended"]]


def _as_table(totals: Mapping[int, Mapping[int, int]]) -> Json:
    return {epoch: dict(sorted(counts.items())) for epoch, counts in sorted(totals.items())}


def _from_table(table: Mapping[int, Mapping[int, int]]) -> dict[int, Counter[int]]:
    return {int(epoch): Counter({int(n): int(c) for n, c in counts.items()}) for epoch, counts in table.items()}
