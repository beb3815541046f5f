"""Held-out failures: of the data and their images, of the model and of ranks, and of the optimisation."""

from __future__ import annotations

from benchmarks.detection.case import Case
from benchmarks.detection.cases import (
    held_out_failures_data,
    held_out_failures_model,
    held_out_failures_optimisation,
)

CASES: tuple[Case, ...] = (
    *held_out_failures_data.CASES,
    *held_out_failures_model.CASES,
    *held_out_failures_optimisation.CASES,
)
