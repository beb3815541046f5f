"""What went with a failure's first step: facts that tell causes apart and are no failures themselves.

At its first step a failure has not changed the model yet: the last update was made of healthy batches. So what the
model says at that very step tells where to look. As sure as before, though it costs more: the targets are wrong.
Another certainty: what it reads has changed, or what it computes, or its weights were damaged before. And a loss that
rises step by step is one that the updates themselves have raised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.running import RunningMoments, Window, median
from sidestep.worker.detectors.view import StepView
from sidestep.worker.step_record import StepRecord

RATE_READINGS: Final = 56
"""Rates whose median the newest one is compared with, ..."""
NEWEST_RATES: Final = 8
"""... and how many before it are left out: a linear warm-up of any length rises by less than 2.3 times."""
RATE_RISE: Final = 2.5
KNOWN_RATE: Final = 1.05
"""Times the highest rate so far up to which a rate is one that the run has already taken."""
REMEMBERED_STEPS: Final = 24
CHANGED: Final = 4.0
"""Standard deviations from which a number is another one."""
RAISED: Final = 2.5
"""Standard deviations from which a loss may be a failure's first."""
AS_USUAL: Final = 1.0
"""Standard deviations up to which a loss is the usual one."""
BETWEEN, FAR_BETWEEN = 2, 4
"""Steps that two raised ones of one rise may be apart, and those to one of at least ``ABRUPT_SHARE`` of its height:
where a part of the data is wrong, some batches hold little of it; what was raised by chance before was not as high."""
TARGET_STEPS: Final = 2
"""Steps whose targets or inputs must be others: a single batch may be made of rare ones."""
NEAR: Final = 5
"""Steps around a failure's first one that facts are looked for in ..."""
BEFORE: Final = 10
"""... and before the step at which a sum passed its limit, within which the loss must have risen."""
ABRUPT_SHARE: Final = 0.4
"""Part of its later height that a loss must have at its first step to be there at once, or to be of the same rise."""
STEEP: Final = 1.0
"""Standard deviations that the loss of the steps before a rise may be up by, on average, where it is there at once."""
GREW, SHRANK = 1.6, 0.5
"""Size of an update for its rate, in parts of the usual one and over three steps, from which gradients are others."""
ALL_MASKED: Final = 0.95
"""Share of the labelled positions behind the mask from which the mask is at fault, and not a label."""
MOVED: Final = 3.0
"""Times its usual move from which a sampled weight was moved by something else."""
LEARNED: Final = 16
"""Steps before a number has a usual value."""


@dataclass(slots=True, kw_only=True)
class _Seen:
    """One step."""

    step: int
    rate_rise: float = 0.0
    """Rate in parts of what it was."""
    loss: float = math.nan
    z_loss: float = 0.0
    z_entropy: float = math.nan
    """NaN: not known, or nothing to compare with yet."""
    z_norm: float = 0.0
    z_targets: float = 0.0
    z_inputs: float = 0.0
    masked: float = 0.0
    """Share of the labelled positions that the attention mask says are padding."""
    size: float = math.nan
    """Mean move of the sampled weights for their rate, in parts of the usual one; NaN: not known."""
    moved: float = math.nan
    """Largest move of a sampled weight in parts of the usual one; NaN: not known."""

    def plain(self) -> list[float]:
        return [getattr(self, name) for name in self.__slots__]


class OnsetFacts:
    """Keeps the last steps' facts."""

    def __init__(self) -> None:
        self._rates = Window(RATE_READINGS)
        self._newest_rates: list[float] = []
        self._moments = {
            name: RunningMoments(rate=0.02, floor=floor)
            for name, floor in (
                ("loss", 0.02), ("entropy", 0.01), ("norm", 0.05), ("cost", 0.05), ("length", 0.05),
                ("prompt", 0.03), ("pixel_mean", 0.02), ("pixel_deviation", 0.03), ("projector", 0.02),
                ("spread", 0.02),
            )
        }  # fmt: skip
        self._last: list[_Seen] = []
        self._highest_rate = 0.0  # but for the newest: a rate that ramps up has never been there
        self.has_restarted = False
        """Whether the rate has just come back up to where it has been: a cycle's next one begins."""

    def take(self, view: StepView) -> None:
        """Take a step in, after all families have read it."""
        record = view.record
        seen = _Seen(step=record.step)
        rate = float(record.rates.max()) if record.rates.size else 0.0
        if rate > 0:
            if len(self._newest_rates) >= NEWEST_RATES:
                self._rates.add(older := self._newest_rates.pop(0))
                self._highest_rate = max(self._highest_rate, older)
            if len(self._rates) >= RATE_READINGS:
                seen.rate_rise = rate / self._rates.median()
            self._newest_rates.append(rate)
        was_up = bool(self._last) and self._last[-1].rate_rise > RATE_RISE
        self.has_restarted = not was_up and seen.rate_rise > RATE_RISE and rate <= KNOWN_RATE * self._highest_rate
        if record.loss is not None and math.isfinite(record.loss):
            seen.loss = record.loss
            seen.z_loss = self._z("loss", record.loss) or 0.0
        z = self._z("entropy", _first_entropy(view))
        seen.z_entropy = math.nan if z is None else z
        seen.z_norm = self._z("norm", _log(record.gradient_norm)) or 0.0
        seen.z_targets = self._farthest({"cost": view.target_cost, "length": _length(record)})
        seen.z_inputs = self._farthest(
            {
                "prompt": _prompt_length(record),
                "pixel_mean": record.image_mean,
                "pixel_deviation": _log(record.image_deviation),
                "projector": _log(record.projector_rms),
                "spread": _log(record.projector_spread),
            }
        )
        masked, labelled = record.count("labels_masked"), record.count("labelled")
        seen.masked = masked / labelled if masked and labelled else 0.0
        if view.weights_moved is not None:
            seen.moved = view.weights_moved
        if view.update_size is not None:
            seen.size = view.update_size
        self._last = [*self._last, seen][-REMEMBERED_STEPS:]

    def _z(self, name: str, value: float | None) -> float | None:
        """Deviation from the usual value, which then learns; None where one of them is not known."""
        if value is None:
            return None
        moments = self._moments[name]
        z = moments.z(value) if moments.count >= LEARNED else None
        moments.update(value)
        return z

    def _farthest(self, values: Mapping[str, float | None]) -> float:
        return max(abs(self._z(name, value) or 0.0) for name, value in values.items())

    def around(self, step: int) -> frozenset[str]:
        """Return the facts of a failure that was first seen at ``step``, as far as they are remembered."""
        before = [each for each in self._last if each.step <= step + NEAR]
        near = [each for each in before if each.step >= step - NEAR]
        found: set[str] = set()
        if any(each.rate_rise > RATE_RISE for each in before):
            found.add("rate_raised")
        if any(each.z_norm > CHANGED for each in near):
            found.add("gradient_up")
        if sum(each.z_targets > CHANGED for each in near) >= TARGET_STEPS:
            found.add("targets_changed")
        if sum(each.z_inputs > CHANGED for each in near) >= TARGET_STEPS:
            found.add("inputs_changed")
        if any(each.masked > ALL_MASKED for each in near):
            found.add("all_masked")
        onset = self._onset(step)
        return frozenset(found if onset is None else found | self._of_rise(onset, step))

    def _of_rise(self, onset: int, step: int) -> set[str]:
        """Return the facts of a rise of the loss from the step at ``onset`` on, which was seen at ``step``."""
        first = self._last[onset]
        found = {"abrupt" if self._is_abrupt(onset) else "gradual"}
        if not math.isnan(first.z_entropy):
            found.add("outputs_changed" if abs(first.z_entropy) > CHANGED else "outputs_unchanged")
        if _comes_and_goes([each.z_loss for each in self._last[onset:] if each.step <= step]):
            found.add("intermittent")
        last = self._last[max(0, onset - 2) : onset + 1]
        sizes = [each.size for each in last if not math.isnan(each.size)]
        if sizes and not SHRANK <= sum(sizes) / len(sizes) <= GREW:
            found.add("updates_changed")
        moved = [each.moved for each in last if not math.isnan(each.moved)]
        if moved:
            found.add("weights_moved" if max(moved) > MOVED else "weights_steady")
        return found

    def _onset(self, step: int) -> int | None:
        """Return the place of the first step of the rise up to ``step``; None where the loss did not rise."""
        raised = [place for place, each in enumerate(self._last) if each.step <= step and each.z_loss > RAISED]
        if not raised or self._last[raised[-1]].step < step - BEFORE:
            return None
        onset, height = raised[-1], 0.0
        for place in reversed(raised):
            z = self._last[place].z_loss
            if onset - place <= (FAR_BETWEEN if z >= ABRUPT_SHARE * height else BETWEEN):
                onset, height = place, max(height, z)
        return onset

    def _is_abrupt(self, onset: int) -> bool:
        """Whether the loss was up at once."""
        before = [each.z_loss for each in self._last[max(0, onset - 4) : onset]]
        if before and sum(before) / len(before) > STEEP:
            return False
        earlier = [each.loss for each in self._last[max(0, onset - 8) : onset] if not math.isnan(each.loss)]
        later = [each.loss for each in self._last[onset:] if not math.isnan(each.loss)]
        if not earlier or not later:
            return True
        usual = median(earlier)
        return later[0] - usual >= ABRUPT_SHARE * (max(later) - usual)

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        return {
            "rates": [self._rates.values, self._newest_rates, [self._highest_rate]],
            "moments": {name: each.state() for name, each in self._moments.items()},
            "last": [each.plain() for each in self._last],
        }

    def restore(self, state: Any) -> None:
        """Take over a state; one of an older version has facts of another form, which a few steps bring back."""
        if not isinstance(state, Mapping):
            return
        self._rates.values, self._newest_rates, highest = ([float(rate) for rate in rates] for rates in state["rates"])
        self._highest_rate = highest[0]
        for name, saved in state["moments"].items():
            if name in self._moments:
                self._moments[name].restore(saved)
        self._last = [_seen(plain) for plain in state["last"]]


def _seen(plain: Sequence[Any]) -> _Seen:
    step, *numbers = plain
    names = _Seen.__slots__[1:]
    return _Seen(step=int(step), **{name: float(value) for name, value in zip(names, numbers, strict=True)})


def _comes_and_goes(rise: Sequence[float]) -> bool:
    """Whether a rise has a step as usual with steps far up on both sides: only some batches hold what is wrong."""
    far = [place for place, z in enumerate(rise) if z > CHANGED]
    return bool(far) and min(rise[far[0] : far[-1] + 1]) < AS_USUAL


def _first_entropy(view: StepView) -> float | None:
    """Mean entropy at the first token of the answers, which follows on what nobody answered: None without any.

    Later ones follow on the answer itself, and a wrong one makes the model unsure of how it goes on.
    """
    entropies = view.entropies
    if entropies is None or not view.starts.size:
        return view.record.entropy
    return float(entropies[view.starts].mean())


def _log(value: float | None) -> float | None:
    return math.log(value) if value is not None and value > 0 else None


def _length(record: StepRecord) -> float | None:
    """Logarithm of the labelled positions of an answer."""
    answers, labelled = record.count("answers"), record.count("labelled")
    return math.log(labelled / answers) if answers and labelled else None


def _prompt_length(record: StepRecord) -> float | None:
    """Logarithm of the positions of an answer's prompt."""
    positions, padding, labelled = map(record.count, ("positions", "padding", "labelled"))
    answers = record.count("answers")
    if not answers or positions is None or padding is None or labelled is None:
        return None
    return _log((positions - padding - labelled) / answers)


FACTS: Final[Mapping[str, str]] = {
    "rate_raised": "the learning rate had been raised",
    "outputs_unchanged": "the model was as sure as before when it began",
    "outputs_changed": "the model's own certainty changed when it began",
    "gradient_up": "the gradient rose with it",
    "targets_changed": "the targets were others when it began",
    "inputs_changed": "prompts or images were others when it began",
    "all_masked": "the attention mask calls everything padding that has a label",
    "updates_changed": "weights moved by more or less than usual for their rate",
    "abrupt": "the loss was up at once",
    "gradual": "the loss rose step by step",
    "intermittent": "some of the steps cost as much as before",
    "weights_moved": "weights had been moved by more than the optimizer moves them",
    "weights_steady": "weights had moved as usual",
}
"""Each fact in words."""
