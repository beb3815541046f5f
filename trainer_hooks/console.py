"""The trainer's console as the publisher thread writes to it: whole lines to stderr, and never a reason to fail."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

_FORK_WAIT_SECONDS = 0.2
_CLEAR_LINE = "\r\x1b[K"
_writing = threading.Lock()
"""Held while a line is written, and across a fork: a child never inherits a stderr that is locked half-way."""
_held_for_fork = False


def _before_fork() -> None:
    global _held_for_fork  # noqa: PLW0603  (the state of one process-wide fork)
    _held_for_fork = _writing.acquire(timeout=_FORK_WAIT_SECONDS)


def _after_fork_in_parent() -> None:
    if _held_for_fork:
        _writing.release()


def _after_fork_in_child() -> None:
    global _writing  # noqa: PLW0603  (whoever held the old lock does not exist here)
    _writing = threading.Lock()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


def write_to_stderr(text: str) -> None:
    """Write ``text`` to whatever ``sys.stderr`` is now; a progress bar on a terminal makes room for it.

    Raises:
        OSError: nobody reads it any more.
        ValueError: it is closed.
    """
    if sys.stderr is None:
        raise ValueError("this process has no stderr")
    sys.stderr.write(f"{_CLEAR_LINE}{text}" if sys.stderr.isatty() else text)
    sys.stderr.flush()


class Console:
    """Writes lines; counts those that could not be written."""

    def __init__(self, write: Callable[[str], None] = write_to_stderr) -> None:
        """Write through ``write``, which gets one whole line with its newline."""
        self._write = write
        self._shown: set[str] = set()
        self.num_lines_lost = 0
        """Lines that ``write`` failed on: a dead console is nobody's reason to stop."""

    def line(self, text: str, *, apart: bool = False) -> None:
        """Write ``text`` and a newline, exactly as it is.

        ``apart`` begins a line for it: in a log, a progress bar may have left one unended.
        """
        with _writing:
            try:
                self._write(f"\n{text}\n" if apart else f"{text}\n")
            except Exception:  # noqa: BLE001  (a caller's stream may raise anything; it is counted)
                self.num_lines_lost += 1

    def once(self, code: str, text: str) -> bool:
        """Write ``text`` unless ``code`` was shown before; return whether it was written."""
        if code in self._shown:
            return False
        self._shown.add(code)
        self.line(f"sidestep: {text}")
        return True
