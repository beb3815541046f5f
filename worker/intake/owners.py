"""Whom a worker stays for, in a file beside its endpoint's lock: trainers come and go, the worker is one.

A trainer that starts again (torchrun's elastic agent) starts a worker too. That one finds the endpoint busy and hands
its owner over to the worker that serves it, in one step with that worker's decision to end: either the new owner is in
time, or the ending worker has closed the list, and the new one waits for the endpoint.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sidestep.worker.errors import ListenError
from sidestep.worker.trainers import is_alive, started_at

_CLOCK_SLACK_SECONDS: Final = 5.0
"""The clock may be set while a host runs, and processes' starts are counted from its boot."""
_Owner = tuple[int, float]
"""Process number and when it began, in unix seconds; 0.0 where that cannot be told."""


class Owners:
    """The processes that one endpoint's worker stays for."""

    def __init__(self, path: Path) -> None:
        """Name the file; nothing is read or written yet."""
        self._path = path

    def begin(self, pid: int) -> None:
        """A worker begins to serve: it stays for ``pid``, 0 for nobody, for whoever joins, and for who had joined.

        Raises:
            ListenError: the file cannot be written.
        """
        with self._opened() as known:
            known.update(owners=[*_living(known), *_entries(pid)], is_closed=False)

    def join(self, pid: int) -> bool:
        """Let the worker that serves stay for ``pid`` too; False where it ends already.

        Raises:
            ListenError: the file cannot be written.
        """
        with self._opened() as known:
            if known.get("is_closed", True):
                return False
            known["owners"] = [*_living(known), *_entries(pid)]
            return True

    def any_alive(self) -> bool:
        """Return whether one of them lives.

        Raises:
            ListenError: the file cannot be read.
        """
        with self._opened() as known:
            return bool(_living(known))

    def close(self, *, at_once: bool = False) -> bool:
        """Close the list where nobody of it lives, or ``at_once``; return whether it is closed now.

        Raises:
            ListenError: the file cannot be written.
        """
        with self._opened() as known:
            if _living(known) and not at_once:
                return False
            known["is_closed"] = True
            return True

    @contextmanager
    def _opened(self) -> Iterator[dict[str, Any]]:
        """Read what is known and write what it has become, alone with the file."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(self._path, flags, 0o600)
        except OSError as error:
            raise ListenError(f"the list of owners {self._path} cannot be opened: {error.strerror}") from error
        with os.fdopen(descriptor, "r+", encoding="utf-8") as file:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            known = _read(file.read())
            before = json.dumps(known)
            yield known
            if json.dumps(known) != before:
                file.seek(0)
                file.truncate()
                file.write(json.dumps(known))


def _read(text: str) -> dict[str, Any]:
    try:
        known = json.loads(text) if text else {}
    except ValueError:
        return {}  # a worker was killed while it wrote: nobody serves, and a new one begins anew
    return known if isinstance(known, dict) else {}


def _entries(pid: int) -> list[_Owner]:
    return [(pid, started_at(pid) or 0.0)] if pid > 0 else []


def _living(known: dict[str, Any]) -> list[_Owner]:
    """Those that are there still: a number that another process has been given since is none of them."""
    found = []
    for pid, began in known.get("owners", ()):
        now = started_at(pid)
        if is_alive(pid) and (now is None or not began or abs(now - began) < _CLOCK_SLACK_SECONDS):
            found.append((int(pid), float(began)))
    return found
