"""What signals cost the device, by events that are asked and never waited for."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from sidestep.trainer_hooks.pinned_ring import is_capturing

_MAX_PENDING = 32


class DeviceTime:
    """Pairs of events around the signals' work; their times are known some steps later."""

    def __init__(self) -> None:
        """Measure nothing yet."""
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._free: list[torch.cuda.Event] = []
        self._started: torch.cuda.Event | None = None

    def start(self, tensor: Tensor) -> None:
        """Begin to measure where ``tensor`` is on a CUDA device; nothing elsewhere, or where too many are open."""
        if not tensor.is_cuda or len(self._pending) >= _MAX_PENDING or is_capturing():
            return
        self._started = self._event()
        self._started.record()

    def stop(self) -> None:
        """End what ``start`` began."""
        if self._started is not None:
            ended = self._event()
            ended.record()
            self._pending.append((self._started, ended))
            self._started = None

    def take(self) -> float:
        """Return the device time in seconds of the pairs that have passed since the last call; -1 for none."""
        seconds, count = 0.0, 0
        while self._pending and not is_capturing() and self._pending[0][1].query():  # type: ignore[no-untyped-call]
            start, end = self._pending.popleft()
            seconds += start.elapsed_time(end) / 1_000.0
            count += 1
            self._free += (start, end)
        return seconds if count else -1.0

    def _event(self) -> torch.cuda.Event:
        return self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
