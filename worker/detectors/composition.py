"""The loss against what the same targets usually cost (docs/detection.md): what a batch is made of falls out.

``cal_up`` adds up what the step costs more than its targets usually do; ``cal_down`` what it suddenly costs less, as
when the answer stands in the prompt. Other families read the rows' residuals (``StepView.residuals``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.running import Cusum, Freeze, RunningMoments, Window, median
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.token_table import Costs, Found
from sidestep.worker.detectors.view import StepView

KNOWN_FROM: Final = 60
"""Readings from which others may take what the same targets usually cost into account."""


class CompositionAdjusted:
    """Loss minus a running expectation of each target."""

    name = "composition"

    def __init__(self, settings: DetectorSettings) -> None:
        self._rule = settings.cal_up
        self._down_rule = settings.cal_down
        self._reset()

    def _reset(self) -> None:
        rule = self._rule
        self._costs = Costs(max_ids=rule.max_ids, rate=rule.token_rate, min_sightings=rule.min_sightings)
        self._centre = RunningMoments(rate=rule.rate, floor=rule.floor)
        self._level = RunningMoments(rate=rule.token_rate, floor=rule.floor)  # of the loss itself, for unknown targets
        self._up = Cusum(allowance=rule.allowance, limit=rule.threshold, clip=rule.clip)
        down = self._down_rule
        self._last = Window(down.recent + down.before)  # residuals ...
        self._last_losses = Window(down.recent + down.before)  # ... and losses of the last steps
        self._freeze = Freeze(rule.freeze_steps)
        self._usual_rows = 0.0

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge one step, then learn from it unless it is under suspicion."""
        if view.num_rows < self._rule.min_rows:
            return ()
        ids, which, _ = view.distinct
        known = self._costs.find(ids)
        expected = self._costs.expected(known, self._level.mean if self._level.count else view.mean_loss)
        view.residuals = view.losses - expected[which]
        residual = float(view.residuals.mean())
        widen = math.sqrt(max(1.0, self._usual_rows / view.num_rows))
        found: list[Reading] = []
        if self._centre.count >= KNOWN_FROM:
            view.residual_deviations = self._centre.z(residual, widen)
        if self._centre.count >= self._rule.warmup:
            found = [self._risen(residual, widen), *self._fallen(residual, view.mean_loss)]
        if not self._freeze.holds(is_suspicious=self._up.is_suspicious):
            self._centre.update(residual, widen)
            self._learn(view, known, expected, view.residuals)
        self._usual_rows += 0.05 * (view.num_rows - self._usual_rows)
        return found

    def _risen(self, residual: float, widen: float) -> Reading:
        z = self._centre.z(residual, widen)
        value = self._up.add(z)
        said = (
            f"{residual - self._centre.mean:+.3f} nats against what the same targets usually cost "
            f"({z:+.1f} standard deviations of {self._centre.deviation * widen:.3f})"
        )
        return Reading(
            name="cal_up", value=value, limit=self._up.limit, is_beyond=self._up.is_beyond,
            reference=self._centre.mean, evidence=said if self._up.is_beyond else "",
        )  # fmt: skip

    def _fallen(self, residual: float, loss: float) -> list[Reading]:
        """The last few steps against those before them: a fall of the loss itself that is over in a few steps."""
        rule = self._down_rule
        self._last.add(residual)
        self._last_losses.add(loss)
        if len(self._last.values) < rule.recent + rule.before:
            return []
        fall, spread = math.inf, 0.0
        for values in (self._last.values, self._last_losses.values):
            before, recent = values[: -rule.recent], median(values[-rule.recent :])
            usual = median(before)
            fall, spread = min(fall, usual - recent), max(spread, usual - min(before))
        # Where steps are unlike each other, as with one task a step, easy ones are far below the others all the time.
        limit = max(rule.least, rule.threshold * self._level.mean, rule.spreads * spread)
        said = f"the same targets suddenly cost {fall:.3f} nats less, of {self._level.mean:.3f}"
        return [
            Reading(
                name="cal_down", value=fall, limit=limit, is_beyond=fall > limit, reference=self._level.mean,
                evidence=said,
            )
        ]  # fmt: skip

    def _learn(
        self, view: StepView, known: Found, expected: NDArray[np.float64], residuals: NDArray[np.float64]
    ) -> None:
        """Move each target's expectation towards its mean, by no more than a large ordinary deviation."""
        _, which, counts = view.distinct
        means = np.bincount(which, weights=view.losses, minlength=counts.size) / counts
        if self._centre.count > self._rule.warmup:
            reach = 3.0 * max(math.sqrt(float(np.square(residuals).mean())), self._rule.floor)
            means = np.minimum(np.maximum(means, expected - reach), expected + reach)
        self._level.update(view.mean_loss)
        self._costs.learn(known, means, counts)

    @property
    def is_suspicious(self) -> bool:
        """Whether references should stand still elsewhere too."""
        return self._up.is_suspicious

    def forget(self) -> None:
        """Learn anew what targets cost."""
        self._reset()

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        return {
            "costs": self._costs.state(),
            "centre": self._centre.state(),
            "level": self._level.state(),
            "sum": self._up.state(),
            "last": [self._last.values, self._last_losses.values],
            "frozen": self._freeze.steps,
            "rows": self._usual_rows,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._costs.restore(state["costs"])
        self._centre.restore(state["centre"])
        self._level.restore(state["level"])
        self._up.restore(state["sum"])
        self._last.values, self._last_losses.values = ([float(value) for value in each] for each in state["last"])
        self._freeze.steps = int(state["frozen"])
        self._usual_rows = float(state["rows"])
