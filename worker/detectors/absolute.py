"""Checks whose threshold has a meaning of its own: a uniform guess costs the logarithm of the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.running import Window
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView
from sidestep.worker.step_record import StepRecord

FIRST_STEPS: Final = 3
"""First readings of a run that tell how it was initialised."""
UNIFORM_FROM: Final = 10
"""Readings from which a loss above a uniform guess is no start any more (docs/detection.md)."""
LEFT_UNIFORM: Final = 1.0
"""Nats that predictions must once have been better than uniform for them to have fallen back ..."""
LATE_UNIFORM: Final = 300
"""... or readings after which they must have left it."""


class AbsoluteChecks:
    """Loss and entropy against a uniform guess over the vocabulary."""

    name = "absolute"

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings
        self._num_readings = 0
        self._has_left = False
        self._first: list[float] = []  # the first losses
        self._recent = Window(settings.nothing_learned.recent)
        self._rates = [0.0, 0.0]  # the highest so far, and readings since it last rose
        self._has_learned = False

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge one step."""
        record = view.record
        if record.loss is None or record.vocabulary < 2 or not view.num_rows:
            return ()
        uniform = math.log(record.vocabulary)
        found: list[Reading] = []
        self._num_readings += 1
        over = record.loss - uniform
        evidence = f"the loss is {record.loss:.2f} nats; a uniform guess costs {uniform:.2f}"
        if record.attempt == 0 and self._num_readings <= FIRST_STEPS:
            rule = self._settings.init_loss
            limit = rule.threshold + rule.errors * _error_over_targets(view)
            found.append(Reading(name="init_loss", value=over, limit=limit, is_beyond=over > limit, evidence=evidence))
        if self._num_readings > UNIFORM_FROM:
            limit = self._settings.worse_than_uniform.threshold
            found.append(
                Reading(name="worse_than_uniform", value=over, limit=limit, is_beyond=over > limit, evidence=evidence)
            )
        if record.entropy is not None:
            below = uniform - record.entropy
            self._has_left = self._has_left or below > LEFT_UNIFORM
            if self._has_left or self._num_readings > LATE_UNIFORM:
                limit = self._settings.uniform_predictions.threshold
                evidence = f"the mean entropy is {record.entropy:.2f} nats; the uniform distribution has {uniform:.2f}"
                found.append(
                    Reading(
                        name="uniform_predictions", value=below, limit=limit, is_beyond=below < limit, evidence=evidence
                    )
                )
        return [*found, *self._learned(record, record.loss, uniform)]

    def _learned(self, record: StepRecord, loss: float, uniform: float) -> Iterator[Reading]:
        """An untrained model learns which ids there are within some tens of steps, once its rate is up."""
        rule = self._settings.nothing_learned
        rate = float(record.rates.max()) if record.rates.size else 0.0
        highest, since = self._rates
        self._rates = [rate, 0.0] if rate > highest else [highest, since + 1.0]
        self._recent.add(loss)
        if len(self._first) < FIRST_STEPS:
            self._first.append(loss)
            return
        first, now = sum(self._first) / FIRST_STEPS, self._recent.median()
        self._has_learned = self._has_learned or now <= rule.threshold * first
        is_untrained = uniform >= rule.least_uniform and first >= rule.untrained * uniform
        if self._has_learned or not is_untrained:
            return  # another stage may cost as much as the start did
        if not rate > 0 or self._rates[1] < rule.steady or len(self._recent) < rule.recent:
            return
        evidence = (
            f"the loss is {now:.2f} nats after {self._num_readings} steps and was {first:.2f} at first (a uniform "
            f"guess: {uniform:.2f}); the learning rate has been up for {self._rates[1]:.0f} steps"
        )
        share, limit = now / first, rule.threshold
        yield Reading(
            name="nothing_learned",
            value=share,
            limit=limit,
            is_beyond=share > limit,
            reference=first,
            evidence=evidence,
        )

    def forget(self) -> None:
        """Nothing here is learned."""

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        return {
            "readings": self._num_readings,
            "left": self._has_left,
            "learned": self._has_learned,
            "losses": [self._first, self._recent.values],
            "rates": self._rates,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state; one from before there was `nothing_learned` is one of a run that has learned."""
        self._num_readings, self._has_left = int(state["readings"]), bool(state["left"])
        self._has_learned = bool(state.get("learned", True))
        first, recent = state.get("losses", ([0.0] * FIRST_STEPS, []))
        self._first, self._recent.values = [float(loss) for loss in first], [float(loss) for loss in recent]
        self._rates = [float(each) for each in state.get("rates", (0.0, 0.0))]


def _error_over_targets(view: StepView) -> float:
    """Return the standard error of the mean loss in nats, were other ids the targets: few distinct ones say little."""
    _, which, counts = view.distinct
    shares = counts / view.num_rows
    deviations = np.bincount(which, weights=view.losses) / counts - view.mean_loss
    return math.sqrt(float(np.square(shares * deviations).sum()))
