"""The tables of an incident: one row that tells it, and the answers of its step that were furthest off."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from sidestep.worker.cause import Cause
from sidestep.worker.detectors.view import StepView
from sidestep.worker.incidents import Incident
from sidestep.worker.metrics.measurement import Table
from sidestep.worker.records import TokenText

INCIDENT_KEY: Final = "incidents/log"
SAMPLES_KEY: Final = "incidents/samples"
MAX_SAMPLES: Final = 8
MAX_SHOWN_TOKENS: Final = 64

COLUMNS: Final = (
    "incident", "name", "severity", "first_step", "opened_step", "newest_step", "detectors", "values", "likely_cause",
    "what_to_do", "batches",
)  # fmt: skip


def incident_table(incident: Incident, cause: Cause) -> Table:
    """Return one row: what, when, who spoke with which values, why, what to do, and which batches."""
    values = "; ".join(f"{e.detector} {e.value:.4g} (limit {e.limit:.4g}) at {e.step}" for e in incident.evidence)
    row = (
        incident.number, incident.name, incident.severity.level, incident.first_step, incident.opened_step,
        incident.newest_step, ", ".join(incident.detectors), values, cause.text, cause.advice,
        ", ".join(f"{digest:016x}" for digest in incident.batches),
    )  # fmt: skip
    return Table(key=INCIDENT_KEY, columns=COLUMNS, rows=(row,))


def worst_samples(incident: Incident, view: StepView, text: TokenText) -> Table | None:
    """Return up to 8 answers of the step, those with the highest mean loss: target and prediction, token by token.

    Predictions are the most probable next token after the true ones before it. None where the step has no rows.
    """
    if not view.num_rows:
        return None
    means = view.sum_by_answer(view.losses) / view.lengths
    order = np.lexsort((np.arange(means.size), -means))[:MAX_SAMPLES]
    ends = np.cumsum(view.record.rank_rows)
    rows: list[tuple[Any, ...]] = []
    for answer in order.tolist():
        first, length = int(view.starts[answer]), int(view.lengths[answer])
        shown = slice(first, first + min(length, MAX_SHOWN_TOKENS))
        place = int(np.searchsorted(ends, first, side="right"))
        rank = int(view.record.ranks[place]) if place < view.record.ranks.size else -1
        predictions = view.predictions
        predicted = text.text(predictions[shown].tolist()) if predictions is not None else ""
        target = text.text(view.record.targets[shown].tolist())
        rows.append((incident.number, view.record.step, rank, target, predicted, round(float(means[answer]), 4)))
    columns = ("incident", "step", "rank", "target", "predicted", "loss")
    return Table(key=SAMPLES_KEY, columns=columns, rows=tuple(rows))
