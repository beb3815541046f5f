"""How many rows a step may look at: all that are wanted, or fewer where signals cost more than they may."""

from __future__ import annotations

from typing import Final

LEAST_ROWS_PER_STEP: Final = 64
"""Over all ranks and micro-batches; below it nothing could be judged."""
_WEIGHT: Final = 0.2
_WARM_UP_STEPS: Final = 5
"""The first steps allocate, compile and load: their times are not taken for what a step costs."""
_STEPS_BETWEEN_CHANGES: Final = 15


class OverheadBudget:
    """Thins the rows of every step so that the signals stay within a share of the step's time.

    Rows alone are thinned, by halves; never the cadence, since ranks must agree on it, and never the exact counts.
    """

    def __init__(self, budget: float) -> None:
        """Allow the share ``budget`` of a step's time; 0: no limit."""
        self._budget = budget
        self._cost = self._step = 0.0
        self._num_steps = 0
        self._changed_at = 0
        self.share = 1.0
        """Share of the wanted rows that is looked at."""

    @property
    def cost_share(self) -> float:
        """Share of a step's time that signals take, smoothed; 0 before anything was measured."""
        return self._cost / self._step if self._step > 0 else 0.0

    def measured(self, signal_seconds: float, step_seconds: float) -> None:
        """Take what one step cost: the larger of host and device time of its signals, and its own length."""
        self._num_steps += 1
        if self._num_steps <= _WARM_UP_STEPS or step_seconds <= 0 or self._budget <= 0:
            return
        weight = 1.0 if self._step == 0 else _WEIGHT
        # A pause of the machine in a hook is not the signals' price: a step counts four times the mean at most.
        capped = min(signal_seconds, 4 * self._cost) if self._cost else signal_seconds
        self._cost += weight * (capped - self._cost)
        self._step += weight * (min(step_seconds, 4 * self._step or step_seconds) - self._step)
        if self._num_steps - self._changed_at < _STEPS_BETWEEN_CHANGES:
            return
        if self.cost_share > self._budget:
            self._set(self.share / 2)
        elif self.share < 1 and self.cost_share < self._budget / 4:
            self._set(self.share * 2)

    def _set(self, share: float) -> None:
        self.share = min(1.0, max(share, 1 / 64))
        self._changed_at = self._num_steps

    def rows(self, wanted: int, ranks: int) -> int:
        """Return the rows of a step on one of ``ranks`` ranks that look at rows, ``wanted`` being the run's."""
        return max(1, max(min(LEAST_ROWS_PER_STEP, wanted), int(wanted * self.share)) // max(1, ranks))
