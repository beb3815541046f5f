"""Failures held out until their first evaluation: this set has none."""

from __future__ import annotations

from benchmarks.detection.case import Case

CASES: tuple[Case, ...] = ()
