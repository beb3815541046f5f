"""What a detector is: it observes steps one by one, says what it finds, and its state can be saved.

A new detector is a module beside ``user_rules.py`` with a class that fulfils ``Detector``; the projection
(projection.py) gives it every step and writes what it returns. It is pure: no clock, no files, no randomness.

Its state is stored with every closed step, so that a restarted worker goes on where it stood, and snapshots of it are
kept, so that a trainer that goes back finds what was known there (intake/state_history.py). ``state()`` is encoded at
every step and written where it changed: right for some kilobytes. A detector that keeps more (rings of past steps; a
megabyte is fine) fulfils ``LargeState`` too and cuts that part into pieces of, say, 64 rows: then a step encodes and
writes the pieces alone that it touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

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
    stage: str = ""
    """Name of the stage that begins with this step (``mark_stage``), or empty."""


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


@runtime_checkable
class Detector(Protocol):
    """Observes the steps of a run in their order."""

    name: str
    """Stable: the state is kept under it."""

    def observe(self, observation: Observation) -> Verdict:
        """Judge one step."""
        ...

    def begin(self, attempt: int, step: int) -> None:
        """A new attempt begins at ``step``: let go of what must not reach over the break, and of what is not before it.

        Where the trainer went back, the state is already what it was just before ``step``; or, where that could not be
        worked out, what it was some steps earlier.
        """
        ...

    def state(self) -> Json:
        """Return all that ``restore`` needs, as a plain value."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state of the same detector."""
        ...


@runtime_checkable
class LargeState(Protocol):
    """What a detector offers beside ``state`` and ``restore`` for the part of its state that is large."""

    def revisions(self) -> Mapping[str, int]:
        """Return the name of each piece to a number that changes whenever the piece does. Names stay."""
        ...

    def piece(self, name: str) -> Json:
        """Return one piece as a plain value; bytes are plain, and ``ndarray.tobytes`` is the fast way."""
        ...

    def restore_piece(self, name: str, value: Any) -> None:
        """Take over a piece; ``restore`` was called before."""
        ...
