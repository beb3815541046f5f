"""What each step's ``StepEnd`` must say about parts that were given up after the trainer had counted them as sent."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace

from sidestep.protocol.messages import Kind, StepEnd

_REMEMBERED_STEPS = 1_024
"""Steps whose end has left and that have nothing unsent: kept for parts that staging finishes late."""


@dataclass(slots=True, eq=False)
class _Entry:
    unsent_parts: int = 0
    queued_ends: int = 0
    sent_end: StepEnd | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)

    @property
    def busy(self) -> bool:
        return self.unsent_parts > 0 or self.queued_ends > 0


class StepLedger:
    """Counts drops per step, and says when a ``StepEnd`` that has left must be corrected."""

    def __init__(self) -> None:
        """Start with no step."""
        self._busy: dict[int, _Entry] = {}
        self._idle: OrderedDict[int, _Entry] = OrderedDict()

    def __len__(self) -> int:
        """Return how many steps are remembered."""
        return len(self._busy) + len(self._idle)

    def part_queued(self, step: int) -> None:
        """Count a part of ``step`` that waits to be sent."""
        self._open(step).unsent_parts += 1

    def part_sent(self, step: int) -> None:
        """Count a part of ``step`` that has left."""
        self._open(step).unsent_parts -= 1
        self._rest(step)

    def part_dropped(self, step: int, kind: Kind, *, was_queued: bool = True) -> StepEnd | None:
        """Count a part that was given up; return the ``StepEnd`` to queue again where it has left already."""
        entry = self._open(step)
        entry.unsent_parts -= was_queued
        return self._correction(step, entry, entry.dropped, kind)

    def part_refused(self, step: int, kind: Kind) -> StepEnd | None:
        """Count a part that the worker did not take, which no ``dropped`` says; else as ``part_dropped``."""
        entry = self._open(step)
        return self._correction(step, entry, entry.refused, kind)

    def end_queued(self, step: int) -> None:
        """Count a ``StepEnd`` that waits to be sent."""
        self._open(step).queued_ends += 1

    def end_sent(self, end: StepEnd) -> StepEnd:
        """Return ``end`` as it has to leave now: parts given up are counted as dropped, those refused as neither."""
        entry = self._open(end.step)
        entry.queued_ends -= 1
        entry.sent_end = end
        dropped, refused = dict(entry.dropped), dict(entry.refused)
        self._rest(end.step)
        if not dropped and not refused:
            return end
        sent = {name: count - dropped.get(name, 0) - refused.get(name, 0) for name, count in end.sent.items()}
        total = {name: end.dropped.get(name, 0) + dropped.get(name, 0) for name in {**end.dropped, **dropped}}
        return replace(end, sent={name: max(count, 0) for name, count in sent.items()}, dropped=total)

    def end_dropped(self, step: int) -> None:
        """Count a ``StepEnd`` that was given up."""
        self._open(step).queued_ends -= 1
        self._rest(step)

    def _correction(self, step: int, entry: _Entry, counts: dict[str, int], kind: Kind) -> StepEnd | None:
        name = kind.name.lower()
        counts[name] = counts.get(name, 0) + 1
        again = entry.sent_end if entry.queued_ends == 0 else None
        self._rest(step)
        return again

    def _open(self, step: int) -> _Entry:
        entry = self._busy.get(step)
        if entry is None:
            entry = self._idle.pop(step, None) or _Entry()
            self._busy[step] = entry
        return entry

    def _rest(self, step: int) -> None:
        entry = self._busy[step]
        if entry.busy:
            return
        del self._busy[step]
        if entry.sent_end is not None or entry.dropped or entry.refused:
            self._idle[step] = entry
            if len(self._idle) > _REMEMBERED_STEPS:
                self._idle.popitem(last=False)
