"""Failures that were held out until their first evaluation (2026-11-23, the second of that day), and are known since.

They were written by another hand, who had read neither the detectors nor what they find. Each is a mistake that
trainings of vision-language models are known to make, done for real to the data, the model or the optimizer; what is
reported of a run is never touched. They stand by where the mistake is made.
"""

from __future__ import annotations

from benchmarks.detection.case import Case
from benchmarks.detection.cases import known_second_data, known_second_model, known_second_optimisation

CASES: tuple[Case, ...] = (*known_second_data.CASES, *known_second_model.CASES, *known_second_optimisation.CASES)
