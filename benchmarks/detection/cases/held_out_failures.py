"""Failures that are held out until their evaluation: whoever tunes detectors does not read them.

They were written by another hand, who had read neither the detectors nor what they find. Behind each stands, where one
was found, a public report of the mistake. They are done for real to the data, the model or the optimizer; what is
reported of a run is never touched.
"""

from __future__ import annotations

from benchmarks.detection.case import Case
from benchmarks.detection.cases import held_out_data, held_out_model, held_out_optimisation

CASES: tuple[Case, ...] = (*held_out_data.CASES, *held_out_model.CASES, *held_out_optimisation.CASES)
