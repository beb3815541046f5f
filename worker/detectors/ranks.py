"""One rank against the others: corrupted data, a broken device or a different batch show where a mean hides them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.running import MAD_TO_SD, Cusum, RunningMoments, median
from sidestep.worker.detectors.settings import DetectorSettings
from sidestep.worker.detectors.view import StepView

MIN_ROWS: Final = 4
"""Rows that a rank must have at a step."""
SPREAD_RATE: Final = 0.02
OWN_RATE: Final = 0.02
"""Weight of a rank's newest deviation in what is usual for it."""


class RankDifferences:
    """``rank_outlier``: each rank's composition-adjusted loss minus the median over ranks, added up."""

    name = "ranks"

    def __init__(self, settings: DetectorSettings) -> None:
        self._rule = settings.rank_outlier
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[int, float] = {}
        self._own: dict[int, RunningMoments] = {}  # usual deviation of each rank, of one row
        self._spread = 0.0  # usual median absolute deviation over ranks, of one row
        self._count = 0

    def read(self, view: StepView) -> Sequence[Reading]:
        """Judge one step."""
        residuals, record = view.residuals, view.record
        ends = np.cumsum(record.rank_rows)
        if residuals is None or ends.size < 2 or int(ends[-1]) != residuals.size:
            return ()
        means: dict[int, tuple[float, int]] = {}
        for rank, end, rows in zip(record.ranks.tolist(), ends.tolist(), record.rank_rows.tolist(), strict=True):
            if rank >= 0 and rows >= MIN_ROWS:
                means[rank] = (float(residuals[end - rows : end].mean()), rows)
        if len(means) < 2:
            return ()
        middle = median([mean for mean, _ in means.values()])
        # A rank's mean over n rows varies by 1 / sqrt(n): deviations are compared as those of one row.
        deviations = {rank: (mean - middle) * math.sqrt(rows) for rank, (mean, rows) in means.items()}
        found = self._judge(deviations) if self._count >= self._rule.warmup else []
        self._learn(deviations)
        self._learn_own(deviations)
        return found

    def _judge(self, deviations: Mapping[int, float]) -> list[Reading]:
        """A rank may have harder data than the others all along: what is judged is what it has become."""
        rule = self._rule
        scale = max(self._spread * MAD_TO_SD, rule.floor)
        for rank, deviation in deviations.items():
            cusum = Cusum(allowance=rule.allowance, limit=rule.threshold, clip=rule.clip)
            cusum.total = self._sums.get(rank, 0.0)
            own = self._own.get(rank)
            level, scatter = (max(own.mean, 0.0), own.deviation) if own is not None else (0.0, scale)
            self._sums[rank] = cusum.add((deviation - level) / max(scale, scatter))
        self._sums = dict(sorted(self._sums.items()))
        highest = max(self._sums, key=lambda rank: (self._sums[rank], -rank))
        second = max((total for rank, total in self._sums.items() if rank != highest), default=0.0)
        value = self._sums[highest]
        evidence = f"rank {highest} costs more than the others, step after step (sum {value:.1f}, next {second:.1f})"
        return [
            Reading(
                name="rank_outlier", value=value, limit=rule.threshold,
                is_beyond=value > rule.threshold and second < rule.second, reference=second, evidence=evidence,
            )
        ]  # fmt: skip

    def _learn(self, deviations: Mapping[int, float]) -> None:
        """With two ranks both deviate alike; with more, half of them say what is usual."""
        spread = median([abs(deviation) for deviation in deviations.values()])
        if self._count >= self._rule.warmup:
            spread = min(spread, 3.0 * max(self._spread, self._rule.floor))
        self._count += 1
        self._spread += max(SPREAD_RATE, 1.0 / self._count) * (spread - self._spread)

    def _learn_own(self, deviations: Mapping[int, float]) -> None:
        """Each rank's own level and scatter, not while it is under suspicion."""
        for rank, deviation in deviations.items():
            if self._sums.get(rank, 0.0) <= self._rule.second:
                self._own.setdefault(rank, self._new_own()).update(deviation)
        self._own = dict(sorted(self._own.items()))

    def _new_own(self) -> RunningMoments:
        return RunningMoments(rate=OWN_RATE, floor=self._rule.floor)

    def forget(self) -> None:
        """Learn anew how ranks differ."""
        self._reset()

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        sums = [list(self._sums), list(self._sums.values())]
        own = [list(self._own), [each.state() for each in self._own.values()]]
        return {"sums": sums, "own": own, "spread": self._spread, "count": self._count}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        ranks, sums = state["sums"]
        self._sums = {int(rank): float(total) for rank, total in zip(ranks, sums, strict=True)}
        ranks, levels = state.get("own", ((), ()))
        self._own = {int(rank): self._new_own() for rank in ranks}
        for own, level in zip(self._own.values(), levels, strict=True):
            own.restore(level)
        self._spread, self._count = float(state["spread"]), int(state["count"])
