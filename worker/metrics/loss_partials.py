"""The losses of a step that is too large to be kept token by token: partials and a histogram (docs/metrics.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.limits import LOSS_HISTOGRAM_BINS, LOSS_HISTOGRAM_MAX_NATS
from sidestep.protocol.merge import Moments, merge_moments
from sidestep.protocol.messages import Losses, Role

NUM_PARTIALS = 10
"""Length of ``Losses.partials``."""

_BIN_NATS = LOSS_HISTOGRAM_MAX_NATS / LOSS_HISTOGRAM_BINS


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPartials:
    """What is kept of the finite losses of one micro-batch, or of many."""

    moments: Moments = field(default_factory=Moments)
    low: float = math.inf
    high: float = -math.inf
    num_nonfinite: int = 0
    first_count: int = 0
    first_sum: float = 0.0
    later_count: int = 0
    later_sum: float = 0.0
    bins: NDArray[np.int64]
    """Counts over [0, 64) nats; the last bin holds what is larger too."""

    @staticmethod
    def are_sound(batch: Losses) -> bool:
        """Whether ``batch.partials`` [10] agree with themselves and with ``batch.histogram``."""
        count, mean, m2, low, high, nonfinite, first, first_sum, later, later_sum = batch.partials.tolist()
        counts = (count, nonfinite, first, later)
        if not all(math.isfinite(c) and c >= 0 and c == int(c) for c in counts) or count != batch.histogram.sum():
            return False
        return not count or (all(map(math.isfinite, (mean, m2, low, high, first_sum, later_sum))) and m2 >= 0)

    @classmethod
    def of(cls, batch: Losses) -> Self:
        """Read a micro-batch's partials, or make them where its losses came one by one."""
        if not batch.histogram.size:
            return cls._of_tokens(batch)
        count, mean, m2, low, high, nonfinite, first, first_sum, later, later_sum = batch.partials.tolist()
        if not count:
            return cls(bins=np.zeros(LOSS_HISTOGRAM_BINS, np.int64), num_nonfinite=int(nonfinite))
        return cls(
            moments=Moments(int(count), mean, m2),
            low=low,
            high=high,
            num_nonfinite=int(nonfinite),
            first_count=int(first),
            first_sum=first_sum,
            later_count=int(later),
            later_sum=later_sum,
            bins=batch.histogram.astype(np.int64),
        )

    @classmethod
    def _of_tokens(cls, batch: Losses) -> Self:
        finite = np.isfinite(batch.losses)
        values = batch.losses[finite].astype(np.float64)
        first = values[(batch.roles[finite] & int(Role.FIRST)) != 0]
        later = values[(batch.roles[finite] & int(Role.LATER)) != 0]
        places = np.clip(values / _BIN_NATS, 0, LOSS_HISTOGRAM_BINS - 1).astype(np.int64)
        return cls(
            moments=Moments.from_values(values),
            low=float(values.min(initial=math.inf)),
            high=float(values.max(initial=-math.inf)),
            num_nonfinite=int(finite.size - finite.sum()),
            first_count=first.size,
            first_sum=float(first.sum()),
            later_count=later.size,
            later_sum=float(later.sum()),
            bins=np.bincount(places, minlength=LOSS_HISTOGRAM_BINS).astype(np.int64),
        )

    @classmethod
    def merged(cls, parts: Sequence[Self]) -> Self:
        """Return the partials of all ``parts`` together."""
        return cls(
            moments=merge_moments(part.moments for part in parts),
            low=min(part.low for part in parts),
            high=max(part.high for part in parts),
            num_nonfinite=sum(part.num_nonfinite for part in parts),
            first_count=sum(part.first_count for part in parts),
            first_sum=math.fsum(part.first_sum for part in parts),
            later_count=sum(part.later_count for part in parts),
            later_sum=math.fsum(part.later_sum for part in parts),
            bins=np.sum([part.bins for part in parts], axis=0),
        )

    @property
    def first_mean(self) -> float | None:
        """Mean loss of the answers' first tokens; None without one."""
        return self.first_sum / self.first_count if self.first_count else None

    @property
    def later_mean(self) -> float | None:
        """Mean loss of the later tokens; None without one."""
        return self.later_sum / self.later_count if self.later_count else None

    def high_share(self, sigmas: float) -> float | None:
        """Share of losses over mean + ``sigmas`` std; within a bin they are taken as evenly spread."""
        mean, std = self.moments.value_mean, self.moments.std
        if mean is None or std is None:
            return None
        threshold = mean + sigmas * std
        if not math.isfinite(threshold):
            return None
        if threshold >= self.high:
            return 0.0
        place = min(max(int(threshold / _BIN_NATS), 0), LOSS_HISTOGRAM_BINS - 1)
        low = max(place * _BIN_NATS, self.low)
        high = self.high if place == LOSS_HISTOGRAM_BINS - 1 else min((place + 1) * _BIN_NATS, self.high)
        above_in_bin = min(max((high - threshold) / (high - low), 0.0), 1.0) if high > low else 0.0
        above = float(self.bins[place + 1 :].sum()) + above_in_bin * float(self.bins[place])
        return above / self.moments.count
