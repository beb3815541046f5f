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
BFLOAT16_BITS: Final = 8
"""Of its fraction, the first one included."""


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
        self._still_for: NDArray[np.int32] = np.zeros(0, np.int32)  # steps that each sampled weight has stood still
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
        self._has_seen_images = False
        self._before, self._falls = 0.0, 0  # the rate of the step before, and steps in a row at which it fell

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
            yield from self._far(own, record.weights[: own.size], rate)
            self._has_seen_images = self._has_seen_images or record.images > 0
            if record.images or not self._has_seen_images:  # without one, what sees images has no gradient
                yield from self._frozen(float((own == 0).mean()), rate)
            yield from self._rounded(record.weights, own == 0, rate)
        yield from self._held_by_nobody(own, moves[own.size :], rate)

    def _take_size(self, view: StepView, move: float, rate: float) -> None:
        """How far weights move for their rate: what an optimizer makes of gradients that are others than usual."""
        if move <= 0 or rate <= 0:
            return
        if len(self._sizes) >= self._settings.weights_jump.warmup:
            view.update_size = move / rate / self._sizes.median()
        self._sizes.add(move / rate)

    def _far(self, moves: NDArray[np.float64], weights: NDArray[np.float32], rate: float) -> Iterator[Reading]:
        rule, move = self._settings.weights_jump, float(moves.max())
        if move <= 0 or rate <= 0:
            return
        if len(self._moves) >= rule.warmup:
            usual = self._moves.median()
            # In half precision a weight moves by its last bit at any rate: so both must be far, and by more than that.
            far = float(np.where(moves > _last_bits(weights, moves), moves, 0.0).max())
            value = min(far / usual, far / rate / self._moves_per_rate.median())
            # An outer optimizer moves them from time to time: so further than any of the last steps did, too.
            value = min(value, far / self._moves.largest() * rule.threshold / rule.beyond)
            evidence = f"a sampled weight moved by {far:.3g} in one step, usually by {usual:.3g} at most"
            yield Reading(
                name="weights_jump", value=value / rule.threshold, limit=1.0, is_beyond=value > rule.threshold,
                reference=usual, evidence=evidence,
            )  # fmt: skip
        self._moves.add(move)
        self._moves_per_rate.add(move / rate)

    def _frozen(self, share: float, rate: float) -> Iterator[Reading]:
        rule = self._settings.weights_frozen
        self._falls = min(self._falls + 1, rule.falling_steps) if rate < self._before else 0
        self._before = rate
        is_end = rate <= rule.least_rate * self._highest and self._falls >= rule.falling_steps
        if rate <= 0 or share == 1.0 or is_end:
            return  # no rate, or no update at all: `lr_zero` and `no_update` say that
        if len(self._still) >= rule.warmup:
            usual = self._still.median()
            evidence = f"{share:.0%} of the sampled weights did not move, usually {usual:.0%}"
            yield Reading(
                name="weights_frozen", value=share, limit=usual + rule.threshold,
                is_beyond=share > usual + rule.threshold, reference=usual, evidence=evidence,
            )  # fmt: skip
        self._still.add(share)

    def _rounded(self, weights: NDArray[np.float32], is_still: NDArray[np.bool_], rate: float) -> Iterator[Reading]:
        """In bfloat16 an update below half of a weight's last bit leaves it as it was, however often it comes.

        Where updates are rounded by chance, or what is lost is kept for later, most weights stand still at a step as
        well, but others at the next: so it is counted for how long each has not moved.
        """
        rule = self._settings.updates_rounded
        is_rising, self._highest = rate > self._highest, max(self._highest, rate)
        if rate <= 0 or not is_half(weights):
            return
        # A warm-up's first updates may be below the last bit, as those at the end of a schedule.
        if is_rising or rate < rule.least_rate * self._highest or self._still_for.shape != is_still.shape:
            self._still_for = np.zeros(is_still.size, np.int32)
        self._still_for = np.where(is_still, np.minimum(self._still_for + 1, rule.still_steps), 0).astype(np.int32)
        share = float((self._still_for >= rule.still_steps).mean())
        evidence = (
            f"the weights are held in bfloat16, and {share:.0%} of the sampled ones have not moved in "
            f"{rule.still_steps} steps, at a learning rate of {rate:g}: their updates are below the last bit"
        )
        is_beyond = share >= rule.threshold
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
        if counted is None or counted <= 0 or record.applied is False:
            return  # 0 after an update is no count of them: such an optimizer counts elsewhere
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
        self._still_for = np.zeros(0, np.int32)

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
            "still": self._still_for.tolist(),
            "images": self._has_seen_images,
            "falls": [self._before, self._falls],
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
        self._still_for = np.array([int(each) for each in state.get("still", ())], np.int32)
        self._has_seen_images = bool(state.get("images", False))
        before, falls = state.get("falls", (0.0, 0))
        self._before, self._falls = float(before), int(falls)


def is_half(weights: NDArray[np.float32]) -> bool:
    """Return whether weights are held in bfloat16: nothing stands behind its last bit."""
    return not (weights.view(np.uint32) & LOST_BITS).any()


def _last_bits(weights: NDArray[np.float32], moves: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a weight in bfloat16 moves by where its last bit changes; 0 for weights that are held in more."""
    if not is_half(weights):
        return np.zeros(weights.size)
    _, exponents = np.frexp(np.abs(weights.astype(np.float64)) + moves)
    bits: NDArray[np.float64] = np.ldexp(1.0, exponents - BFLOAT16_BITS)
    return bits
