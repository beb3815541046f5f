"""Failures that were held out until their first evaluation (2026-11-23, in docs/detection.md), and are known since.

They were written before the detectors were tuned, by somebody who had not read them. Each is a mistake that trainings
of vision-language models are known to make, done for real to the data, the model or the optimizer; what is reported of
a run is never touched. They stand by where the mistake is made.
"""

from __future__ import annotations

from benchmarks.detection.case import Case
from benchmarks.detection.cases import known_data, known_model, known_optimisation

CASES: tuple[Case, ...] = (*known_data.CASES, *known_model.CASES, *known_optimisation.CASES)
