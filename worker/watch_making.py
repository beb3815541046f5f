"""A run's watch as its settings want it: thresholds, what is asked of the trainer, and detectors from elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from sidestep.worker.detectors.plugins import installed_references, load_detectors
from sidestep.worker.detectors.settings import PREFIX, DetectorSettings, apply_assignments
from sidestep.worker.settings import RunSettings
from sidestep.worker.watch import Policy, Watch

_LOG: Final = logging.getLogger(__name__)
_ASKS: Final = {"stop": "stop", "checkpoint": "checkpoint", "call": "incident"}
"""``on_incident`` to the action that is asked for; ``warn`` asks for nothing."""


def make_watch(settings: RunSettings, own_detectors: Sequence[str] = ()) -> tuple[Watch, tuple[str, ...]]:
    """Return a watch that knows nothing yet, and what is wrong with the thresholds that the trainer sent.

    Args:
        settings: of the run; of a threshold that cannot be used the default stands, and one text says so.
        own_detectors: ``package.module:Class`` each.

    Raises:
        ValueError: a detector from elsewhere cannot be loaded.
    """
    rules, problems = _thresholds(settings)
    policy = Policy(
        sample_when_suspicious=settings.sample_when_suspicious, on_critical=_ASKS.get(settings.on_incident, "")
    )
    return Watch(rules, policy, load_detectors(own_detectors)), problems


def _thresholds(settings: RunSettings) -> tuple[DetectorSettings, tuple[str, ...]]:
    rules, problems = DetectorSettings(), []
    for name, value in sorted(settings.detectors.items()):
        plain = int(value) if isinstance(value, float) and value.is_integer() else value  # a switch, a number of steps
        try:
            rules = apply_assignments(rules, [f"{PREFIX}{name}={plain}"])
        except ValueError as error:
            reason = str(error).removeprefix("--set ").removeprefix(PREFIX)
            problems.append(f"HooksConfig.detectors: {reason}. The default stands")
    return rules, tuple(problems)


def judges_otherwise(before: RunSettings, after: RunSettings) -> bool:
    """Return whether a watch of the one settings is not one of the other."""
    names = ("detectors", "on_incident", "sample_when_suspicious")
    return any(getattr(before, name) != getattr(after, name) for name in names)


def installed() -> tuple[str, ...]:
    """Return the references of detectors that are installed as entry points; a broken one is left out and said."""
    found, problems = installed_references()
    for problem in problems:
        _LOG.warning("%s", problem)
    return tuple(found)
