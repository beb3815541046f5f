"""Which trainers have gone without a word: silent for long, and their process no longer there."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

from sidestep.worker.contexts import read_hellos
from sidestep.worker.intake.decisions import Incarnation
from sidestep.worker.intake.index import Index

ELSEWHERE_FACTOR: Final = 8
"""Where the process cannot be looked at (another host), silence has to last so many times longer."""

_LONGEST_LISTENING_SECONDS: Final = 0.25
"""A turn of the worker's loop counts as silence for so long at most: one that took longer was stopped, or starved, and
what came meanwhile is still to be read."""
_MAX_PAUSES: Final = 100

_CLOCK_SLACK_SECONDS: Final = 5.0
"""The clock may be set while a host runs, and processes' starts are counted from its boot."""
_START_FIELD: Final = 19
"""Of ``/proc/PID/stat`` after the command's name: when the process began, in clock ticks since the boot."""


def is_alive(pid: int) -> bool:
    """Return whether a process of this number exists, one that nobody has waited for yet not counted."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        with open(f"/proc/{pid}/stat", "rb") as status:  # noqa: PTH123  (a hundred times an hour)
            return status.read().rpartition(b")")[2].split()[0] != b"Z"
    except (OSError, IndexError):
        return True  # no /proc here: the signal's answer stands


def started_at(pid: int) -> float | None:
    """Return when a process began, in unix seconds; None where this cannot be told."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as status:  # noqa: PTH123
            ticks = int(status.read().rpartition(b")")[2].split()[_START_FIELD])
        with open("/proc/stat", "rb") as host:  # noqa: PTH123
            booted = next(int(line.split()[1]) for line in host if line.startswith(b"btime "))
    except (OSError, IndexError, ValueError, StopIteration):
        return None
    return booted + ticks / os.sysconf("SC_CLK_TCK")


class Trainers:
    """Looks at the processes behind the incarnations."""

    def __init__(self, index: Index, silence_seconds: float) -> None:
        """Give a trainer up after ``silence_seconds`` where its processes are gone."""
        self._index = index
        self._silence_seconds = silence_seconds
        self._born = time.monotonic()
        self._pids: dict[str, list[int] | None] = {}
        self._asked_at: float | None = None
        self._pauses: deque[tuple[float, float]] = deque(maxlen=_MAX_PAUSES)
        """When the loop went on, and for how long it had not listened."""

    def refresh(self, incarnation: str) -> None:
        """Another rank has said Hello."""
        self._pids.pop(incarnation, None)

    def lost(
        self, incarnations: Sequence[Incarnation], last_heard: Mapping[str, float], now: float, *, at_once: bool = False
    ) -> dict[str, str]:
        """Return which of ``incarnations`` are gone, with the reason; asked in every turn of the worker's loop.

        Args:
            incarnations: those that have not ended.
            last_heard: incarnation to when any of its ranks was heard last.
            now: the same clock.
            at_once: do not wait for silence where the processes can be seen to be gone (the worker ends).
        """
        gone: dict[str, str] = {}
        self._note_a_pause(now)
        for incarnation in incarnations:
            name = incarnation.incarnation
            silent = self._silent_seconds(last_heard.get(name, self._born), now)
            if not at_once and silent < self._silence_seconds:
                continue  # its processes, which are named by all ranks' Hellos, are looked for when they matter
            pids = self._local_pids(name)
            if pids is None:
                if silent >= ELSEWHERE_FACTOR * self._silence_seconds:
                    gone[name] = f"nothing was heard of the trainer for {silent:.0f} s"
            elif not any(self._is_there(pid, incarnation.first_seen) for pid in pids):
                gone[name] = f"the trainer's process {pids[0]} is gone"
        return gone

    def _note_a_pause(self, now: float) -> None:
        pause = 0.0 if self._asked_at is None else now - self._asked_at - _LONGEST_LISTENING_SECONDS
        if pause > 0.0:
            self._pauses.append((now, pause))
        self._asked_at = now

    def _silent_seconds(self, heard_at: float, now: float) -> float:
        """Return for how long the worker has listened since ``heard_at`` in vain."""
        return now - heard_at - sum(seconds for went_on_at, seconds in self._pauses if went_on_at > heard_at)

    @staticmethod
    def _is_there(pid: int, first_seen: float) -> bool:
        """Whether this process is the trainer: a number is given to another one later, which began after its Hello."""
        if not is_alive(pid):
            return False
        began = started_at(pid)
        return began is None or began <= first_seen + _CLOCK_SLACK_SECONDS

    def _local_pids(self, incarnation: str) -> list[int] | None:
        """Return the processes of the ranks on this host; None where there are others, or none is named."""
        if incarnation not in self._pids:
            host = socket.gethostname()
            places = [hello.topology for hello in read_hellos(self._index, incarnation).values()]
            pids = [place.get("pid") for place in places if place.get("host") == host]
            known = [pid for pid in pids if isinstance(pid, int) and pid > 0]
            if os.getpid() in known:
                known = []  # our own number: the trainer lives in another container of this host name
            self._pids[incarnation] = known if known and len(known) == len(places) else None
        return self._pids[incarnation]
