"""Failures of the half that detectors are not tuned on, written by somebody who had not read the detectors.

They are written before the detectors are tuned, and their first evaluation is the one that is reported: who tunes does
not read them. Each is a mistake that trainings of vision-language models are known to make, done for real to the data,
the model or the optimizer; what is reported of a run is never touched. They stand by where the mistake is made.
"""

from __future__ import annotations

from benchmarks.detection import held_out_data, held_out_model, held_out_optimisation
from benchmarks.detection.case import Case

CASES: tuple[Case, ...] = (*held_out_data.CASES, *held_out_model.CASES, *held_out_optimisation.CASES)
