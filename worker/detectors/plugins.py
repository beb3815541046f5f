"""Detectors from elsewhere: a researcher's own class, named on the command line or installed as an entry point.

    class Entropy:
        name = "low_entropy"

        def observe(self, record):
            if record.entropy is None:
                return None
            return Reading(name=self.name, value=record.entropy, limit=0.1, is_beyond=record.entropy < 0.1)

``record.logged`` holds what the trainer logged at the step. The class may also have ``rule`` (``Rule``: k of m, arming,
cool-down), ``severity`` (``info``, ``warning`` or ``critical``), ``title``, ``is_collapse``, and ``state()`` with
``restore(state)`` where it remembers anything: a plain value. It is to be pure, or a replay says something else.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any, Final, Protocol

from sidestep.protocol.errors import EncodeError
from sidestep.protocol.messages import Json
from sidestep.protocol.tables import decode_table, encode_table
from sidestep.worker.detectors.catalogue import KINDS, DetectorKind, Severity
from sidestep.worker.detectors.reading import Reading
from sidestep.worker.detectors.rules import Rule
from sidestep.worker.step_record import StepRecord

GROUP: Final = "sidestep.detectors"
"""Entry points of this group are loaded beside what ``--detector`` names."""
DEFAULT_RULE: Final = Rule(hits=3, window=4)
MAX_STATE_BYTES: Final = 16 << 10
"""Largest state that one detector from elsewhere may keep."""


class OwnDetector(Protocol):
    """What a detector from elsewhere has to be."""

    name: str
    """Stable, and none of the names that there are."""

    def observe(self, record: StepRecord) -> Reading | None:
        """Return the step's reading, or None where the step cannot be judged."""
        ...


class OwnDetectors:
    """Asks detectors from elsewhere; one that raises is counted, told once, and never the run's end.

    Raises:
        ValueError: two detectors have the same name, or one that is taken.
    """

    def __init__(self, detectors: Sequence[OwnDetector]) -> None:
        self._detectors = {detector.name: detector for detector in detectors}
        taken = [detector.name for detector in detectors if detector.name in KINDS]
        if taken or len(self._detectors) < len(detectors):
            names = ", ".join(detector.name for detector in detectors)
            raise ValueError(f"detectors need names of their own, unlike those that there are; these are {names}")
        self.failures: dict[str, int] = {}
        """Name to how often it raised."""

    def read(self, record: StepRecord) -> tuple[list[Reading], list[str]]:
        """Return the readings of a step, and the texts of failures that were not told before."""
        readings: list[Reading] = []
        told: list[str] = []
        for name, detector in self._detectors.items():
            try:
                readings.extend(_checked(name, detector.observe(record)))
            except Exception as error:  # noqa: BLE001
                told.extend(self._fail(name, error))
        return readings, told

    def _fail(self, name: str, error: Exception) -> list[str]:
        """Count a failure; returns its text the first time."""
        self.failures[name] = self.failures.get(name, 0) + 1
        if self.failures[name] > 1:
            return []
        return [f"the detector {name!r} raised {type(error).__name__}: {error}; the run goes on without its reading"]

    def rule(self, name: str) -> Rule | None:
        """Return the rule of a detector; None where there is none of this name."""
        detector = self._detectors.get(name)
        if detector is None:
            return None
        rule = getattr(detector, "rule", DEFAULT_RULE)
        return rule if isinstance(rule, Rule) else DEFAULT_RULE

    def kind(self, name: str) -> DetectorKind | None:
        """Return what a detector says of itself; None where there is none of this name."""
        detector = self._detectors.get(name)
        if detector is None:
            return None
        severity = str(getattr(detector, "severity", "warning")).upper()
        return DetectorKind(
            name=name,
            severity=Severity[severity] if severity in Severity.__members__ else Severity.WARNING,
            nature="self",
            is_collapse=bool(getattr(detector, "is_collapse", False)),
            title=str(getattr(detector, "title", name)),
        )

    def state(self) -> Json:
        """Return the states of those that keep one, as bytes each; one that cannot be saved is a failure."""
        states: dict[str, bytes] = {}
        for name, detector in self._detectors.items():
            save: Callable[[], Any] | None = getattr(detector, "state", None)
            if save is None:
                continue
            try:
                content = encode_table(save())
                if len(content) > MAX_STATE_BYTES:
                    raise EncodeError(f"its state has {len(content)} bytes, more than {MAX_STATE_BYTES}")
            except Exception as error:  # noqa: BLE001
                self._fail(name, error)
            else:
                states[name] = content
        return {"states": states, "failures": dict(sorted(self.failures.items()))}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a state; of detectors that are not here any more nothing is taken."""
        self.failures = {str(name): int(count) for name, count in state["failures"].items()}
        for name, content in state["states"].items():
            take: Callable[[Any], Any] | None = getattr(self._detectors.get(name), "restore", None)
            if take is None:
                continue
            try:
                take(decode_table(content))
            except Exception as error:  # noqa: BLE001
                self._fail(name, error)


def _checked(name: str, found: object) -> list[Reading]:
    if found is None:
        return []
    if not isinstance(found, Reading):
        raise TypeError(f"observe returned {type(found).__name__}, not a Reading or None")
    value, limit = float(found.value), float(found.limit)
    if not math.isfinite(value):
        return []
    return [replace(found, name=name, value=value, limit=limit, is_beyond=bool(found.is_beyond))]


def load_detectors(references: Sequence[str]) -> list[OwnDetector]:
    """Return an instance of each ``package.module:Class``, made without arguments.

    Raises:
        ValueError: one cannot be imported or made, or is no detector; the text names it and says why.
    """
    return [_made(f"--detector {reference}", _imported(reference)) for reference in references]


def installed_references() -> tuple[dict[str, OwnDetector], list[str]]:
    """Return an instance of each installed entry point of ``GROUP``, and why others could not be made.

    Each detector stands under the reference that loads it again.
    """
    made: dict[str, OwnDetector] = {}
    problems: list[str] = []
    for point in sorted(entry_points(group=GROUP), key=lambda each: (each.name, each.value)):
        try:
            made[point.value] = _made(f"the entry point {point.name} = {point.value}", point.load())
        except Exception as error:  # noqa: BLE001
            problems.append(f"the detector of the entry point {point.name} = {point.value} is left out: {error}")
    return made, problems


def _imported(reference: str) -> Any:
    module, colon, name = reference.partition(":")
    if not colon or not module or not name:
        raise ValueError(f"--detector {reference}: write package.module:Class")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError as error:
        raise ValueError(f"--detector {reference}: {module} has no {name}") from error
    except Exception as error:
        raise ValueError(f"--detector {reference}: {module} cannot be imported: {error!r}") from error


def _made(what: str, kind: Any) -> OwnDetector:
    try:
        detector: OwnDetector = kind()
    except Exception as error:
        raise ValueError(f"{what}: cannot be made without arguments: {error!r}") from error
    if not isinstance(getattr(detector, "name", None), str) or not callable(getattr(detector, "observe", None)):
        raise ValueError(f"{what}: is no detector: it needs a text `name` and a method `observe(record)`")
    return detector
