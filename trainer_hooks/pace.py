"""How long the publisher's thread rests between two ticks: long enough to cost nothing, short enough to lose little.

In a thread that wakes among a training step's cold caches a tick costs a tenth of a millisecond and more, most of it
outside our code (docs/overhead.md). Ticks that find nothing, or no room in the socket, are what this saves.
"""

from __future__ import annotations

from sidestep.protocol.limits import PUBLISHER_IDLE_TICK_SECONDS, PUBLISHER_TICK_SECONDS

_SHARE_OF_A_STEP = 0.5
"""Two ticks a step: what a step handed over is with the socket before the next one ends."""
_LONGEST_STEP_SECONDS = PUBLISHER_IDLE_TICK_SECONDS / _SHARE_OF_A_STEP
"""Longer steps, and an evaluation between two steps, count as such a one."""
_SMOOTHING = 0.25
"""Weight of the newest step's time."""


class Pace:
    """The time until the next tick; the publisher's thread alone asks, and tells what it saw."""

    def __init__(self) -> None:
        """Begin without knowing how long a step takes."""
        self._step_seconds: float | None = None
        self._last_steps_at: float | None = None
        self._blocked_seconds = PUBLISHER_TICK_SECONDS

    def steps_ended(self, num_steps: int, now: float) -> None:
        """Learn how long a step takes from the ``StepEnd``s that a tick found."""
        if self._last_steps_at is not None:
            seconds = min(max(0.0, now - self._last_steps_at) / num_steps, _LONGEST_STEP_SECONDS)
            before = seconds if self._step_seconds is None else self._step_seconds
            self._step_seconds = before + _SMOOTHING * (seconds - before)
        self._last_steps_at = now

    def pause_seconds(self, *, has_more: bool, blocked: bool) -> float:
        """Return how long to rest.

        Args:
            has_more: something may be sent that this tick had no share left for.
            blocked: the socket had no room: a worker that is stopped or slow is asked ever less often.
        """
        if blocked:
            seconds = self._blocked_seconds
            self._blocked_seconds = min(2 * seconds, PUBLISHER_IDLE_TICK_SECONDS)
            return seconds
        self._blocked_seconds = PUBLISHER_TICK_SECONDS
        if has_more:
            return PUBLISHER_TICK_SECONDS
        share = PUBLISHER_IDLE_TICK_SECONDS if self._step_seconds is None else _SHARE_OF_A_STEP * self._step_seconds
        return min(PUBLISHER_IDLE_TICK_SECONDS, max(PUBLISHER_TICK_SECONDS, share))
