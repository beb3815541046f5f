"""The trainer's own loss against the cross-entropy of the same logits and labels: what is trained on, what is meant.

A temperature, a weight, a smoothing or an auxiliary term has a ratio of its own to the cross-entropy, and is no
failure. One that comes, goes or changes in the middle of a run is another loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.loss_pairs import LossPair, LossPairs
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView

TINY: Final = 1e-9


class TrainerLoss:
    """``loss_differs``."""

    name = "trainer_loss"

    def __init__(self, settings: DetectorSettings) -> None:
        self._rule = rule = settings.loss_differs
        self._last = LossPairs(rule.usual_steps + 2 * rule.pooled)
        self._num_readings = 0

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge the last few steps against those before them."""
        rule = self._rule
        if not self._last.take(view):
            return ()
        self._num_readings += 1
        if self._num_readings < rule.warmup or len(self._last) < rule.usual_steps + 2 * rule.pooled:
            return ()
        means, pooled = self._last.means, rule.pooled
        before, recent = means(pooled, -pooled), means(-pooled)
        earlier, drifted = means(None, -2 * pooled), means(-2 * pooled, -pooled)
        # A smoothed loss goes its own way as the model gets surer: what it does in a few steps, it did before them too.
        excess = max(0.0, _change(before, recent) - rule.drift * _change(earlier, drifted))
        difference = recent.told - recent.own - before.told + before.own
        apart = min(abs(difference), abs(recent.told - recent.own * before.told / before.own))
        # Where the cross-entropy itself is another one, the sample's noise is too, and that is somebody else's finding.
        is_steady = abs(math.log(recent.own / before.own)) < rule.steady
        least = rule.least + rule.errors * math.sqrt(before.squared_error + recent.squared_error)
        is_beyond = is_steady and excess > rule.threshold and apart > least
        evidence = (
            f"the trainer's loss is {recent.told:.3f}, the cross-entropy of its logits and labels {recent.own:.3f}: "
            f"{recent.told / recent.own:.2f} times as much, before {before.told / before.own:.2f} (over {pooled} steps)"
        )
        return (
            Reading(
                name="loss_differs", value=excess, limit=rule.threshold, is_beyond=is_beyond,
                reference=before.told / before.own, evidence=evidence,
            ),
        )  # fmt: skip

    def forget(self) -> None:
        """Another stage may have another loss."""
        self._last.clear()
        self._num_readings = 0

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        return {"last": self._last.state(), "read": self._num_readings}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._last.restore(state["last"])
        self._num_readings = int(state["read"])


def _change(before: LossPair, after: LossPair) -> float:
    """Return how far the logarithm of the ratio, or of what is left without the difference, has moved: the smaller.

    A part that is added leaves the difference alone, one that is multiplied the ratio: another loss, neither.
    """
    ratio, offset = math.log(before.told / before.own), before.told - before.own
    without = math.log(max(after.told - offset, TINY) / after.own)
    return min(abs(math.log(after.told / after.own) - ratio), abs(without))
