"""Settings of the optimizer that are not what they were: a resume with another configuration, a wrong branch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sidestep.protocol.messages import Json
from sidestep.protocol.signals import GROUP_SETTINGS
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.update_rules import Changed

Flags = NDArray[np.bool_]
Numbers = NDArray[np.float64]

NUM_SETTINGS: Final = len(GROUP_SETTINGS)
_BETAS: Final = tuple(GROUP_SETTINGS.index(name) for name in ("beta1", "beta2"))
LITTLE: Final = 0.01
"""Relative change up to which a setting is what it was: the last bits of a number."""
_NAMED: Final = 3
"""Groups that are named at most."""


class SettingChanges:
    """``settings_changed``: each setting of each group against itself; other groups than before are learned anew."""

    def __init__(self, rule: Changed) -> None:
        self._rule = rule
        self._values: Numbers = np.zeros((0, NUM_SETTINGS))
        self._still: NDArray[np.int64] = np.zeros((0, NUM_SETTINGS), np.int64)
        """Steps that each has stood still, as far as it matters."""
        self._former: Numbers = np.zeros((0, NUM_SETTINGS))
        """What each was before a change that is not yet sure; NaN: there is none."""
        self._is_scheduled: Flags = np.zeros((0, NUM_SETTINGS), np.bool_)

    def read(self, values: Numbers) -> Reading:
        """Judge one step's ``GROUP_SETTINGS`` [groups, 4], NaN where one is not known."""
        if values.shape != self._values.shape:
            self._learn(values)
        before, rule = self._values, self._rule
        has_moved = (values != before) & ~(np.isnan(values) & np.isnan(before))
        waits = ~np.isnan(self._former)
        self._is_scheduled |= has_moved & waits  # it moved again at once: a schedule has begun
        self._former[has_moved] = np.nan
        is_told = has_moved & ~waits & ~self._is_scheduled & (self._still >= rule.still_steps)
        is_far = _is_far(before, values, rule.threshold)
        self._is_scheduled |= is_told & ~is_far & _is_far(before, values, LITTLE)  # it goes on in parts
        is_told &= is_far
        self._former[is_told] = before[is_told]
        self._still = np.where(has_moved, 0, np.minimum(self._still + 1, max(rule.still_steps, rule.confirm_steps)))
        self._values = values
        is_sure = ~np.isnan(self._former) & (self._still >= rule.confirm_steps)
        evidence = "; ".join(self._in_words(is_sure)) if is_sure.any() else ""
        self._is_scheduled |= is_sure  # said once; what changes again and again is on a schedule
        self._former[is_sure] = np.nan
        return Reading(
            name="settings_changed",
            value=float(is_sure.sum()),
            limit=0.0,
            is_beyond=bool(is_sure.any()),
            evidence=evidence,
        )

    def _in_words(self, is_sure: Flags) -> Iterator[str]:
        for place, name in enumerate(GROUP_SETTINGS):
            groups = is_sure[:, place]
            if groups.any():
                first = int(groups.argmax())
                former, now = self._former[first, place], self._values[first, place]
                steps = self._still[first, place]
                yield f"{name} went from {former:g} to {now:g}{in_groups(groups)}, {steps} steps ago"

    def _learn(self, values: Numbers) -> None:
        self._values = values
        self._still = np.zeros(values.shape, np.int64)
        self._former = np.full(values.shape, np.nan)
        self._is_scheduled = np.zeros(values.shape, np.bool_)

    def forget(self) -> None:
        """A new stage may have other settings."""
        self._learn(np.zeros((0, NUM_SETTINGS)))

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        return [
            self._values.astype("<f4").tobytes(),
            self._still.reshape(-1).tolist(),
            self._former.astype("<f4").tobytes(),
            self._is_scheduled.astype(np.uint8).tobytes(),
        ]

    def restore(self, state: Any) -> None:
        """Take over a state."""
        values, still, former, is_scheduled = state
        self._learn(np.frombuffer(values, "<f4").astype(np.float64).reshape(-1, NUM_SETTINGS))
        shape = self._values.shape
        self._still = np.array([int(each) for each in still], np.int64).reshape(shape)
        self._former = np.frombuffer(former, "<f4").astype(np.float64).reshape(shape)
        self._is_scheduled = np.frombuffer(is_scheduled, np.uint8).reshape(shape).astype(np.bool_)


def _is_far(before: Numbers, now: Numbers, threshold: float) -> Flags:
    """Whether known numbers have changed by more than a part of the larger one, or betas of what is left to 1."""
    size = np.maximum(np.abs(before), np.abs(now))
    left = np.full(before.shape, np.inf)
    left[:, _BETAS] = np.abs(1.0 - before[:, _BETAS])
    change = np.abs(now - before)
    is_far: Flags = np.isfinite(before) & np.isfinite(now) & (change > threshold * np.minimum(size, left))
    return is_far


def in_groups(groups: Flags) -> str:
    """Return words that name the groups; none where it is all of them."""
    if groups.all():
        return ""
    places = [str(place) for place in np.flatnonzero(groups)]
    more = " and others" if len(places) > _NAMED else ""
    return f" in group{'s' if len(places) > 1 else ''} {', '.join(places[:_NAMED])}{more}"
