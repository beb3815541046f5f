"""Weights against their own movement: overwritten, swapped or frozen ones, and a state that the optimizer has lost.

An optimizer moves each weight by about its rate: what moves further was not moved by it. ``Updates`` sees weights that
do not move at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.running import Window
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView
from sidestep.worker.step_record import StepRecord

TINY: Final = 1e-30
LOST_BITS: Final = 0xFFFF
"""Bits of a float32 that bfloat16 does not have: where all sampled weights have 0 there, they are held in bfloat16."""


class Weights:
    """``weights_jump``, ``weights_frozen``, ``updates_rounded``, ``not_in_optimizer`` and ``optimizer_reset``."""

    name = "weights"

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings
        self._last: NDArray[np.float32] = np.zeros(0, np.float32)
        self._kind = 0
        self._norms: NDArray[np.float32] = np.zeros(0, np.float32)
        self._counted = -1.0
        self._counted_step = 0
        self._fresh = 0  # readings in a row at which the optimizer had counted one update at most
        self._reset()

    def _reset(self) -> None:
        jump = self._settings.weights_jump
        self._moves = Window(jump.median_readings)  # largest move of a sampled weight ...
        self._moves_per_rate = Window(jump.median_readings)  # ... and the same for a rate of 1
        self._changes = Window(jump.median_norms)  # largest relative change of a module's norm ...
        self._changes_per_rate = Window(jump.median_norms)
        self._sizes = Window(jump.median_readings)  # mean move for a rate of 1
        self._still = Window(self._settings.weights_frozen.median_readings)
        self._rates = 0.0  # sum of the rates since the norms that are remembered
        self._highest = 0.0  # rate so far

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge one step."""
        record = view.record
        rate = float(record.rates.max()) if record.rates.size else 0.0
        self._rates += rate if record.applied is not False else 0.0
        sampled = list(self._sampled(view, rate))
        far = next((each for each in sampled if each.name == "weights_jump"), None)
        view.weights_moved = None if far is None else far.value * self._settings.weights_jump.threshold
        found = [*sampled, *self._modules(record), *self._counts(record)]
        # Of the two that may say the same, the one that is further beyond.
        jumps = sorted((each for each in found if each.name == "weights_jump"), key=lambda each: -each.value)
        return [*jumps[:1], *(each for each in found if each.name != "weights_jump")]

    def _sampled(self, view: StepView, rate: float) -> Iterator[Reading]:
        """The same few weights as at the step before: how far they moved, and how many did not."""
        record, last, kind = view.record, self._last, self._kind
        self._last, self._kind = record.weights, record.weights_kind
        if kind != record.weights_kind or last.shape != record.weights.shape or not last.size:
            return
        if record.applied is False or not np.isfinite(record.weights).all() or not np.isfinite(last).all():
            return
        moves = np.abs(record.weights.astype(np.float64) - last)
        own = moves[: moves.size - record.weights_ungrouped]
        if own.size:
            self._take_size(view, float(own.mean()), rate)
            yield from self._far(float(own.max()), rate)
            yield from self._frozen(float((own == 0).mean()), rate)
            yield from self._rounded(record.weights, float((own == 0).mean()), rate)
        yield from self._held_by_nobody(own, moves[own.size :], rate)

    def _take_size(self, view: StepView, move: float, rate: float) -> None:
        """How far weights move for their rate: what an optimizer makes of gradients that are others than usual."""
        if move <= 0 or rate <= 0:
            return
        if len(self._sizes) >= self._settings.weights_jump.warmup:
            view.update_size = move / rate / self._sizes.median()
        self._sizes.add(move / rate)

    def _far(self, move: float, rate: float) -> Iterator[Reading]:
        rule = self._settings.weights_jump
        if move <= 0 or rate <= 0:
            return
        if len(self._moves) >= rule.warmup:
            usual = self._moves.median()
            # In half precision a weight moves by its last bit at any rate: so both must be far.
            value = min(move / usual, move / rate / self._moves_per_rate.median())
            evidence = f"a sampled weight moved by {move:.3g} in one step, usually by {usual:.3g} at most"
            yield Reading(
                name="weights_jump", value=value / rule.threshold, limit=1.0, is_beyond=value > rule.threshold,
                reference=usual, evidence=evidence,
            )  # fmt: skip
        self._moves.add(move)
        self._moves_per_rate.add(move / rate)

    def _frozen(self, share: float, rate: float) -> Iterator[Reading]:
        rule = self._settings.weights_frozen
        if rate <= 0 or share == 1.0:
            return  # no rate, or no update at all: `lr_zero` and `no_update` say that
        if len(self._still) >= rule.warmup:
            usual = self._still.median()
            evidence = f"{share:.0%} of the sampled weights did not move, usually {usual:.0%}"
            yield Reading(
                name="weights_frozen", value=share, limit=usual + rule.threshold,
                is_beyond=share > usual + rule.threshold, reference=usual, evidence=evidence,
            )  # fmt: skip
        self._still.add(share)

    def _rounded(self, weights: NDArray[np.float32], share: float, rate: float) -> Iterator[Reading]:
        """In bfloat16 an update below half of a weight's last bit leaves it as it was, however often it comes."""
        rule = self._settings.updates_rounded
        is_rising, self._highest = rate > self._highest, max(self._highest, rate)
        if rate <= 0 or (weights.view(np.uint32) & LOST_BITS).any():
            return
        evidence = (
            f"the weights are held in bfloat16, and {share:.0%} of the sampled ones stand still at a learning rate of "
            f"{rate:g}: their updates are below the last bit"
        )
        # A warm-up's first updates may be below the last bit, as those at the end of a schedule.
        is_beyond = share >= rule.threshold and not is_rising and rate >= rule.least_rate * self._highest
        yield Reading(name="updates_rounded", value=share, limit=rule.threshold, is_beyond=is_beyond, evidence=evidence)

    def _held_by_nobody(self, own: NDArray[np.float64], others: NDArray[np.float64], rate: float) -> Iterator[Reading]:
        """Trainable weights that the optimizer does not hold: a second one may, and then they move."""
        if not others.size or rate <= 0 or not own.any():
            return
        evidence = (
            f"{others.size} sampled weights of trainable parameters are in no group of the optimizer, and none of them "
            "moves, while the others do"
        )
        is_still = not others.any()
        yield Reading(
            name="not_in_optimizer", value=float((others == 0).mean()), limit=1.0, is_beyond=is_still, evidence=evidence
        )

    def _modules(self, record: StepRecord) -> Iterator[Reading]:
        """Norms of modules against those of some steps ago, in parts of what such steps usually change."""
        norms, last, rates = record.weight_norms, self._norms, self._rates
        if not norms.size:
            return
        self._norms, self._rates = norms, 0.0
        if last.shape != norms.shape or rates <= 0:
            return
        both = np.isfinite(norms) & np.isfinite(last) & (last > 0) & (norms >= 0)
        if not both.any():
            return
        change = np.where(both, np.abs(norms.astype(np.float64) - last) / np.maximum(last, TINY), 0.0)
        place = int(change.argmax())
        largest = float(change[place])
        rule = self._settings.weights_jump
        if len(self._changes) >= rule.warmup_norms:
            usual, per_rate = max(self._changes.median(), TINY), max(self._changes_per_rate.median(), TINY)
            value = min(largest / usual, largest / rates / per_rate)
            is_beyond = value > rule.threshold_norms and largest > rule.least_change
            evidence = f"the norm of the weights of {{module}} went from {last[place]:.4g} to {norms[place]:.4g}"
            yield Reading(
                name="weights_jump", value=value / rule.threshold_norms, limit=1.0, is_beyond=is_beyond, module=place,
                reference=float(last[place]), evidence=evidence,
            )  # fmt: skip
        self._changes.add(largest)
        self._changes_per_rate.add(largest / rates)

    def _counts(self, record: StepRecord) -> Iterator[Reading]:
        """The optimizer's own count of updates: it goes on with the steps, unless its state is lost."""
        counted, last, steps = record.optimizer_steps, self._counted, record.step - self._counted_step
        if counted is None or record.applied is False:
            return
        self._counted, self._counted_step = counted, record.step
        self._fresh = self._fresh + 1 if counted <= 1 else 0
        if last < 0:
            return
        rule = self._settings.optimizer_reset
        # Next to the step before it may stand still (a group without a gradient); over a resume it may have gone back.
        limit = last if steps == 1 else (last + steps) * rule.threshold if last + steps >= rule.least_steps else 0.0
        is_beyond = counted < limit or self._fresh >= rule.first_steps
        evidence = f"the optimizer's state counts {counted:.0f} updates, and counted {last:.0f} at the reading before"
        yield Reading(
            name="optimizer_reset", value=counted, limit=limit, is_beyond=is_beyond, reference=last, evidence=evidence
        )

    def resume(self) -> None:
        """Another attempt begins with the weights of a checkpoint; its optimizer's state should be of there too."""
        self._last, self._kind = np.zeros(0, np.float32), 0
        self._norms, self._rates = np.zeros(0, np.float32), 0.0

    def forget(self) -> None:
        """A new stage may train other weights, with an optimizer of its own."""
        self._reset()
        self.resume()
        self._counted, self._fresh = -1.0, 0

    def _windows(self) -> tuple[Window, ...]:
        return (self._moves, self._moves_per_rate, self._changes, self._changes_per_rate, self._still, self._sizes)

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        return {
            "last": [self._last.astype("<f4").tobytes(), self._kind, self._norms.astype("<f4").tobytes()],
            "windows": [window.values for window in self._windows()],
            "counted": [self._rates, self._counted, self._counted_step, self._fresh],
            "highest": self._highest,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        last, kind, norms = state["last"]
        self._last, self._kind, self._norms = np.frombuffer(last, "<f4"), int(kind), np.frombuffer(norms, "<f4")
        for window, values in zip(self._windows(), state["windows"], strict=True):
            window.values = [float(value) for value in values]
        rates, counted, step, fresh = state["counted"]
        self._rates, self._counted = float(rates), float(counted)
        self._counted_step, self._fresh = int(step), int(fresh)
        self._highest = float(state.get("highest", 0.0))
