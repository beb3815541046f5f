"""The raw loss against its own past: sudden rises, slow ones, single spikes, and a start that only gets worse."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.running import Cusum, Freeze, RunningMoments, Window
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView

EXPLAINED: Final = 3.0
"""Standard deviations over what the same targets usually cost up to which a spike is one of the data."""


class LossChanges:
    """``loss_cusum``, ``loss_regress``, ``worse_than_start`` and ``loss_spike``."""

    name = "loss"

    def __init__(self, settings: DetectorSettings) -> None:
        self._settings = settings
        self._reset()

    def _reset(self) -> None:
        rule = self._settings.loss_cusum
        self._moments = RunningMoments(rate=rule.rate, floor=rule.floor)
        self._sum = Cusum(allowance=rule.allowance, limit=rule.threshold, clip=rule.clip)
        self._freeze = Freeze(rule.freeze_steps)
        regress = self._settings.loss_regress
        self._smooth = RunningMoments(rate=regress.rate, floor=rule.floor, clip=math.inf)
        self._best = math.inf
        self._window = Window(self._settings.loss_spike.median_readings)
        self._start: list[float] = []  # the first loss and its standard error
        self._num_readings = 0

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge one step's mean loss."""
        loss = view.record.loss
        if loss is None or not math.isfinite(loss):
            return ()
        found = [*self._cumulative(loss, view.residual_deviations), *self._regressed(loss)]
        found += [*self._against_start(view, loss), *self._spiked(loss, view.residual_deviations)]
        self._window.add(loss)
        return found

    def _cumulative(self, loss: float, residual: float | None) -> Iterator[Reading]:
        """A rise that the step's own targets explain, as where a shard of harder ones comes again, is none."""
        if self._moments.count >= self._settings.loss_cusum.warmup:
            z = self._moments.z(loss)
            z = z if residual is None or residual > self._sum.allowance else min(z, residual)
            value = self._sum.add(z)
            evidence = (
                f"loss {loss:.3f}, usually {self._moments.mean:.3f} +- {self._moments.deviation:.3f} ({z:+.1f} sd)"
            )
            yield Reading(
                name="loss_cusum", value=value, limit=self._sum.limit, is_beyond=self._sum.is_beyond,
                reference=self._moments.mean, evidence=evidence,
            )  # fmt: skip
        if not self._freeze.holds(is_suspicious=self._sum.is_suspicious):
            self._moments.update(loss)

    def _regressed(self, loss: float) -> Iterator[Reading]:
        rule = self._settings.loss_regress
        self._smooth.update(loss)
        if self._smooth.count < rule.warmup:
            return
        mean = self._smooth.mean
        self._best = min(self._best, mean)
        error = self._smooth.deviation * math.sqrt(rule.rate / (2.0 - rule.rate))
        limit = max(rule.threshold, rule.share * self._best, rule.errors * error)
        rise = mean - self._best
        evidence = f"the mean of the last {round(1 / rule.rate)} losses is {mean:.3f}, {rise:.3f} above its best"
        yield Reading(
            name="loss_regress", value=rise, limit=limit, is_beyond=rise > limit, reference=self._best,
            evidence=evidence,
        )  # fmt: skip

    def _against_start(self, view: StepView, loss: float) -> Iterator[Reading]:
        """The first readings against the very first, where its rows tell how unlike its answers are."""
        rule = self._settings.worse_than_start
        self._num_readings = min(self._num_readings + 1, rule.readings + 1)
        if self._num_readings == 1 and view.starts.size >= rule.min_answers:
            self._start = [loss, view.loss_error]
        if not self._start or not 1 < self._num_readings <= rule.readings:
            return
        first, error = self._start
        limit = max(rule.threshold, rule.share * first, rule.errors * error)
        evidence = f"the loss is {loss:.3f} and was {first:.3f} before the first update"
        yield Reading(
            name="worse_than_start", value=loss - first, limit=limit, is_beyond=loss - first > limit, reference=first,
            evidence=evidence,
        )  # fmt: skip

    def _spiked(self, loss: float, residual: float | None) -> Iterator[Reading]:
        rule = self._settings.loss_spike
        z = self._window.robust_z(loss, floor=self._settings.loss_cusum.floor)
        if z is None or len(self._window) < rule.warmup:
            return
        middle = self._window.median()
        is_explained = residual is not None and residual < EXPLAINED
        is_beyond = z > rule.threshold and loss - middle > rule.rise and not is_explained
        evidence = f"loss {loss:.3f}, {z:.1f} robust standard deviations over the recent median {middle:.3f}"
        yield Reading(
            name="loss_spike", value=z, limit=rule.threshold, is_beyond=is_beyond, reference=middle, evidence=evidence
        )

    def forget(self) -> None:
        """Learn anew what the loss is."""
        self._reset()

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        return {
            "moments": self._moments.state(),
            "sum": self._sum.state(),
            "frozen": self._freeze.steps,
            "smooth": self._smooth.state(),
            "best": self._best,
            "window": self._window.values,
            "start": [self._start, self._num_readings],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._moments.restore(state["moments"])
        self._sum.restore(state["sum"])
        self._freeze.steps = int(state["frozen"])
        self._smooth.restore(state["smooth"])
        self._best = float(state["best"])
        self._window.values = [float(value) for value in state["window"]]
        # A state from before there was a start is one of a run that has left it.
        start, self._num_readings = state.get("start", ([], self._settings.worse_than_start.readings + 1))
        self._start = [float(value) for value in start]
