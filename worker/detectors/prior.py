"""The model against a table of how often each target stands at each place: what it knows beyond counting.

A collapse to the prior is calibrated: it shows neither in the mean prediction nor in the model's confidence, only here,
in the loss of the same targets, and in what images are worth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.running import RunningMoments, Window
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.token_table import Places
from sidestep.worker.detectors.view import StepView

NUM_PLACES: Final = 4
"""First, second, third and all later tokens of an answer are counted apart (docs/detection.md)."""
SMOOTHING: Final = 16.0
"""Counts that the ids' frequency at all places weighs against that at one place."""
RECENT: Final = 8
"""Steps whose mean gain is compared with the usual one."""


class PriorKnowledge:
    """``worse_than_prior``, ``back_to_prior`` and ``never_beyond_prior``."""

    name = "prior"

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings
        self._reset()

    def _reset(self) -> None:
        rule = self._settings.worse_than_prior
        self._table = Places(max_ids=rule.max_ids, num_places=NUM_PLACES, rate=rule.rate)
        self._num_readings = 0
        self._usual = RunningMoments(rate=self._settings.back_to_prior.rate, floor=0.05)
        self._usual_cost = RunningMoments(rate=self._settings.back_to_prior.rate, floor=0.05)
        self._recent = Window(RECENT)
        self._has_gained = False

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge one step, then count its targets."""
        rule = self._settings.worse_than_prior
        record = view.record
        if view.num_rows < rule.min_rows or record.vocabulary < 2:
            return ()
        ids, which, _ = view.distinct
        places = np.minimum(record.places, NUM_PLACES - 1).astype(np.int64)
        known = self._table.find(ids)
        found: list[Reading] = []
        if self._num_readings >= rule.warmup:
            costs = self._table.costs(known, which, places, vocabulary=record.vocabulary, smoothing=SMOOTHING)
            cost, loss = float(costs.mean()), view.mean_loss
            view.target_cost = cost
            found = [*self._worse(cost - loss), *self._fallen_back(cost, loss, view)]
            view.knowledge = self._usual.mean
        self._table.learn(known, which, places)
        self._num_readings += 1
        return found

    def _worse(self, gain: float) -> Iterator[Reading]:
        limit = self._settings.worse_than_prior.threshold
        evidence = f"counting the targets at each place costs {gain:+.3f} nats against the model's loss"
        yield Reading(name="worse_than_prior", value=-gain, limit=limit, is_beyond=-gain > limit, evidence=evidence)

    def _fallen_back(self, cost: float, loss: float, view: StepView) -> Iterator[Reading]:
        """What the model claims to know, by its entropy: wrong labels take from its loss, and not from that.

        Where the targets themselves have become easy to count, there is nothing to know beyond it.
        """
        rule, never = self._settings.back_to_prior, self._settings.never_beyond_prior
        entropy = view.mean_entropy
        gain = cost - (min(entropy, loss) if entropy is not None else loss)
        self._recent.add(gain)
        mean = sum(self._recent.values) / len(self._recent.values)
        usual = self._usual.mean
        self._has_gained = self._has_gained or mean > never.threshold
        is_warm = self._usual.count >= rule.warmup
        if is_warm and usual >= rule.least_gain:
            limit = rule.threshold * usual
            is_beyond = mean < limit and cost > 0.5 * self._usual_cost.mean
            evidence = f"the model knows {mean:.3f} nats more than counting does; it usually knows {usual:.3f}"
            yield Reading(
                name="back_to_prior", value=mean, limit=limit, is_beyond=is_beyond, reference=usual, evidence=evidence
            )
        if self._num_readings >= never.warmup and not self._has_gained:
            evidence = (
                f"after {self._num_readings} steps the model knows no more than how often each target stands where"
            )
            yield Reading(
                name="never_beyond_prior", value=mean, limit=never.threshold, is_beyond=mean < never.threshold,
                evidence=evidence,
            )  # fmt: skip
        if not (is_warm and mean < rule.threshold * usual):
            self._usual.update(gain)
            self._usual_cost.update(cost)

    def forget(self) -> None:
        """Count anew."""
        self._reset()

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        return {
            "table": self._table.state(),
            "readings": self._num_readings,
            "usual": [self._usual.state(), self._usual_cost.state()],
            "recent": self._recent.values,
            "gained": self._has_gained,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._table.restore(state["table"])
        self._num_readings = int(state["readings"])
        usual, cost = state["usual"]
        self._usual.restore(usual)
        self._usual_cost.restore(cost)
        self._recent.values = [float(value) for value in state["recent"]]
        self._has_gained = bool(state["gained"])
