"""The worker's console: warnings to the letter, one line when a run begins, one when it ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TextIO

from sidestep.worker.outbox import StoredEntry

NAME = "console"


class ConsoleSink:
    """Shows ``run``, ``notice`` and ``finish`` entries on a text stream; rows and alerts are counted, not shown.

    A notice is shown exactly as it is (docs/metrics.md, "Early warnings"). A stream that is closed or gone is counted
    in ``statistics()["unwritten"]``, and no reason for the worker to stop.
    """

    name = NAME

    def __init__(self, writer: TextIO) -> None:
        self._writer = writer
        self._counts: Counter[str] = Counter(shown=0, unwritten=0, unreadable=0)

    def take(self, entries: Sequence[StoredEntry]) -> None:
        """Show entries in their order."""
        for entry in entries:
            try:
                line = _line(entry)
            except (AttributeError, KeyError, TypeError, ValueError):
                self._counts["unreadable"] += 1
                continue
            if line is not None:
                self._show(line)

    def statistics(self) -> Mapping[str, int]:
        """Return the lines shown, those that the stream did not take, and entries that could not be read."""
        return dict(self._counts)

    def close(self) -> None:
        """Do nothing: the stream is the caller's."""

    def _show(self, line: str) -> None:
        encoding = getattr(self._writer, "encoding", None) or "utf-8"
        shown = line.encode(encoding, "backslashreplace").decode(encoding)  # an ASCII console shows the code instead
        try:
            print(shown, file=self._writer, flush=True)
        except (OSError, ValueError):  # gone (a closed terminal), or closed by the program
            self._counts["unwritten"] += 1
        else:
            self._counts["shown"] += 1


def _line(entry: StoredEntry) -> str | None:
    if entry.kind == "notice":
        return str(entry.value()["text"])
    if entry.kind == "run":
        value = entry.value()
        name = value.get("name") or entry.run_id
        project = value.get("project")
        return f"sidestep: run {name} ({entry.run_id})" + (f", project {project}" if project else "")
    if entry.kind == "finish":
        value = entry.value()
        exit_code, reason = int(value.get("exit_code", 0)), str(value.get("reason", ""))
        outcome = "finished" if exit_code == 0 else f"failed with exit code {exit_code}"
        return f"sidestep: run {entry.run_id} {outcome}" + (f": {reason}" if reason else "")
    return None
