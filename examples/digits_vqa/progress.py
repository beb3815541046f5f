"""How far the training is: a bar on a terminal, a line every tenth in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from tqdm import tqdm

_NUM_LOG_LINES = 10


class Progress:
    """Iterates over the steps of a run and shows how it goes."""

    def __init__(self, num_steps: int, *, shown: bool) -> None:
        """Show nothing where ``shown`` is False."""
        self._num_steps = num_steps
        self._in_log = shown and not sys.stderr.isatty()
        self._bar = tqdm(total=num_steps, desc="training", unit="step", disable=not shown or self._in_log)

    def __iter__(self) -> Iterator[int]:
        """Yield 0, 1, 2, ... and end the bar after the last one."""
        with self._bar:
            yield from range(self._num_steps)

    def step_done(self, step: int, loss: float) -> None:
        """Show that ``step`` is done, with its loss."""
        self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self._bar.update()
        done = step + 1
        if self._in_log and done * _NUM_LOG_LINES // self._num_steps > step * _NUM_LOG_LINES // self._num_steps:
            print(f"training: {done}/{self._num_steps} steps, loss {loss:.3f}", flush=True)
