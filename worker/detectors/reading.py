"""What a family of detectors hands over: a reading of each detector and step, or none where it cannot judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sidestep.protocol.messages import Json
from sidestep.worker.detectors.view import StepView


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One detector's number at one step."""

    name: str
    value: float
    limit: float
    """What the number was compared with."""
    is_beyond: bool
    reference: float | None = None
    """What is usual here, where that is known."""
    evidence: str = ""
    """The numbers in words; ``{token}`` and ``{module}`` stand for the texts of the next two."""
    token: int = -1
    """Id of the token that it is about, where it is about one."""
    module: int = -1
    """Number of the module that it is about, where it is about one."""


class Family(Protocol):
    """A family of detectors: reads a step, keeps its references; pure."""

    name: str
    """Stable: its state is kept under it."""

    def read(self, view: StepView) -> Sequence[Reading]:
        """Return a reading of each detector that can judge the step."""
        ...

    def forget(self) -> None:
        """Let go of references: what follows is another stage."""
        ...

    def state(self) -> Json:
        """Return all that ``restore`` needs, as a plain value."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state of the same family."""
        ...
