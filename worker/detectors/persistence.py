"""From readings to what is said: k of m, arming and its deadline, once per episode, clean readings, cool-down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.rules import Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Firing:
    """A detector speaks."""

    reading: Reading
    step: int
    first_step: int
    """The first of the readings that made it speak."""
    never_healthy: bool = False
    """True where it speaks because it was never within its threshold."""


class Persistence:
    """One detector's state: idle, or active from the moment it spoke until it was clean for long enough."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._recent: list[int] = []  # step of each of the last readings, negative minus 1 where clean
        self._num_readings = 0
        self._clean = 0
        self._is_armed = rule.armed == 0
        self._said_never = False
        self._spoke_at = -1
        self.is_active = False

    @property
    def is_suspicious(self) -> bool:
        """Whether one of the last readings was beyond."""
        return any(step >= 0 for step in self._recent)

    def take(self, step: int, reading: Reading) -> Firing | None:
        """Take a reading in; returns what is to be said now, if anything."""
        self._num_readings += 1
        self._recent.append(step if reading.is_beyond else -1 - step)
        if len(self._recent) > self._rule.window:
            del self._recent[: -max(self._rule.window, 1)]
        self._clean = 0 if reading.is_beyond else self._clean + 1
        if not self._is_armed and self._clean >= self._rule.armed:
            self._is_armed = True
        if self.is_active:
            self.is_active = self._clean < self._rule.rearm
            return None
        if not reading.is_beyond:
            return None
        hits = [each for each in self._recent if each >= 0]
        if len(hits) < self._rule.hits or not self._may_speak(step):
            return None
        if not self._is_armed:
            self._said_never = True
        self.is_active, self._spoke_at = True, step
        return Firing(reading=reading, step=step, first_step=hits[0], never_healthy=not self._is_armed)

    def _may_speak(self, step: int) -> bool:
        if self._spoke_at >= 0 and step < self._spoke_at + self._rule.cool_steps:
            return False
        if self._is_armed:
            return True
        return not self._said_never and 0 < self._rule.deadline <= self._num_readings

    def forget(self) -> None:
        """Let go of the last readings; what was said stays said."""
        self._recent = []
        self._clean = 0

    def withdraw(self, step: int) -> None:
        """Be as if nothing had been said at ``step`` or after it: a new attempt begins there."""
        self.forget()
        if self._spoke_at >= step:
            self._spoke_at, self.is_active = -1, False

    def state(self) -> Json:
        """Return all that ``restore`` needs."""
        flags = self._is_armed + 2 * self._said_never + 4 * self.is_active
        return [list(self._recent), self._num_readings, self._clean, flags, self._spoke_at]

    def restore(self, state: Sequence[Any]) -> None:
        """Take over a state."""
        recent, readings, clean, flags, spoke_at = state
        self._recent = [int(step) for step in recent]
        self._num_readings, self._clean, self._spoke_at = int(readings), int(clean), int(spoke_at)
        self._is_armed, self._said_never, self.is_active = bool(flags & 1), bool(flags & 2), bool(flags & 4)
