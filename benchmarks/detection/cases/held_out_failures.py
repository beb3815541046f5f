"""Failures that are held out: of the data, of the model and its ranks, of the optimisation."""

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
