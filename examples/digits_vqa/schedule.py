"""Learning rates: warm-up, a plateau, a linear end."""

from __future__ import annotations

from sidestep.examples.digits_vqa.failures import LEARNING_RATE_FACTOR, onset_step
from sidestep.examples.digits_vqa.settings import Failure, Settings

_MAX_WARMUP_SHARE = 0.1


def healthy_share(step: int, settings: Settings) -> float:
    """Return the share of the peak learning rate that optimizer step `step` (from 0) is taken with."""
    warmup_steps = min(settings.warmup_steps, int(settings.num_steps * _MAX_WARMUP_SHARE))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    decay_steps = settings.num_steps * settings.decay_share
    if decay_steps == 0:
        return 1.0
    return min(1.0, (settings.num_steps - step) / decay_steps)


def learning_rate_share(step: int, settings: Settings) -> float:
    """Return the share of the peak learning rate, the learning-rate mistake included: held 300 times too high."""
    onset = onset_step(settings)
    if settings.failure is Failure.LEARNING_RATE and onset is not None and step >= onset:
        return LEARNING_RATE_FACTOR * healthy_share(onset, settings)
    return healthy_share(step, settings)
