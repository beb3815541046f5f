"""Failures that are held out: written by another hand, who has read neither the detectors nor what they find.

Each is a mistake that trainings of vision-language models are known to make, done for real to the data, the model or
the optimizer; what is reported of a run is never touched. They stand by where the mistake is made.
"""

from __future__ import annotations

from benchmarks.detection.case import Case
from benchmarks.detection.cases import held_out_data, held_out_model, held_out_optimisation

CASES: tuple[Case, ...] = (*held_out_data.CASES, *held_out_model.CASES, *held_out_optimisation.CASES)
