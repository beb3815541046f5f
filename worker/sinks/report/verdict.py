"""The first thing that a reader wants to know: is the model healthy, and if not, since when and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sidestep.worker.sinks.report.history import RunHistory


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What stands on top of the report."""

    level: str
    """``healthy``, ``warning``, ``collapsed`` or ``unknown``; the page's colour."""
    headline: str
    details: tuple[str, ...] = ()


def reach_verdict(history: RunHistory) -> Verdict:
    """Return the verdict over the whole run: the collapse checks first, then failures of the run itself."""
    collapse = [alert for alert in history.alerts if "COLLAPSE" in str(alert.get("text", "")).upper()]
    checks = history.series.get("collapse/is_collapsed")
    if collapse:
        return _collapsed(history, collapse[0])
    critical = [alert for alert in history.alerts if alert.get("level") == "critical"]
    if critical:
        return Verdict(level="collapsed", headline="Training failure detected", details=_firsts(history, critical[0]))
    failed = history.finish is not None and int(history.finish.get("exit_code", 0)) != 0
    if failed and history.finish is not None:
        reason = str(history.finish.get("reason") or f"exit code {history.finish.get('exit_code')}")
        return Verdict(level="warning", headline="The run ended in a failure", details=(reason,))
    if checks is None:
        return Verdict(
            level="unknown",
            headline="No collapse check has run yet",
            details=("Generation checks need samples: pass samples=... to sidestep.attach().",),
        )
    num_checks = len(checks.values)
    late = sum(checks.values[-max(1, num_checks // 2) :])
    if late:
        return Verdict(
            level="warning",
            headline="The rules hold, but no alarm was armed",
            details=(f"{late:.0f} of the later checks found the rules true; the model was never healthy before.",),
        )
    return Verdict(
        level="healthy",
        headline="No collapse detected",
        details=(f"{num_checks} checks up to step {checks.steps[-1]}.", *_warnings(history)),
    )


def _firsts(history: RunHistory, decisive: Mapping[str, Any]) -> tuple[str, ...]:
    """When it was first seen, and when it was called what it is."""
    first = history.alerts[0]
    said = [f"First alarm at step {first.get('step')}: {_short(first)}."]
    if first is not decisive:
        said.append(f"Called so at step {decisive.get('step')}: {_short(decisive)}.")
    return tuple(said)


def _short(alert: Mapping[str, Any]) -> str:
    line = str(alert.get("text", "")).split("\n", 1)[0]
    return line.split(": ", 1)[-1].split(" (step", 1)[0]


def _collapsed(history: RunHistory, alert: Mapping[str, Any]) -> Verdict:
    details = list(_firsts(history, alert))
    since = int(history.alerts[0].get("step") or 0)
    checks = history.texts.get("collapse/collapse_reason", [])
    rules = next((at for at, reason in checks if at >= since and reason != "none"), None)
    if rules is not None and rules != alert.get("step"):
        details.append(f"The four rules saw it in the answers of step {rules}.")
    token = history.newest_text("collapse/most_common_token_text")
    ratio = history.newest("collapse/most_common_ratio")
    if token is not None and ratio is not None:
        details.append(f"At the last check, {ratio:.0%} of the generated tokens were “{token}”.")
    still = history.newest("collapse/is_collapsed")
    if still == 0:
        details.append("The last check is clean again.")
    return Verdict(level="collapsed", headline="Model collapse detected", details=tuple(details))


def _warnings(history: RunHistory) -> tuple[str, ...]:
    warnings = [notice for notice in history.notices if notice.get("level") in ("warning", "critical")]
    return (f"{len(warnings)} warnings, see below.",) if warnings else ()
