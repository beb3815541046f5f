"""What went with a failure's first step: facts that tell causes apart and are no failures themselves.

``rate_raised``: the learning rate stood well above what it was. ``outputs_unchanged``: the loss rose though the model
was as sure as before: the targets or inputs changed, the model not yet. ``outputs_changed``: it was not as sure.
``gradient_up``: the gradient rose with it. ``targets_changed``: by what stands where in the answers, or by their
length, the targets were others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.running import RunningMoments, Window, median
from sidestep.worker.step_record import StepRecord

RATE_READINGS: Final = 64
"""Rates whose older ones the newest is compared with: a linear warm-up of any length rises by less than 2.3 times."""
RATE_RISE: Final = 2.5
REMEMBERED_STEPS: Final = 24
CHANGED: Final = 4.0
"""Standard deviations of the entropy, or of the logarithm of the gradient's norm, from which it changed."""
TARGET_STEPS: Final = 2
"""Steps whose targets must be others: a single batch may be made of rare ones."""
NEAR: Final = 5
"""Steps around a failure's first one that facts are looked for in."""


class OnsetFacts:
    """Keeps the last steps' facts."""

    def __init__(self) -> None:
        self._rates = Window(RATE_READINGS)
        self._entropy = RunningMoments(rate=0.02, floor=0.01)
        self._norm = RunningMoments(rate=0.02, floor=0.05)
        self._cost = RunningMoments(rate=0.02, floor=0.05)
        self._length = RunningMoments(rate=0.02, floor=0.05)
        self._last: list[list[float]] = []  # step, rate's rise, z of the entropy, of the norm, and of the targets

    def take(self, record: StepRecord, target_cost: float | None = None) -> None:
        """Take a step in.

        Args:
            record: the step.
            target_cost: what its targets cost by counting them (``StepView.target_cost``).
        """
        rise = z_entropy = z_norm = 0.0
        rate = float(record.rates.max()) if record.rates.size else 0.0
        if rate > 0:
            if len(self._rates.values) >= RATE_READINGS:
                rise = rate / median(self._rates.values[: RATE_READINGS - 8])
            self._rates.add(rate)
        if record.entropy is not None:
            z_entropy = self._entropy.z(record.entropy) if self._entropy.count >= 16 else 0.0
            self._entropy.update(record.entropy)
        if record.gradient_norm is not None and record.gradient_norm > 0:
            norm = math.log(record.gradient_norm)
            z_norm = self._norm.z(norm) if self._norm.count >= 16 else 0.0
            self._norm.update(norm)
        z_targets = self._targets(record, target_cost)
        self._last = [*self._last, [float(record.step), rise, z_entropy, z_norm, z_targets]][-REMEMBERED_STEPS:]

    def _targets(self, record: StepRecord, cost: float | None) -> float:
        """Return by how many standard deviations the targets' cost, or their answers' mean length, is another."""
        found = 0.0
        if cost is not None:
            found = abs(self._cost.z(cost)) if self._cost.count >= 16 else 0.0
            self._cost.update(cost)
        answers, labelled = record.count("answers"), record.count("labelled")
        if answers and labelled:
            length = math.log(labelled / answers)
            found = max(found, abs(self._length.z(length)) if self._length.count >= 16 else 0.0)
            self._length.update(length)
        return found

    def around(self, step: int) -> frozenset[str]:
        """Return the facts of the steps around ``step``, as far as they are remembered."""
        before = [each for each in self._last if each[0] <= step + NEAR]
        near = [each for each in before if each[0] >= step - NEAR]
        onset = [each for each in near if each[0] <= step]
        found: set[str] = set()
        if any(each[1] > RATE_RISE for each in before):
            found.add("rate_raised")
        if onset and self._entropy.count >= 16:
            found.add("outputs_changed" if any(abs(each[2]) > CHANGED for each in onset) else "outputs_unchanged")
        if any(each[3] > CHANGED for each in near):
            found.add("gradient_up")
        if sum(each[4] > CHANGED for each in near) >= TARGET_STEPS:
            found.add("targets_changed")
        return frozenset(found)

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        moments = (self._entropy, self._norm, self._cost, self._length)
        return [self._rates.values, *(each.state() for each in moments), self._last]

    def restore(self, state: Any) -> None:
        """Take over a state."""
        rates, entropy, norm, *targets, last = state
        self._rates.values = [float(rate) for rate in rates]
        self._entropy.restore(entropy)
        self._norm.restore(norm)
        if targets:  # there are none in a state of version 1 of the watch
            self._cost.restore(targets[0])
            self._length.restore(targets[1])
        self._last = [[*(float(value) for value in each), 0.0][:5] for each in last]


FACTS: Final[Mapping[str, str]] = {
    "rate_raised": "the learning rate had been raised",
    "outputs_unchanged": "the model was as sure as before when it began",
    "outputs_changed": "the model's own certainty changed when it began",
    "gradient_up": "the gradient rose with it",
    "targets_changed": "the targets were others when it began",
}
"""Each fact in words."""
