"""How sure the model is against how right it is: mean loss minus mean entropy, 0 for any model honest in its scale.

At the best scale of its logits a model's expected loss is its expected entropy, whatever the task (docs/detection.md):
so there is no level to learn, and early training, yes/no data and memorised data are no special cases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.running import Cusum, Freeze, RunningMoments
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView

MIN_ROWS: Final = 16
MIN_ANSWERS: Final = 4
"""Answers from which the standard error is that of answers, whose tokens err together."""


class Confidence:
    """``confidence_gap``: the model is surer than it is right; ``underconfident``: it is far less sure."""

    name = "confidence"

    def __init__(self, settings: DetectorSettings) -> None:
        self._rule = settings.confidence_gap
        self._unsure = settings.underconfident
        self._reset()

    def _reset(self) -> None:
        rule = self._rule
        self._sum = Cusum(allowance=rule.allowance, limit=rule.threshold, clip=rule.clip)
        self._own = RunningMoments(rate=rule.rate, floor=rule.floor)
        self._freeze = Freeze(rule.freeze_steps)
        self._num_readings = 0

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge one step."""
        entropies = view.entropies
        if entropies is None or view.num_rows < MIN_ROWS:
            return ()
        gaps = view.losses - entropies
        gap = float(gaps.mean())
        deviations = gaps - gap
        if view.starts.size >= MIN_ANSWERS:
            deviations = view.sum_by_answer(deviations)
        error = max(math.sqrt(float(np.square(deviations).sum())) / view.num_rows, self._rule.floor)
        found: list[Reading] = []
        limit, self._num_readings = self._unsure.threshold, self._num_readings + 1
        if self._num_readings > self._unsure.warmup:
            said = f"the entropy of its predictions is {-gap:.2f} nats above their loss, of a calibrated model 0"
            found.append(Reading(name="underconfident", value=-gap, limit=limit, is_beyond=-gap > limit, evidence=said))
        if self._own.count >= self._rule.warmup:
            own = min(max(self._own.mean, 0.0), self._rule.own)
            # Answers of a step may be of one task, and err together: the gap's own scatter over steps tells.
            error = max(error, self._own.deviation)
            value = self._sum.add((gap - own) / error)
            evidence = f"loss minus entropy is {gap:+.3f} nats (standard error {error:.3f}); a calibrated model has 0"
            found.append(
                Reading(
                    name="confidence_gap", value=value, limit=self._sum.limit, is_beyond=self._sum.is_beyond,
                    reference=own, evidence=evidence,
                )
            )  # fmt: skip
        if not self._freeze.holds(is_suspicious=self._sum.is_suspicious):
            self._own.update(gap)
        return found

    def forget(self) -> None:
        """Learn the run's own gap anew."""
        self._reset()

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        return {
            "own": self._own.state(),
            "sum": self._sum.state(),
            "frozen": self._freeze.steps,
            "read": self._num_readings,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._own.restore(state["own"])
        self._sum.restore(state["sum"])
        self._freeze.steps = int(state["frozen"])
        self._num_readings = int(state.get("read", self._own.count))
