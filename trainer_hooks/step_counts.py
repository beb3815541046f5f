"""How many messages a step has handed over, and how many it gave up before: what its ``StepEnd`` says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sidestep.protocol.messages import Kind

_KIND_NAMES = {kind: kind.name.lower() for kind in Kind}


@dataclass(slots=True)
class StepCounts:
    """Messages of a step by kind: handed over, and given up before."""

    sent: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)

    def add(self, kinds: Iterable[Kind], *, staged: bool) -> None:
        """Count messages that were staged, or could not be."""
        counts = self.sent if staged else self.dropped
        for kind in kinds:
            name = _KIND_NAMES[kind]
            counts[name] = counts.get(name, 0) + 1
