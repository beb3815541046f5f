"""The trainer's ``HooksConfig`` as the worker reads it: intervals, thresholds and verdict, with their defaults.

The map travels in ``Hello.settings``; a key that is missing or of the wrong type takes its default (docs/metrics.md),
so that an older or a newer trainer is still understood.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What metrics, detectors and the projection need to know of the trainer's configuration."""

    generation_eval_interval: int = 50
    """Steps between two rows of ``generation/``; 0: never."""
    collapse_detection_interval: int = 100
    """Steps between two judgements of the collapse rules; 0: never."""
    answer_length_interval: int = 50
    """Steps between two rows of ``data/``; 0: never."""
    gradient_detail: str = "param"
    """``param``, ``block`` or ``module``."""
    collapse_verdict: str = "target_relative"
    """``literal`` or ``target_relative``."""
    collapse_deadline: int = 500
    """Step from which a verdict that was never 0 is reported all the same."""
    single_token_dominance: float = 0.70
    """Share of the most common content token above which its rule is true."""
    low_diversity_unique_tokens: int = 10
    """Fewer distinct content tokens than this are few."""
    low_diversity_min_tokens: int = 50
    """Content tokens that there must be for ``low_diversity`` to speak."""
    excessive_eos: float = 0.80
    """Share of EOS among content tokens and EOS above which its rule is true."""
    high_loss_sigmas: float = 2.0
    """Standard deviations above the mean from which a token's loss is high."""
    max_new_tokens: int = 64
    """Longest generation, in tokens."""
    on_incident: str = "warn"
    """``warn``, ``stop``, ``checkpoint`` or ``call``: what is asked of the trainer when a critical incident opens."""
    sample_when_suspicious: bool = True
    """Whether the trainer is asked for samples between two due generations when a cheap signal is suspicious."""
    detectors: Mapping[str, Any] = field(default_factory=dict)
    """``NAME.FIELD`` to the value that a detector's rule has in place of its default."""

    @classmethod
    def from_map(cls, settings: Mapping[str, Any]) -> Self:
        """Read ``Hello.settings``; unknown keys are left out, unusable values take the default."""
        taken: dict[str, Any] = {}
        defaults = cls()
        for each in fields(cls):
            default = getattr(defaults, each.name)
            value = settings.get(each.name, default)
            taken[each.name] = value if _fits(value, default) else default
        return cls(**taken)

    def is_due(self, interval: int, step: int) -> bool:
        """Whether ``step`` is due for ``interval`` (docs/metrics.md, "Conventions")."""
        return interval > 0 and step % interval == 0


def _fits(value: object, default: object) -> bool:
    if isinstance(value, bool):
        return isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float) and abs(value) < float("inf")
    return isinstance(value, type(default))
