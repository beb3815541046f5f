"""Rules of what the rows of a batch hold (``rows.py``)."""

from __future__ import annotations

from dataclasses import dataclass

from sidestep.worker.detectors.rules import Limit


@dataclass(frozen=True, slots=True, kw_only=True)
class EmptyRows(Limit):
    """Samples without a label."""

    threshold: float = 0.25
    """Share of the samples: the odd one whose answer was cut away is usual."""
    pooled: int = 8
    """Steps that are pooled at least ..."""
    min_rows: int = 64
    """... and more until there are so many samples, ..."""
    most_pooled: int = 32
    """... or so many steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BegunTwice(Limit):
    """Samples whose first token stands twice."""

    hits: int = 3
    window: int = 3
    threshold: float = 0.95
    """Share of the samples: a template that adds what the tokenizer adds as well does so in all of them."""
    min_rows: int = 16
    """Samples of a reading, of as many steps as it takes."""
