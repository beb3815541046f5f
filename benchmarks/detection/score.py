"""From judged runs to figures: delay, recall, false incidents with their bound, causes, costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from benchmarks.detection.campaign import Outcome
from benchmarks.detection.case import Case
from benchmarks.detection.causes import is_right
from benchmarks.detection.harm import Admission
from benchmarks.detection.judge import JudgedIncident

from sidestep.worker.detectors.catalogue import kind_of

ALERTS = frozenset({"warning", "critical"})
"""Levels that count: what is said at level info is listed apart."""
GROUP_STEPS = 100
"""Steps within which a baseline's alarms are one incident, as in the product."""
WITHIN = (5, 10, 50, 200)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One run with what it is held against."""

    outcome: Outcome
    case: Case
    split: str
    admission: Admission | None = None
    """Failures alone."""

    @property
    def healthy_steps(self) -> int:
        """Steps in which whatever is said is false, each counted once: those of healthy runs.

        Up to its onset a failed run is the copy of its twin, whose steps are counted.
        """
        return 0 if self.case.is_failure else self.outcome.facts.num_steps

    @property
    def early_incidents(self) -> list[JudgedIncident]:
        """Failures: incidents that opened before the onset."""
        onset = self.outcome.facts.onset if self.case.is_failure else 0
        return [each for each in self.incidents if each.opened_step < onset and each.level in ALERTS]

    @property
    def incidents(self) -> list[JudgedIncident]:
        """What the product said, oldest first."""
        return self.outcome.judged.incidents if self.outcome.judged is not None else []

    def false_incidents(self, levels: Iterable[str] = ALERTS) -> list[JudgedIncident]:
        """Incidents that opened where nothing was wrong, of the given levels."""
        wanted = set(levels)
        return [each for each in self.incidents if each.opened_step < self.healthy_steps and each.level in wanted]

    def alert_steps(self) -> list[int]:
        """Steps from the onset on at which people were newly warned."""
        told = [step for each in self.incidents for step, level in each.told if level in ALERTS]
        return sorted(step for step in told if step >= self.outcome.facts.onset)


def poisson_upper_95(count: int) -> float:
    """Return the upper end of the one-sided 95 % interval for the mean of a Poisson count (3.0 for none)."""
    low, high = 0.0, count + 10.0 * math.sqrt(count + 1.0) + 10.0
    for _ in range(100):
        middle = (low + high) / 2
        log = math.log(middle) if middle > 0 else -math.inf
        below = sum(
            math.exp(k * log - middle - math.lgamma(k + 1)) if k else math.exp(-middle) for k in range(count + 1)
        )
        low, high = (middle, high) if below > 0.05 else (low, middle)
    return high


def _grouped(steps: Sequence[int]) -> list[int]:
    """Return the first step of each group of alarms."""
    first: list[int] = []
    newest = -GROUP_STEPS - 1
    for step in steps:
        if step > newest + GROUP_STEPS:
            first.append(step)
        newest = step
    return first


def _rate(count: int, healthy_steps: int) -> dict[str, Any]:
    scale = 1e4 / healthy_steps if healthy_steps else math.nan
    return {
        "false_incidents": count,
        "healthy_steps": healthy_steps,
        "false_incidents_per_10k": round(count * scale, 3),
        "false_incidents_per_10k_upper_95": round(poisson_upper_95(count) * scale, 3),
    }


def _recall(delays: Sequence[int | None]) -> dict[str, Any]:
    """Of failures whose delay is None where they were missed."""
    number = len(delays)
    found = [delay for delay in delays if delay is not None]
    shares = {
        f"recall_within_{limit}": round(sum(delay <= limit for delay in found) / number, 4) if number else None
        for limit in WITHIN
    }
    return {
        "failures": number,
        "found": len(found),
        **shares,
        "recall": round(len(found) / number, 4) if number else None,
        "median_delay_steps": float(np.median(found)) if found else None,
        "p90_delay_steps": float(np.percentile(found, 90)) if found else None,
    }


def _delay(steps: Sequence[int], onset: int) -> int | None:
    return next((step - onset for step in steps if step >= onset), None)


def score(runs: Sequence[Scored]) -> dict[str, Any]:
    """Return the figures of some runs; failures without harm are left out but for the steps before their onset."""
    failures = [run for run in runs if run.admission is not None and run.admission.is_admitted]
    watched = [run for run in runs if run.case.announced]
    false = [each for run in watched for each in run.false_incidents()]
    healthy_steps = sum(run.healthy_steps for run in watched)
    skewed = [run for run in watched if run.case.is_skewed]
    silent = [run for run in runs if not run.case.announced]
    per_failure = [
        sum(each.opened_step >= run.outcome.facts.onset and each.level in ALERTS for each in run.incidents)
        for run in failures
        if run.alert_steps()
    ]
    return {
        **_recall([_delay(run.alert_steps(), run.outcome.facts.onset) for run in failures]),
        **_rate(len(false), healthy_steps),
        "exact_kinds": _exact(failures, watched, healthy_steps),
        "info_incidents": sum(len(run.false_incidents({"info"})) for run in watched),
        "skewed_runs": {
            "runs": len(skewed),
            "steps": sum(run.healthy_steps for run in skewed),
            "incidents": sum(len(run.false_incidents()) for run in skewed),
        },
        "unannounced_switches": {
            "runs": len(silent),
            "steps": sum(run.healthy_steps for run in silent),
            "incidents": sum(len(run.false_incidents()) for run in silent),
        },
        "incidents_before_onset": sum(len(run.early_incidents) for run in runs),
        "incidents_per_found_failure": round(float(np.mean(per_failure)), 3) if per_failure else None,
        **_causes(failures),
        **_costs(runs),
        "detectors": _by_detector(failures, watched, healthy_steps),
        "baselines": _baselines(failures, watched, healthy_steps),
    }


def _exact(failures: Sequence[Scored], watched: Sequence[Scored], healthy_steps: int) -> dict[str, Any]:
    """Failures that exact checks are for, and how often these checks spoke where nothing was wrong."""
    own = [run for run in failures if run.case.is_exact]
    false = sum(kind_of(name).is_exact for run in watched for each in run.false_incidents() for name in each.detectors)
    return {
        **_recall([_delay(run.alert_steps(), run.outcome.facts.onset) for run in own]),
        **_rate(false, healthy_steps),
    }


def _causes(failures: Sequence[Scored]) -> dict[str, Any]:
    told = []
    for run in failures:
        alerting = [
            each for each in run.incidents if each.opened_step >= run.outcome.facts.onset and each.level in ALERTS
        ]
        if alerting:
            told.append((run.case, alerting[0].causes))
    right = sum(is_right(case, causes) for case, causes in told)
    at_once = sum(is_right(case, causes[:1]) for case, causes in told)
    return {
        "correct_cause_share": round(right / len(told), 4) if told else None,
        "correct_cause_share_at_alert": round(at_once / len(told), 4) if told else None,
    }


def _costs(runs: Sequence[Scored]) -> dict[str, Any]:
    judged = [run.outcome.judged for run in runs if run.outcome.judged is not None]
    steps = sum(each.num_steps for each in judged)
    facts = [run.outcome.facts for run in runs]
    trained = sum(each.seconds - each.wait_seconds for each in facts)
    return {
        "worker_ms_per_step": round(1e3 * sum(each.worker_seconds for each in judged) / max(1, steps), 4),
        "intake_ms_per_step": round(1e3 * sum(each.intake_seconds for each in judged) / max(1, steps), 4),
        "trainer_hook_share": round(sum(each.hook_seconds for each in facts) / trained, 4) if trained else None,
        "trainer_signal_share": round(sum(each.signal_seconds for each in facts) / trained, 4) if trained else None,
        "trainer_ms_per_step": round(1e3 * trained / max(1, sum(each.num_steps for each in facts)), 2),
        "rows_share": round(float(np.mean([each.rows_share for each in facts])), 4) if facts else None,
        "hook_failures": sum(sum(each.hook_failures.values()) for each in facts),
    }


def _by_detector(failures: Sequence[Scored], watched: Sequence[Scored], healthy_steps: int) -> dict[str, Any]:
    """What each detector would have been worth alone: where it spoke, as evidence or as the incident's name."""
    names = sorted({name for run in (*failures, *watched) for each in run.incidents for name in each.detectors})
    found = {}
    for name in names:
        delays = [_delay(_spoken(run, name), run.outcome.facts.onset) for run in failures]
        false = sum(step < run.healthy_steps for run in watched for step in _spoken(run, name))
        found[name] = {**_recall(delays), **_rate(false, healthy_steps)}
    return found


def _spoken(run: Scored, detector: str) -> list[int]:
    return sorted(each.detectors[detector] for each in run.incidents if detector in each.detectors)


def _baselines(failures: Sequence[Scored], watched: Sequence[Scored], healthy_steps: int) -> dict[str, Any]:
    names = sorted({name for run in (*failures, *watched) for name in run.outcome.baselines})
    found = {}
    for name in names:
        delays = [
            _delay(
                _grouped([each for each in run.outcome.baselines[name] if each >= run.outcome.facts.onset]),
                run.outcome.facts.onset,
            )
            for run in failures
        ]
        false = sum(
            len(_grouped([each for each in run.outcome.baselines[name] if each < run.healthy_steps])) for run in watched
        )
        found[name] = {**_recall(delays), **_rate(false, healthy_steps)}
        if name.startswith("user_"):
            healthy = [run for run in watched if not run.case.is_failure]
            checks = sum(run.outcome.num_checks for run in healthy)
            flagged = sum(len(run.outcome.baselines[name]) for run in healthy)
            found[name]["healthy_checks_flagged"] = round(flagged / checks, 4) if checks else None
    return found
