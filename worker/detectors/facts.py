"""What went with a failure's first step: facts that tell causes apart and are no failures themselves.

``rate_raised``: the learning rate stood well above what it was. ``outputs_unchanged``: the loss rose though the model
was as sure as before: the targets or inputs changed, the model not yet. ``outputs_changed``: it was not as sure.
``gradient_up``: the gradient rose with it.
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
NEAR: Final = 3
"""Steps around a failure's first one that facts are looked for in."""


class OnsetFacts:
    """Keeps the last steps' facts."""

    def __init__(self) -> None:
        self._rates = Window(RATE_READINGS)
        self._entropy = RunningMoments(rate=0.02, floor=0.01)
        self._norm = RunningMoments(rate=0.02, floor=0.05)
        self._last: list[list[float]] = []  # step, rate's rise, z of the entropy, z of the norm

    def take(self, record: StepRecord) -> None:
        """Take a step in."""
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
        self._last = [*self._last, [float(record.step), rise, z_entropy, z_norm]][-REMEMBERED_STEPS:]

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
        return frozenset(found)

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        return [self._rates.values, self._entropy.state(), self._norm.state(), self._last]

    def restore(self, state: Any) -> None:
        """Take over a state."""
        rates, entropy, norm, last = state
        self._rates.values = [float(rate) for rate in rates]
        self._entropy.restore(entropy)
        self._norm.restore(norm)
        self._last = [[float(value) for value in each] for each in last]


FACTS: Final[Mapping[str, str]] = {
    "rate_raised": "the learning rate had been raised",
    "outputs_unchanged": "the model was as sure as before when it began",
    "outputs_changed": "the model's own certainty changed when it began",
    "gradient_up": "the gradient rose with it",
}
"""Each fact in words."""
