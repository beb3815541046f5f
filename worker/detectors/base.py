"""What a detector is: it observes steps one by one, says what it finds, and its state can be saved.

A new detector is a module beside ``user_rules.py`` with a class that fulfils ``Detector``; the projection
(projection.py) gives it every step and writes what it returns. It is pure: no clock, no files, no randomness.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from sidestep.protocol.messages import Json
from sidestep.worker.metrics.measurement import Value
from sidestep.worker.metrics.sequences import GeneratedSamples
from sidestep.worker.records import RunContext
from sidestep.worker.settings import RunSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One step, as a detector sees it."""

    attempt: int
    step: int
    context: RunContext
    settings: RunSettings
    values: Mapping[str, Value] = field(default_factory=dict)
    """What the metrics of this step are."""
    generated: GeneratedSamples | None = None
    """What the model generated at this step, if it did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that people are to be told, once per episode: a line in both consoles and an alert."""

    code: str
    """A stable short name of what was found."""
    title: str
    line: str
    """What the consoles show, exactly."""
    detail: str = ""
    """What the alert says beside the line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A detector's answer to one observation."""

    values: Mapping[str, Value] = field(default_factory=dict)
    """What goes into the step's row."""
    findings: tuple[Finding, ...] = ()


class Detector(Protocol):
    """Observes the steps of a run in their order."""

    name: str
    """Stable: the state is kept under it."""

    def observe(self, observation: Observation) -> Verdict:
        """Judge one step."""
        ...

    def begin(self, attempt: int, step: int) -> None:
        """Return to what was known before ``step``: a new attempt begins there."""
        ...

    def state(self) -> Json:
        """Return all that ``restore`` needs, as a plain value."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state of the same detector."""
        ...
