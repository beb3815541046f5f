"""Rules of the data, for ``data_shift.py``, ``missing_targets.py``, ``answers.py`` and ``rows.py``."""

from __future__ import annotations

from dataclasses import dataclass

from sidestep.worker.detectors.rules import Limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift(Limit):
    """The data against what they were."""

    hits: int = 3
    window: int = 4
    cool_steps: int = 300
    warmup: int = 60
    pooled: int = 16
    """Steps that are pooled."""
    rate: float = 0.02
    """Weight of the newest step in the reference."""
    min_rows: int = 50
    """Rows (or answers) below which a pool is not judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingTargets(Limit):
    """Targets that used to come."""

    hits: int = 2
    window: int = 2
    cool_steps: int = 300
    threshold: float = 15.0
    """Steps with a target that should have come since it last did: e to the -15 of chance (measured: with 12, none of
    123,300 healthy steps)."""
    share: float = 0.05
    """Part of all targets that are missing ..."""
    least_ids: int = 2
    """... of so many kinds at least."""
    warmup: int = 60
    rate: float = 0.01
    """Weight of the newest step in what is usual."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleAnswer(Shift):
    """Everything is answered with one token, surely."""

    hits: int = 4
    window: int = 5
    threshold: float = 0.95
    """Share of the content rows that are predicted to be one and the same token."""
    min_rows: int = 128
    pooled: int = 32
    sure: float = 0.3
    """Entropy in nats below which such a prediction is sure: an honest 85 %-"A" model has 0.42."""
    usual: float = 0.9
    """Share of that token among the targets of old up to which this is no description of the data."""
    wrong: float = 0.1
    """Share by which the token must be predicted more often than it is meant in the same rows."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class LateLabels(Limit):
    """Answers whose first tokens have no label."""

    hits: int = 3
    window: int = 3
    threshold: float = 0.95
    """Share of pairs of answers before which the same token stands, from which it is a template's ..."""
    most_alike: float = 0.6
    """... and share of pairs up to which it is none: answers that are 70 % alike are so in half of the pairs."""
    min_pairs: int = 64
    """Pairs of a reading, of as many steps as it takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateDiffers(Limit):
    """No answer is trained where answers are generated."""

    hits: int = 3
    window: int = 3
    threshold: float = 0.0
    """Share of the answers behind the end of a prompt, from which on training and generation do share a template."""
    min_answers: int = 64
    """Answers of a reading, of as many steps as it takes."""
    text_share: float = 0.9
    """Share of labelled positions from which a step is text from end to end, which has no template."""
