"""The trainer's own loss against the cross-entropy of the same logits and labels: what is trained on, what is meant.

A temperature, a weight, a smoothing or an auxiliary term has a ratio of its own to the cross-entropy, and is no
failure. One that comes, goes or changes in the middle of a run is another loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView

TINY: Final = 1e-9


class TrainerLoss:
    """``loss_differs``."""

    name = "trainer_loss"

    def __init__(self, settings: DetectorSettings) -> None:
        self._rule = settings.loss_differs
        self._reset()

    def _reset(self) -> None:
        self._last: list[list[float]] = []  # the trainer's loss, the own one and its squared error, of the last steps
        self._num_readings = 0

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge the last few steps against those before them."""
        record, rule = view.record, self._rule
        told, own = record.trainer_loss, record.loss
        if told is None or own is None or not view.num_rows or told <= 0 or own <= 0:
            return ()
        self._last = [*self._last, [told, own, view.squared_loss_error]][-rule.usual_steps - 2 * rule.pooled :]
        self._num_readings += 1
        if self._num_readings < rule.warmup or len(self._last) < rule.usual_steps + 2 * rule.pooled:
            return ()
        before, recent = _means(self._last[rule.pooled : -rule.pooled]), _means(self._last[-rule.pooled :])
        earlier, drifted = _means(self._last[: -2 * rule.pooled]), _means(self._last[-2 * rule.pooled : -rule.pooled])
        # A smoothed loss goes its own way as the model gets surer: what it does in a few steps, it did before them too.
        excess = max(0.0, _change(before, recent) - rule.drift * _change(earlier, drifted))
        apart = min(
            abs(recent[0] - recent[1] - before[0] + before[1]), abs(recent[0] - recent[1] * before[0] / before[1])
        )
        # Where the cross-entropy itself is another one, the sample's noise is too, and that is somebody else's finding.
        is_steady = abs(math.log(recent[1] / before[1])) < rule.steady
        least = rule.least + rule.errors * math.sqrt(before[2] + recent[2])
        is_beyond = is_steady and excess > rule.threshold and apart > least
        evidence = (
            f"the trainer's loss is {recent[0]:.3f}, the cross-entropy of its logits and labels {recent[1]:.3f}: "
            f"{recent[0] / recent[1]:.2f} times as much, before {before[0] / before[1]:.2f} (over {rule.pooled} steps)"
        )
        return (
            Reading(
                name="loss_differs", value=excess, limit=rule.threshold, is_beyond=is_beyond,
                reference=before[0] / before[1], evidence=evidence,
            ),
        )  # fmt: skip

    def forget(self) -> None:
        """Another stage may have another loss."""
        self._reset()

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        return {"last": self._last, "read": self._num_readings}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._last = [[float(value) for value in each] for each in state["last"]]
        self._num_readings = int(state["read"])


def _change(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    """Return how far the logarithm of the ratio, or of what is left without the difference, has moved: the smaller.

    A part that is added leaves the difference alone, one that is multiplied the ratio: another loss, neither.
    """
    ratio, offset = math.log(before[0] / before[1]), before[0] - before[1]
    without = math.log(max(after[0] - offset, TINY) / after[1])
    return min(abs(math.log(after[0] / after[1]) - ratio), abs(without))


def _means(steps: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean of the trainer's loss and of the own one, and the squared error of the second."""
    told, own, squares = (math.fsum(each[place] for each in steps) for place in range(3))
    return told / len(steps), own / len(steps), squares / len(steps) ** 2
