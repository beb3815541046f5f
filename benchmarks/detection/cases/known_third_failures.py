"""Failures that were held out until their first evaluation (2026-11-23, the third of that day), and are known since.

They were written by another hand, who had read neither the detectors nor what they find. Behind each stands, where one
was found, a public report of the mistake. They are done for real to the data, the model or the optimizer; what is
reported of a run is never touched.
"""

from __future__ import annotations

from benchmarks.detection.case import Case
from benchmarks.detection.cases import known_third_data, known_third_model, known_third_optimisation

CASES: tuple[Case, ...] = (*known_third_data.CASES, *known_third_model.CASES, *known_third_optimisation.CASES)
