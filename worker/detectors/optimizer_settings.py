"""What the optimizer is set to: settings that cannot be meant, that change, and gradients that never reach it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sidestep.protocol.messages import Json
from sidestep.protocol.signals import GROUP_SETTINGS
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.setting_changes import NUM_SETTINGS, Numbers, SettingChanges, in_groups
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView
from sidestep.worker.records import RunContext
from sidestep.worker.step_record import StepRecord

_BETA2, _EPS, _DECAY = (GROUP_SETTINGS.index(name) for name in ("beta2", "eps", "weight_decay"))
SWAPPED_EPS, SWAPPED_DECAY = 1e-3, 1e-6
"""From the one on, and to the other, Adam's eps looks like a weight decay and the weight decay like an eps."""


class OptimizerSettings:
    """``optimizer_settings``, ``settings_changed`` and ``gradients_lost``."""

    name = "optimizer_settings"

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings
        self._table: Mapping[str, Json] | None = None  # of which the elements are counted already
        self._num_elements = 0
        self._far = 0  # readings in a row at which eps was far over the gradient
        self._changes = SettingChanges(settings.settings_changed)

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge one step."""
        record = view.record
        found = list(_gradients_lost(record))
        if record.group_settings.size and record.group_settings.size % NUM_SETTINGS == 0:
            values = record.group_settings.astype(np.float64).reshape(-1, NUM_SETTINGS)
            with np.errstate(invalid="ignore"):  # a setting may be infinite
                found += [self._misset(view, values), self._changes.read(values)]
        return found

    # ------------------------------------------------------------------------------------------- what cannot be meant

    def _misset(self, view: StepView, values: Numbers) -> Reading:
        rates = view.record.rates
        rates = rates if rates.size == values.shape[0] else np.full(values.shape[0], np.nan)
        problems = [*self._impossible(values, rates), *self._decay(values, rates), *self._eps(view, values)]
        return Reading(
            name="optimizer_settings",
            value=float(len(problems)),
            limit=0.0,
            is_beyond=bool(problems),
            evidence="; ".join(problems),
        )

    @staticmethod
    def _impossible(values: Numbers, rates: Numbers) -> Iterator[str]:
        """Adam's betas in the wrong order, and numbers out of their range."""
        beta1, beta2, eps, decay = values.T
        swapped = (beta1 > beta2) & (beta2 > 0) & (beta2 < 1) & (beta1 < 1)
        if swapped.any():
            first = int(swapped.argmax())
            betas = f"beta1 ({beta1[first]:g}) is above beta2 ({beta2[first]:g})"
            yield f"{betas}{in_groups(swapped)}: the betas may be swapped"
        taken_for_each_other = (eps >= SWAPPED_EPS) & (decay > 0) & (decay <= SWAPPED_DECAY) & np.isfinite(beta2)
        if taken_for_each_other.any():
            first = int(taken_for_each_other.argmax())
            both = f"eps ({eps[first]:g}) and weight_decay ({decay[first]:g})"
            yield f"{both} may be swapped{in_groups(taken_for_each_other)}"
        for name, numbers, is_out in (
            ("beta1", beta1, (beta1 >= 1) | (beta1 < 0)),
            ("beta2", beta2, (beta2 >= 1) | (beta2 < 0)),
            ("eps", eps, eps < 0),
            ("weight_decay", decay, decay < 0),
            ("the learning rate", rates, rates < 0),
        ):
            if is_out.any():
                yield f"{name} is {numbers[int(is_out.argmax())]:g}{in_groups(is_out)}"

    def _decay(self, values: Numbers, rates: Numbers) -> Iterator[str]:
        """What a step takes of every weight; where it is added to an SGD's gradient, it comes to the same."""
        taken = rates * values[:, _DECAY]
        is_much = taken >= self._settings.optimizer_settings.most_decay
        if is_much.any():
            first = int(np.where(is_much, taken, -1.0).argmax())
            yield (
                f"weight decay takes {taken[first]:.2%} of the weights at every step{in_groups(is_much)} "
                f"(rate {rates[first]:g}, weight_decay {values[first, _DECAY]:g})"
            )

    def _eps(self, view: StepView, values: Numbers) -> Iterator[str]:
        """Adam divides by the gradient's size and eps: where eps is far larger, next to nothing is left of a step."""
        rule = self._settings.optimizer_settings
        is_adam = np.isfinite(values[:, _BETA2]) & np.isfinite(values[:, _EPS])
        if not is_adam.any():
            self._far = 0
            return
        eps = float(values[is_adam, _EPS].min())
        norm, loss = view.record.gradient_norm, view.record.loss
        size = self._elements(view.context)
        if norm is not None and norm > 0 and size and (loss is None or loss >= rule.least_loss):
            is_far = eps >= rule.eps_times * norm / math.sqrt(size)
            self._far = min(self._far + 1, rule.eps_readings) if is_far else 0
        if self._far >= rule.eps_readings:
            yield f"eps ({eps:g}) is over {rule.eps_times:g} times the gradient's elements, {self._far} readings long"

    def _elements(self, context: RunContext | None) -> int:
        """Elements of the trainable parameters; 0: not known."""
        if context is None:
            return 0
        if context.parameters is not self._table:
            rows = context.parameters.get("parameters")
            found = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list | tuple) else []
            sizes = [row.get("numel") for row in found if row.get("trainable", True)]
            self._num_elements = sum(size for size in sizes if isinstance(size, int) and size > 0)
            self._table = context.parameters
        return self._num_elements

    def forget(self) -> None:
        """A new stage may have other settings."""
        self._changes.forget()

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        return {"far": self._far, "changes": self._changes.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._far = int(state["far"])
        self._changes.restore(state["changes"])


def _gradients_lost(record: StepRecord) -> Iterator[Reading]:
    batches = record.count("batches")
    if not record.gradients_lost and (batches is None or batches <= record.ranks_seen):
        return  # one micro-batch a rank: nothing adds up
    lost = record.gradients_lost
    evidence = f"the gradients of earlier micro-batches were gone at {lost} of the step's micro-batches"
    yield Reading(name="gradients_lost", value=float(lost), limit=0.0, is_beyond=lost > 0, evidence=evidence)
