"""Failures that were held out until their first evaluation (2026-11-23, the fifth); known since."""

from __future__ import annotations

from benchmarks.detection.case import Case
from benchmarks.detection.cases import (
    known_fifth_failures_data,
    known_fifth_failures_model,
    known_fifth_failures_optimisation,
)

CASES: tuple[Case, ...] = (
    *known_fifth_failures_data.CASES,
    *known_fifth_failures_model.CASES,
    *known_fifth_failures_optimisation.CASES,
)
