"""Exact checks of the update: weights and rates that do not move, gradients that are missing, ranks that differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView
from sidestep.worker.detectors.weights import is_half
from sidestep.worker.step_record import StepRecord

SKIP_WINDOW: Final = 20
"""Steps of which the skipped ones are counted: a GradScaler that finds its factor skips fewer at its start."""


STANDING_FACTOR: Final = 3
"""Times as long as ever before sampled weights in bfloat16 must have stood still."""


class Updates:
    """What the optimizer does."""

    name = "updates"

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings
        self._weights = 0
        self._kind = 0
        self._unmoved = self._longest = 0  # steps that the sampled weights stand, and stood at most before they moved
        self._has_moved = False
        self._highest_rate = 0.0
        self._last_rate = 0.0
        self._moving_rate = 0.0
        self._skipped: list[int] = []
        self._spent = [0, 0, 0]  # steps below the least rate in a row, all steps, and those of the first that stand
        self._before = 0.0  # the rate of the step before

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge one step."""
        record = view.record
        found = [*self._rates(record), *self._movement(record), *self._skips(record)]
        if record.weights_digest and record.ranks_seen > 1:
            ranks = ", ".join(map(str, record.desynced_ranks))
            evidence = f"rank {ranks}: the sampled weights are not those of the lowest rank" if ranks else ""
            value = float(len(record.desynced_ranks))
            found.append(Reading(name="rank_desync", value=value, limit=0.0, is_beyond=bool(ranks), evidence=evidence))
        norm = record.gradient_norm
        if norm is not None and record.applied is not False and record.labelled > 0:
            evidence = "the gradient of the whole model is exactly 0"
            found.append(Reading(name="no_gradient", value=norm, limit=0.0, is_beyond=norm == 0, evidence=evidence))
        return found

    def _rates(self, record: StepRecord) -> Iterator[Reading]:
        """All rates are 0, though the schedule had not gone down to nearly 0."""
        if not record.rates.size:
            return
        rate = float(record.rates.max())
        rule = self._settings.lr_zero
        is_end = 0 < self._last_rate < rule.least_rate * self._highest_rate
        self._highest_rate = max(self._highest_rate, rate)
        if rate > 0:
            self._last_rate = rate
        is_zero = rate <= 0 and not is_end
        evidence = f"every learning rate is 0 (the highest so far: {self._highest_rate:g})"
        yield Reading(name="lr_zero", value=rate, limit=0.0, is_beyond=is_zero, evidence=evidence)
        yield self._end_of_schedule(rate)

    def _end_of_schedule(self, rate: float) -> Reading:
        """The rate went down to nearly nothing, and the training goes on and on.

        What still falls at every step is a schedule that has not ended: only where most steps are so is it a wrong one.
        """
        rule = self._settings.lr_spent
        low, steps, still = self._spent
        is_low = self._last_rate > 0 and rate < rule.threshold * self._highest_rate
        low = low + 1 if is_low else 0
        still = still + 1 if is_low and rate >= self._before else 0
        self._before = rate
        self._spent = [low, steps + 1, still]
        is_beyond = low >= rule.least_steps and (
            still >= max(rule.least_steps, rule.share * steps) or low >= rule.falling_share * steps
        )
        highest = f"{rule.threshold:.0%} of its highest ({self._highest_rate:g})"
        evidence = f"the learning rate has been under {highest} for {low} steps"
        return Reading(
            name="lr_spent", value=float(low), limit=float(rule.least_steps), is_beyond=is_beyond, evidence=evidence
        )

    def _movement(self, record: StepRecord) -> Iterator[Reading]:
        """No sampled weight changed, though the step was applied with a rate that should move it."""
        if not record.weights_digest or record.nonfinite_weight_ranks:
            return  # NaN stays NaN: `nonfinite` says that
        is_known = record.weights_kind == self._kind
        is_same = is_known and record.weights_digest == self._weights
        self._weights, self._kind = record.weights_digest, record.weights_kind
        rule = self._settings.no_update
        rate = float(record.rates.max()) if record.rates.size else self._highest_rate
        is_small = rate <= rule.least_rate * self._highest_rate if self._highest_rate else False
        # A warm-up's first updates may be below a weight's precision: while it rises and nothing moved yet, wait.
        is_rising, self._moving_rate = rate > self._moving_rate, rate
        if not is_known or record.applied is False or is_small:
            return
        if not is_same and self._has_moved:
            self._longest = max(self._longest, self._unmoved)
        self._unmoved = min(self._unmoved + 1, 1 << 20) if is_same else 0
        self._has_moved = self._has_moved or not is_same
        is_free = (is_rising and not self._has_moved) or (is_half(record.weights) and self._may_stand(rate))
        is_beyond = is_same and (not is_free or self._unmoved > rule.first_steps)
        evidence = f"no sampled weight changed in {self._unmoved} steps"
        yield Reading(
            name="no_update", value=float(self._unmoved), limit=float(rule.hits), is_beyond=is_beyond, evidence=evidence
        )

    def _may_stand(self, rate: float) -> bool:
        """Weights in bfloat16 move now and then at a low rate: by how long they stood before, and with a lower one."""
        is_low = rate < self._settings.updates_rounded.least_rate * self._highest_rate
        return is_low or self._unmoved <= STANDING_FACTOR * self._longest

    def _skips(self, record: StepRecord) -> Iterator[Reading]:
        if record.applied is None:
            return
        self._skipped = [*self._skipped, int(not record.applied)][-SKIP_WINDOW:]
        if len(self._skipped) < SKIP_WINDOW:
            return
        limit, share = self._settings.updates_skipped.threshold, sum(self._skipped) / SKIP_WINDOW
        evidence = f"{sum(self._skipped)} of the last {SKIP_WINDOW} optimizer steps were skipped"
        is_beyond = share > limit and not record.applied
        yield Reading(name="updates_skipped", value=share, limit=limit, is_beyond=is_beyond, evidence=evidence)

    def resume(self) -> None:
        """Another attempt begins with the weights of a checkpoint."""
        self._weights, self._kind, self._unmoved, self._skipped = 0, 0, 0, []

    def forget(self) -> None:
        """A new stage may begin a new schedule and hold other weights still."""
        self._highest_rate = self._last_rate = 0.0
        self._has_moved, self._unmoved, self._longest = False, 0, 0
        self._spent, self._before = [0, 0, 0], 0.0

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        flags = int(self._has_moved)
        weights = [self._weights, self._kind, self._unmoved, flags, self._longest]
        rates = [self._highest_rate, self._last_rate, self._moving_rate, self._before]
        return {"weights": weights, "rates": rates, "skipped": self._skipped, "spent": self._spent}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._weights, self._kind, self._unmoved, flags, *longest = map(int, state["weights"])
        self._longest = longest[0] if longest else 0
        self._has_moved = bool(flags)
        self._highest_rate, self._last_rate, self._moving_rate, *before = map(float, state["rates"])
        self._before = before[0] if before else 0.0
        self._skipped = [int(each) for each in state["skipped"]]
        low, steps, *still = map(int, state.get("spent", (0, 0)))
        self._spent = [low, steps, still[0] if still else low]
