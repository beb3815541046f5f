"""Gradients against their own past: the whole norm, and each module's part of it.

The raw norm is the fastest signal and the noisiest (docs/detection.md): so it takes several readings, a logarithm, a
robust deviation and a rise that means something, and nothing is said of a loss of almost 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.running import MAD_TO_SD, Window, median
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView
from sidestep.worker.module_flags import TRAINABLE, VISUAL
from sidestep.worker.step_record import StepRecord

LOG_FLOOR: Final = 0.05
"""Smallest robust deviation of a norm's logarithm."""
TINY: Final = 1e-30
USUAL_LOSSES: Final = 32
"""Last losses whose median is the usual one: a burst raises its own."""
QUIET_FROM: Final = 8
SEVERAL: Final = 2
"""Modules of which most can rise together."""


class _Spike(NamedTuple):
    """One module's gradient beside its own past; the largest is the one that deviates most."""

    z: float
    place: int
    """Of the module."""
    rise: float
    """Of the norm's logarithm, over its median."""


class GradientChanges:
    """``grad_spike``, ``grad_vanish``, ``grad_fall``, ``module_dead``, ``module_spike`` and ``modules_spike``."""

    name = "gradients"

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings
        self._reset()

    def _reset(self) -> None:
        self._norms = Window(self._settings.grad_spike.median_readings)
        self._losses = Window(USUAL_LOSSES)
        self._levels: list[tuple[float, float]] = []  # log of the norm, and the loss, of the last steps with both
        self._log_norms: list[Window] = []  # of each module, at the readings in which it had a gradient
        self._without: list[int] = []  # readings in a row in which each module had none
        self._is_new_stage = False
        self._has_seen_images = False

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge one step."""
        record = view.record
        if record.applied is False:
            return ()
        rule = self._settings.grad_spike
        is_quiet = len(self._losses) >= QUIET_FROM and self._losses.median() < rule.least_loss
        if record.loss is not None:
            self._losses.add(record.loss)
        self._has_seen_images = self._has_seen_images or record.images > 0
        return [
            *self._whole(record, is_quiet=is_quiet),
            *self._fallen(record),
            *self._modules(record, is_quiet=is_quiet),
        ]

    def _whole(self, record: StepRecord, *, is_quiet: bool) -> Iterator[Reading]:
        norm = record.gradient_norm
        if norm is None or norm <= 0:
            return
        value = math.log(norm)
        z = self._norms.robust_z(value, LOG_FLOOR)
        up, down = self._settings.grad_spike, self._settings.grad_vanish
        if z is not None and len(self._norms) >= up.warmup and not is_quiet:
            rise = value - self._norms.median()
            evidence = f"gradient norm {norm:.3g}, {math.exp(rise):.3g} times the median of the last"
            yield Reading(
                name="grad_spike", value=z, limit=up.threshold, is_beyond=z > up.threshold and rise > up.rise,
                evidence=evidence,
            )  # fmt: skip
            is_down = -z > down.threshold and -rise > down.rise
            yield Reading(name="grad_vanish", value=-z, limit=down.threshold, is_beyond=is_down, evidence=evidence)
        self._norms.add(value)

    def _fallen(self, record: StepRecord) -> Iterator[Reading]:
        """A lasting fall that the loss does not explain: a part of the gradient is lost, or no part of it is added.

        A rise is not judged: gradients of a healthy run grow while its loss stands (measured).
        """
        norm, loss, rule = record.gradient_norm, record.loss, self._settings.grad_fall
        if norm is None or norm <= 0 or loss is None or not math.isfinite(norm + loss):
            return
        self._levels = [*self._levels, (math.log(norm), loss)][-(rule.before + rule.recent) :]
        if len(self._levels) < rule.before + rule.recent:
            return
        before, recent = self._levels[: rule.before], self._levels[rule.before :]
        usual, usual_loss = (median([each[place] for each in before]) for place in (0, 1))
        level, level_loss = (median([each[place] for each in recent]) for place in (0, 1))
        spread = max(MAD_TO_SD * median([abs(each[0] - usual) for each in before]), LOG_FLOOR)
        limit = max(rule.threshold, rule.deviations * spread)
        is_steady = min(usual_loss, level_loss) >= rule.least_loss and (
            abs(math.log(level_loss / usual_loss)) <= rule.steady
        )
        evidence = (
            f"the gradient's norm is {math.exp(level):.3g} over {rule.recent} steps and was {math.exp(usual):.3g}, the "
            f"loss is {level_loss:.3g} and was {usual_loss:.3g}"
        )
        value = usual - level
        yield Reading(
            name="grad_fall", value=value, limit=limit, is_beyond=is_steady and value > limit, reference=usual,
            evidence=evidence,
        )  # fmt: skip

    def _modules(self, record: StepRecord, *, is_quiet: bool) -> Iterator[Reading]:
        norms = [float(norm) for norm in record.module_norms]
        if not norms:
            return
        if len(self._log_norms) != len(norms):
            self._log_norms = [Window(self._settings.module_dead.median_readings) for _ in norms]
            self._without = [0] * len(norms)
        whole = math.sqrt(sum(norm * norm for norm in norms if norm > 0)) or TINY
        dead, least = -1, math.inf
        spikes: list[_Spike] = []
        for place, norm in enumerate(norms):
            if not self._is_judged(record, place):
                continue
            share = max(norm, 0.0) / whole
            ratio = self._ratio(place, norm, share)
            if ratio is not None and ratio < least:
                dead, least = place, ratio
            if norm > 0:
                spike = self._spike(place, norm)
                spikes += [] if spike is None else [spike]
                self._log_norms[place].add(math.log(norm))
        limit = self._settings.module_dead.threshold
        if dead >= 0:
            evidence = f"{{module}} has {max(norms[dead], 0.0):.3g} of a gradient of {whole:.3g}"
            is_dead = least <= 0 or (least < limit and not is_quiet)
            yield Reading(
                name="module_dead", value=least, limit=limit, is_beyond=is_dead, module=dead, evidence=evidence
            )
        if spikes:
            yield from self._spiking(spikes, is_quiet=is_quiet)

    def _spiking(self, spikes: Sequence[_Spike], *, is_quiet: bool) -> Iterator[Reading]:
        """One module's spike, and whether most modules rose at the same step: then it is not this module's own."""
        rule = self._settings.module_spike
        z, place, rise = max(spikes)
        is_beyond = z > rule.threshold and rise > rule.rise and not is_quiet
        evidence = f"the gradient of {{module}} is {_times(rise)} times its median"
        yield Reading(
            name="module_spike", value=z, limit=rule.threshold, is_beyond=is_beyond, module=place, evidence=evidence
        )
        if len(spikes) < SEVERAL:
            return
        limit = self._settings.modules_spike.threshold
        rises = sorted((each.rise for each in spikes), reverse=True)
        shared = rises[len(rises) // 2]  # more than half of the modules rose by this much
        num_risen = sum(each > limit for each in rises)
        evidence = (
            f"the gradients of {num_risen} of {len(rises)} modules are {_times(shared)} times their median or more"
        )
        yield Reading(
            name="modules_spike", value=shared, limit=limit, is_beyond=is_beyond and shared > limit, evidence=evidence
        )

    def _is_judged(self, record: StepRecord, place: int) -> bool:
        """A module that is frozen, or that sees images where there are none, is not expected to have a gradient."""
        flags = record.module_flags[place] if place < len(record.module_flags) else 0
        norm = float(record.module_norms[place])
        if math.isnan(norm) or (flags & VISUAL and self._has_seen_images and not record.images):
            return False
        had = len(self._log_norms[place]) > 0
        is_never = norm <= 0 and not had
        if is_never and (not flags & TRAINABLE or self._is_new_stage):
            return False
        return not (is_never and flags & VISUAL and not self._has_seen_images)

    def _ratio(self, place: int, norm: float, share: float) -> float | None:
        """The module's norm in parts of its median; 0 without a gradient, None where that cannot be told yet."""
        rule = self._settings.module_dead
        self._without[place] = min(self._without[place] + 1, 1 << 20) if norm <= 0 else 0
        known = self._log_norms[place]
        if norm <= 0:
            is_told = len(known) > 0 or norm == 0 or self._without[place] >= rule.never_hits - rule.hits
            return 0.0 if is_told else None
        if len(known) < rule.hits:
            return None
        usual = known.median()
        # The whole gradient may shrink as the task is learned: only what shrinks more than all of it is dead.
        return max(norm / math.exp(usual), share)

    def _spike(self, place: int, norm: float) -> _Spike | None:
        known, value = self._log_norms[place], math.log(norm)
        z = known.robust_z(value, LOG_FLOOR)
        if z is None or math.isnan(z):  # not a number: an infinite norm, as most of the last ones were
            return None
        return _Spike(z, place, value - known.median())

    def forget(self) -> None:
        """Another stage may freeze other modules: what has no gradient at its start is taken for frozen."""
        self._reset()
        self._is_new_stage = True

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        return {
            "norms": self._norms.values,
            "losses": self._losses.values,
            "levels": [list(level) for level in self._levels],
            "shares": [window.values for window in self._log_norms],
            "without": self._without,
            "flags": [self._is_new_stage, self._has_seen_images],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._norms.values = [float(value) for value in state["norms"]]
        self._losses.values = [float(value) for value in state["losses"]]
        self._levels = [(float(norm), float(loss)) for norm, loss in state.get("levels", ())]
        self._log_norms = []
        for values in state["shares"]:
            window = Window(self._settings.module_dead.median_readings)
            window.values = [float(value) for value in values]
            self._log_norms.append(window)
        self._without = [int(count) for count in state["without"]]
        self._is_new_stage, self._has_seen_images = map(bool, state["flags"])


def _times(rise: float) -> str:
    return f"{math.exp(min(rise, 50.0)):.3g}"
