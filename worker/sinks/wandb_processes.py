"""Makes sure that one sink, and one wandb-core, serves a run at a time.

wandb-core is started in a session of its own, so killing the sink's process group leaves it alive: it then goes on to
write what it still holds, beside the core of the next child. Both carry a mark in their environment, by which they are
found in ``/proc`` and ended. The lock file keeps two workers from serving the same output folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from pathlib import Path
from typing import Final

MARK_VARIABLE: Final = "SIDESTEP_WANDB_SINK"
_POLL_SECONDS: Final = 0.02
_PROC: Final = Path("/proc")


def mark_of(out: Path, run_id: str) -> str:
    """Return the value of ``MARK_VARIABLE`` that a run's sink and its wandb-core carry."""
    return f"{out.resolve()}::{run_id}"


def marked_processes(mark: str) -> set[int]:
    """Return the other processes of this user that carry the mark and live; stopped ones are among them."""
    needle = f"{MARK_VARIABLE}={mark}".encode()
    found = set()
    for entry in _PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if needle in (entry / "environ").read_bytes().split(b"\0"):
                found.add(int(entry.name))
    return found


def end_marked(mark: str, timeout_seconds: float) -> set[int]:
    """SIGKILL every process that carries the mark and wait until they are gone; return those that still live."""
    deadline = time.monotonic() + timeout_seconds
    while left := marked_processes(mark):  # a zombie's environment is empty, so it does not count
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return left
        time.sleep(_POLL_SECONDS)
    return set()


class SinkLock:
    """An exclusive lock on an output folder's run, held as long as the process lives."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+")

    def try_take(self) -> bool:
        """Take the lock if nobody holds it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Let the lock go."""
        self._file.close()
