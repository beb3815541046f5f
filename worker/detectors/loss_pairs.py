"""The trainer's own loss beside the cross-entropy of the same logits and labels, over the last steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from sidestep.worker.detectors.view import StepView


class LossPair(NamedTuple):
    """Means over steps."""

    told: float
    """What the trainer says that it trains on."""
    own: float
    """The cross-entropy of the rows."""
    squared_error: float
    """Of ``own``."""


class LossPairs:
    """The last steps that have both."""

    def __init__(self, most_steps: int) -> None:
        """Keep so many steps."""
        self._most_steps = most_steps
        self._steps: list[list[float]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def take(self, view: StepView) -> bool:
        """Add a step; False where it has not both of them."""
        told, own = view.record.trainer_loss, view.record.loss
        if told is None or own is None or not view.num_rows or told <= 0 or own <= 0:
            return False
        self._steps = [*self._steps, [told, own, view.squared_loss_error]][-self._most_steps :]
        return True

    def means(self, first: int | None = None, stop: int | None = None) -> LossPair:
        """Return the means over the steps ``[first:stop]``, which must not be none."""
        steps = self._steps[first:stop]
        told, own, squares = (math.fsum(each[place] for each in steps) for place in range(3))
        return LossPair(told / len(steps), own / len(steps), squares / len(steps) ** 2)

    def clear(self) -> None:
        """Let go of all."""
        self._steps = []

    def state(self) -> list[list[float]]:
        """Return all that ``restore`` needs."""
        return self._steps

    def restore(self, state: Sequence[Sequence[float]]) -> None:
        """Take over a state."""
        self._steps = [[float(value) for value in each] for each in state]
