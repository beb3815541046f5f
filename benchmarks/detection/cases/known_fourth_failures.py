"""Failures that were held out until their first evaluation (2026-11-23, the fourth of that day); known since."""

from __future__ import annotations

from benchmarks.detection.case import Case
from benchmarks.detection.cases import (
    known_fourth_failures_data,
    known_fourth_failures_model,
    known_fourth_failures_optimisation,
)

CASES: tuple[Case, ...] = (
    *known_fourth_failures_data.CASES,
    *known_fourth_failures_model.CASES,
    *known_fourth_failures_optimisation.CASES,
)
