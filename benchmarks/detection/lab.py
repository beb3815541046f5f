"""A training while it runs: all that a twist may see and touch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from benchmarks.detection.case import Setup
from benchmarks.detection.talks import LabTokenizer, Talk

from sidestep.examples.digits_vqa.model import VisionLanguageModel


class Suite(Protocol):
    """A task with its tokenizer and images."""

    name: str
    tokenizer: LabTokenizer
    num_images: int
    """Images to train on; `image` knows held-out ones behind them."""
    num_held_out: int
    mix: dict[str, float]
    """Usual share of each kind of talk."""
    learning_rate: float

    def image(self, number: int) -> torch.Tensor:
        """Return an image, float32 [1, 1, 8, 8], standardised; black is `black()`."""
        ...

    def black(self) -> torch.Tensor:
        """Return what an image without light becomes, float32 [1, 1, 8, 8]."""
        ...

    def draw(self, kind: str, image: int, rng: np.random.Generator) -> Talk:
        """Return a talk of a kind about an image (`text` has none)."""
        ...


@dataclass(slots=True, kw_only=True)
class Replica:
    """One rank."""

    rank: int
    model: VisionLanguageModel
    """`vision_encoder`, `MP` (the projector), `decoder` (`token_embedding`, `blocks`, `norm`, `head`)."""
    optimizer: torch.optim.Optimizer
    """A twist may put another one in its place in `begin` at step 0 only, as the product is attached after that."""


@dataclass(slots=True, kw_only=True)
class Lab:
    """A run while it goes on."""

    suite: Suite
    setup: Setup
    num_steps: int
    onset: int
    replicas: list[Replica]
    rng: np.random.Generator
    """The twist's own."""
    announce: Callable[[str], None]
    """Tells the product that a stage begins (`hooks.mark_stage`), as a user does who switches the data on purpose."""
    step: int = 0
    unsynced_ranks: set[int] = field(default_factory=set)
    """Ranks that leave the averaging of gradients: they keep their own, the others average without them."""
    skips_update: bool = False
    """True: the optimizer does not step (and `after_step(applied=False)` is told)."""
    mix: dict[str, float] = field(default_factory=dict)
    """Share of each kind of talk from here on; a twist may change it."""
    image_pool: list[int] = field(default_factory=list)
    """Numbers of the images that samples are drawn from; a twist may change it."""

    @property
    def model(self) -> VisionLanguageModel:
        """The first rank's model; where there are several, each `Replica` has its own."""
        return self.replicas[0].model
