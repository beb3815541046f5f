"""Every number of the demo's training in one place."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Failure(StrEnum):
    """A real mistake that `--fail` builds into the training."""

    LABELS_TO_A = "labels-to-A"
    LEARNING_RATE = "learning-rate"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a run of the demo is made of."""

    num_steps: int = 400
    """Optimizer steps."""
    seed: int = 0
    """Seed of the weights, of the order of the images and of the questions."""
    accumulation_steps: int = 2
    """Micro-batches per optimizer step."""
    batch_size: int = 8
    """Packed rows per micro-batch."""
    row_length_tokens: int = 192
    """Length that every packed row is left-padded to."""
    learning_rate_projector: float = 3e-3
    """Peak learning rate of the modality projector."""
    learning_rate_vision: float = 3e-3
    """Peak learning rate of the vision encoder."""
    learning_rate_language: float = 3e-3
    """Peak learning rate of the decoder."""
    warmup_steps: int = 30
    """Optimizer steps of linear warm-up, at most a tenth of the run."""
    decay_share: float = 0.3
    """Share of the run, at its end, over which the learning rates fall linearly to zero."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    max_gradient_norm: float = 1.0
    """Gradients are clipped to this global L2 norm."""
    failure: Failure | None = None
    """The mistake to make, if any."""
    num_generation_samples: int = 32
    """Held-out prompts, of mixed kinds, that the hooks generate from."""
    batch_interval_steps: int = 25
    """Steps between two reports of tokens, losses and learning rates."""
    generation_interval_steps: int = 25
    """Steps between two reports of generation quality."""
    collapse_interval_steps: int = 25
    """Steps between two collapse checks."""
    gradient_interval_steps: int = 50
    """Steps between two reports of gradient statistics."""
    answer_interval_steps: int = 50
    """Steps between two reports of answer lengths."""
    max_new_tokens: int = 32
    """Longest answer that the hooks let the model write; the longest true one has fewer tokens."""
    device: str = "cpu"
    """Where the model trains."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot train.

        Raises:
            ValueError: a count is below one, or the decay's share lies outside 0 to 1.
        """
        counts = ("num_steps", "accumulation_steps", "batch_size", "row_length_tokens", "num_generation_samples")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"Settings.{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 <= self.decay_share <= 1.0:
            raise ValueError(f"Settings.decay_share must lie between 0 and 1, got {self.decay_share}")
