"""Words: from an incident to what people read, in both consoles and in an alert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from sidestep.protocol.metric_names import COLLAPSE_LINE
from sidestep.worker.cause import Cause
from sidestep.worker.detectors.catalogue import Severity

HEADINGS: Final[Mapping[Severity, str]] = {
    Severity.CRITICAL: "🛑 TRAINING FAILURE DETECTED: {name}",
    Severity.WARNING: "⚠️ TRAINING WARNING: {name}",
    Severity.INFO: "TRAINING DATA CHANGED: {name}",
}
"""What stands over an incident that is not of the collapse class."""


def heading(name: str, severity: Severity, *, is_collapse: bool) -> str:
    """Return what both consoles show of an incident, on a line of its own."""
    if is_collapse and severity is Severity.CRITICAL:
        return COLLAPSE_LINE.format(reason=name)
    return HEADINGS[severity].format(name=name)


def console_block(
    *, number: int, title: str, first_step: int, step: int, evidence: Sequence[str], cause: Cause, facts: Sequence[str]
) -> tuple[str, ...]:
    """Return the lines under an incident's heading: why, evidence, likely cause, what to do next."""
    since = f"step {step}" if first_step == step else f"step {step}, first signs at step {first_step}"
    lines = [f"  why: {title} ({since}; incident {number})"]
    lines += [f"  evidence: {each}" for each in evidence]
    lines.append(f"  likely cause: {cause.text}" + (f" ({'; '.join(facts)})" if facts else ""))
    lines.append(f"  what to do next: {cause.advice}")
    return tuple(lines)
