"""The figures of all runs as JSON, and as tables for people."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch
from benchmarks.detection.campaign import Outcome
from benchmarks.detection.catalogue import find_case
from benchmarks.detection.causes import is_right
from benchmarks.detection.harm import admit
from benchmarks.detection.plan import Wanted, twin_job
from benchmarks.detection.score import ALERTS, Scored, score

HEADLINES = (
    "recall_within_10", "recall_within_50", "recall_within_200", "recall", "median_delay_steps", "p90_delay_steps",
    "failures", "found", "false_incidents", "healthy_steps", "false_incidents_per_10k",
    "false_incidents_per_10k_upper_95", "incidents_per_found_failure", "correct_cause_share", "worker_ms_per_step",
    "trainer_hook_share",
)  # fmt: skip


def scored_runs(wanted: Sequence[Wanted], outcomes: Sequence[Outcome]) -> list[Scored]:
    """Return the runs with their admission; every failure's twin must be among them."""
    by_job = {each.job: each for each in outcomes}
    runs = []
    for each in wanted:
        case, _ = find_case(each.job.case)
        outcome = by_job[each.job]
        admission = admit(case, outcome.facts, by_job[twin_job(each.job)].facts) if case.is_failure else None
        runs.append(Scored(outcome=outcome, case=case, split=each.split, admission=admission))
    return runs


def whole_report(runs: Sequence[Scored], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return all figures: over all runs, per suite and split, and run by run."""
    total = score(runs)
    keys = sorted({(run.outcome.job.suite, run.split) for run in runs})
    parts = {
        f"{suite}/{split}": score([run for run in runs if (run.outcome.job.suite, run.split) == (suite, split)])
        for suite, split in keys
    }
    splits = {
        split: score([run for run in runs if run.split == split]) for split in sorted({run.split for run in runs})
    }
    told = [failure_row(run) for run in runs if run.case.is_failure]
    return {
        **{name: total[name] for name in HEADLINES},
        "total": total,
        "splits": splits,
        "suites_and_splits": parts,
        "not_admitted": [row for row in told if not row["admitted"]],
        "missed": [row for row in told if row["admitted"] and row["delay_steps"] is None],
        "failures_in_detail": told,
        "false_incidents_in_detail": [row for run in runs for row in _false_rows(run)],
        "healthy_in_detail": [_healthy_row(run) for run in runs if not run.case.is_failure],
        "machine": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cores": os.cpu_count(),
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
        },
        **extra,
    }


def _where(run: Scored) -> dict[str, Any]:
    job = run.outcome.job
    return {"case": job.case, "suite": job.suite, "split": run.split, "seed": job.seed, "steps": job.num_steps}


def failure_row(run: Scored) -> dict[str, Any]:
    """Return what became of one failure."""
    onset = run.outcome.facts.onset
    alerts = run.alert_steps()
    first = next((each for each in run.incidents if each.opened_step >= onset and each.level in ALERTS), None)
    admission = run.admission
    return {
        **_where(run),
        "onset": onset,
        "admitted": admission is not None and admission.is_admitted,
        "harm": admission.why if admission is not None else "",
        "delay_steps": alerts[0] - onset if alerts else None,
        "incident": first.name if first is not None else None,
        "level": first.level if first is not None else None,
        "causes": [cause for _, cause in first.causes] if first is not None else [],
        "cause_is_right": is_right(run.case, first.causes) if first is not None else None,
        "incidents": sum(each.opened_step >= onset and each.level in ALERTS for each in run.incidents),
        "baselines": {
            name: next((step - onset for step in steps if step >= onset), None)
            for name, steps in run.outcome.baselines.items()
        },
        "held_out_loss": run.outcome.facts.held_out_loss,
        "image_gap": run.outcome.facts.image_gap,
    }


def _false_rows(run: Scored) -> list[dict[str, Any]]:
    return [
        {**_where(run), "announced": run.case.announced, **asdict(each)}
        for each in run.false_incidents({*ALERTS, "info"})
    ]


def _healthy_row(run: Scored) -> dict[str, Any]:
    facts = run.outcome.facts
    return {
        **_where(run),
        "held_out_loss": facts.held_out_loss,
        "accuracy": facts.held_out_accuracy,
        "image_gap": facts.image_gap,
        "ms_per_step": round(1e3 * (facts.seconds - facts.wait_seconds) / facts.num_steps, 2),
        "hook_share": round(facts.hook_seconds / max(1e-9, facts.seconds - facts.wait_seconds), 4),
        "rows_share": round(facts.rows_share, 3),
        "false_incidents": len(run.false_incidents()),
    }


def as_json(report: Mapping[str, Any]) -> str:
    """Return the report as JSON, in which a number that is none is null."""
    return json.dumps(_finite(report), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


# ---------------------------------------------------------------------------------------------------- for people


def as_text(report: Mapping[str, Any]) -> str:
    """Return the report's tables in Markdown."""
    lines = [*_splits(report), "", *_rules(report["total"]), "", *_failures(report), "", *_false(report)]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    head = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return [*head, *(f"| {' | '.join(map(_cell, row))} |" for row in rows)]


def _splits(report: Mapping[str, Any]) -> list[str]:
    shown = [name for name in HEADLINES if name not in {"recall_within_200", "found", "false_incidents"}]
    parts = {"all": report["total"], **report["splits"], **report["suites_and_splits"]}
    rows = [(name, *(part[name] for part in parts.values())) for name in shown]
    exact = [
        (f"exact kinds: {name}", *(part["exact_kinds"][name] for part in parts.values()))
        for name in ("failures", "recall_within_5", "false_incidents")
    ]
    return _table(("figure", *parts), [*rows, *exact])


def _rules(total: Mapping[str, Any]) -> list[str]:
    columns = ("recall_within_10", "recall_within_50", "recall", "median_delay_steps", "false_incidents_per_10k")
    named = {"**all detectors**": total, **total["baselines"], **total["detectors"]}
    return _table(("rule", *columns), [(name, *(each[column] for column in columns)) for name, each in named.items()])


def _failures(report: Mapping[str, Any]) -> list[str]:
    columns = ("case", "suite", "seed", "onset", "harm", "delay_steps", "incident", "causes", "cause_is_right")
    rows = [[each[column] for column in columns] for each in report["failures_in_detail"]]
    return _table(columns, rows)


def _false(report: Mapping[str, Any]) -> list[str]:
    columns = ("case", "suite", "seed", "announced", "name", "level", "opened_step", "detectors")
    return _table(columns, [[each[column] for column in columns] for each in report["false_incidents_in_detail"]])
