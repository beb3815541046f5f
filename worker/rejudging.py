"""Settings that the worker judges by, and that a recorded run can therefore be judged by anew (``--recompute --set``).

What only the trainer acts by (when it generated, how many tokens) is in its messages and cannot be set afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Final

from sidestep.worker.detectors.settings import PREFIX, DetectorSettings, apply_assignments
from sidestep.worker.errors import ConfigError
from sidestep.worker.settings import RunSettings


def _choice(*names: str) -> Callable[[str], Any]:
    def convert(text: str) -> str:
        if text not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return text

    return convert


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError("a whole number, 0 or more")
    return int(text)


def _number(least: float, most: float, told: str) -> Callable[[str], Any]:
    def convert(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            raise ValueError(told) from None
        if not (math.isfinite(number) and least <= number <= most):
            raise ValueError(told)
        return number

    return convert


DETECTORS: Final = "detectors"
"""The setting that holds the values of detectors' rules."""

_SHARE: Final = _number(0.0, 1.0, "a share from 0 to 1")

SETTABLE: Final[Mapping[str, Callable[[str], Any]]] = {
    "answer_length_interval": _count,
    "collapse_deadline": _count,
    "collapse_detection_interval": _count,
    "collapse_verdict": _choice("literal", "target_relative"),
    "excessive_eos": _SHARE,
    "gradient_detail": _choice("param", "block", "module"),
    "high_loss_sigmas": _number(0.0, 1e6, "a number of standard deviations, 0 or more"),
    "low_diversity_min_tokens": _count,
    "low_diversity_unique_tokens": _count,
    "single_token_dominance": _SHARE,
}
"""Names of ``HooksConfig`` to what reads their text; it raises ValueError with what is wanted."""


def parse_changes(given: Sequence[str]) -> dict[str, Any]:
    """Read ``name=value`` pairs.

    Raises:
        ConfigError: a pair has no value, a name that cannot be set, or a value of the wrong kind; names the option.
    """
    changes: dict[str, Any] = {}
    for pair in given:
        name, equals, text = pair.partition("=")
        name, text = name.strip(), text.strip()
        if not equals:
            raise ConfigError(f"--set {pair}: give it as name=value")
        if name.startswith(PREFIX):
            _change_detector(changes, name, text)
            continue
        if name not in SETTABLE:
            raise ConfigError(f"--set {name}: {_why_not(name)}; what can be set is {', '.join(sorted(SETTABLE))}")
        if name in changes:
            raise ConfigError(f"--set {name}: is set twice")
        try:
            changes[name] = SETTABLE[name](text)
        except ValueError as error:
            raise ConfigError(f"--set {name}={text}: {text!r} is not {error}") from error
    return changes


def _change_detector(changes: dict[str, Any], name: str, text: str) -> None:
    """Add ``detectors.NAME.FIELD=VALUE`` to what a run's settings say of its detectors."""
    try:
        apply_assignments(DetectorSettings(), [f"{name}={text}"])
    except ValueError as error:
        raise ConfigError(str(error)) from error
    detectors = changes.setdefault(DETECTORS, {})
    if name.removeprefix(PREFIX) in detectors:
        raise ConfigError(f"--set {name}: is set twice")
    detectors[name.removeprefix(PREFIX)] = _as_number(text)


def _as_number(text: str) -> float | int | bool:
    known = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if text.lower() in known:
        return known[text.lower()]
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def _why_not(name: str) -> str:
    if name in {field.name for field in fields(RunSettings)}:
        return "the trainer acted by it, and what it sent cannot be changed afterwards"
    return "no setting of that name is judged by"
