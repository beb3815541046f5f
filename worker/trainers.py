"""Which trainers have gone without a word: silent for long, and their process no longer there."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Final

from sidestep.worker.contexts import read_hellos
from sidestep.worker.intake.decisions import Incarnation
from sidestep.worker.intake.index import Index

ELSEWHERE_FACTOR: Final = 8
"""Where the process cannot be looked at (another host), silence has to last so many times longer."""


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


class Trainers:
    """Looks at the processes behind the incarnations."""

    def __init__(self, index: Index, silence_seconds: float) -> None:
        """Give a trainer up after ``silence_seconds`` where its processes are gone."""
        self._index = index
        self._silence_seconds = silence_seconds
        self._born = time.monotonic()
        self._pids: dict[str, list[int] | None] = {}

    def refresh(self, incarnation: str) -> None:
        """Another rank has said Hello."""
        self._pids.pop(incarnation, None)

    def lost(
        self, incarnations: Sequence[Incarnation], last_heard: Mapping[str, float], now: float, *, at_once: bool = False
    ) -> dict[str, str]:
        """Return which of ``incarnations`` are gone, with the reason.

        Args:
            incarnations: those that have not ended.
            last_heard: incarnation to when any of its ranks was heard last.
            now: the same clock.
            at_once: do not wait for silence where the processes can be seen to be gone (the worker ends).
        """
        gone = {}
        for incarnation in incarnations:
            name = incarnation.incarnation
            silent = now - last_heard.get(name, self._born)
            pids = self._local_pids(name)
            if pids is None:
                if silent >= ELSEWHERE_FACTOR * self._silence_seconds:
                    gone[name] = f"nothing was heard of the trainer for {silent:.0f} s"
            elif (at_once or silent >= self._silence_seconds) and not any(is_alive(pid) for pid in pids):
                gone[name] = f"the trainer's process {pids[0]} is gone"
        return gone

    def _local_pids(self, incarnation: str) -> list[int] | None:
        """Return the processes of the ranks on this host; None where there are others, or none is named."""
        if incarnation not in self._pids:
            host = socket.gethostname()
            places = [hello.topology for hello in read_hellos(self._index, incarnation).values()]
            pids = [place.get("pid") for place in places if place.get("host") == host]
            known = [pid for pid in pids if isinstance(pid, int) and pid > 0]
            self._pids[incarnation] = known if known and len(known) == len(places) else None
        return self._pids[incarnation]
