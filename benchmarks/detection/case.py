"""What a case is: one way in which a training goes wrong, or one way in which a healthy one looks odd.

A case is data plus a `Twist`: hooks into the training. Everything that a twist may touch is in `lab.py`; README.md
shows how to write one. A case says nothing of detectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy as np
    from benchmarks.detection.lab import Lab
    from benchmarks.detection.talks import Encoded, Talk

    from sidestep.examples.digits_vqa.packing import Batch


class Family(StrEnum):
    """Where the mistake is made; for a healthy case, what is odd about it."""

    MODEL = "model"
    DATA = "data"
    OPTIMISATION = "optimisation"
    IMAGE = "image"
    RANKS = "ranks"


class Blame(StrEnum):
    """Where a person should look: coarse words, so that a cause can be right without being named alike."""

    LABELS = "labels"
    """Targets are wrong, shifted, masked wrongly, cut, or lost."""
    DATA = "data"
    """The samples are others, fewer, too alike, or spoilt, labels included."""
    LOADER = "loader"
    """The right samples at the wrong time or place: repeated, stuck, shared between ranks."""
    IMAGES = "images"
    """The pixels, or which image belongs to which sample."""
    MODULE = "module"
    """One part of the model is broken, cut off, frozen or silent."""
    WEIGHTS = "weights"
    """Weights were damaged, lost or badly initialised."""
    RATE = "rate"
    """Learning rate or schedule."""
    OPTIMISER = "optimiser"
    """The optimizer otherwise: its state, clipping, accumulation, skipped steps, numbers that overflow."""
    RANKS = "ranks"
    """One rank differs from the others."""


class Harm(StrEnum):
    """By what a failure is admitted; without harm it does not count."""

    LOSS = "held-out loss at least 5 % worse than that of the healthy twin with the same seed"
    IMAGE_GAP = "less than half of the twin's loss through images of other samples"
    INVARIANT = "a named invariant is broken"


class Twist:
    """Hooks into a training; override those that the case needs. They are called from the onset on.

    A twist is made anew for every run, so it may keep things on itself. Randomness comes from `lab.rng` or from the
    generator that is passed; nothing else, so that a run can be repeated.
    """

    def begin(self, lab: Lab) -> None:
        """Do something once, before the onset's step (step 0: before the first one). Models and optimizers exist."""

    def talk(self, lab: Lab, talk: Talk, rng: np.random.Generator) -> Talk:  # noqa: ARG002
        """Change a sample while it is text and image numbers."""
        return talk

    def sample(self, lab: Lab, sample: Encoded, rng: np.random.Generator) -> Encoded:  # noqa: ARG002
        """Change a sample once it is ids, labels and pixels."""
        return sample

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Change a rank's micro-batch as the loader hands it out; the hooks of the product see the changed one."""
        return batch

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Change the loss that is propagated back."""
        return loss

    def gradients(self, lab: Lab) -> None:
        """Change gradients (`parameter.grad`) after all backwards and the ranks' averaging, before clipping."""

    def rate(self, lab: Lab, rate: float) -> float:  # noqa: ARG002
        """Change the learning rate of this step."""
        return rate

    def after_step(self, lab: Lab) -> None:
        """Do something once the optimizer has stepped, before the product's `after_step`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """How a run differs from the lab's usual one, failure or not; a failure's twin has the same."""

    batch_samples: int = 24
    """Samples of a step, over all ranks and micro-batches."""
    accumulation_steps: int = 1
    """Micro-batches that they are split into."""
    num_ranks: int = 1
    """Replicas with averaged gradients, each with its share of the samples and with hooks of its own."""
    samples_per_row: int = 1
    """Samples packed into one row, as nanoVLM does; the count of rows shrinks accordingly."""
    rate_factor: float = 1.0
    """Times the suite's learning rate."""
    weight_decay: float = 0.01
    """AdamW's."""
    max_gradient_norm: float = 1.0
    """Gradients are clipped to this norm; 0: never."""
    num_images: int = 0
    """Size of the training set in images; 0: all. With few of them the run has many epochs."""
    mix: Mapping[str, float] = field(default_factory=dict)
    """Kind of talk (`talks.KINDS`) to its share; empty: the suite's usual mix."""
    warm_start: bool = False
    """The language model begins as the one of a run without images, as a pretrained one does; the rest is new."""
    pretrained: bool = False
    """The whole model begins as the one of a healthy run of 300 steps on the suite's usual mix, as for fine-tuning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One kind of failure, or one healthy configuration."""

    name: str
    """Short and unique, with underscores."""
    family: Family
    what: str
    """One sentence: what is done, or what is odd, as somebody would report it."""
    is_failure: bool
    twist: Callable[[], Twist] = Twist
    """Makes the hooks; for a healthy case too, where something happens in it (an announced switch of the data)."""
    setup: Setup = field(default_factory=Setup)
    onset_share: tuple[float, float] | None = None
    """The onset lies between these shares of the run, drawn by the seed; None: from step 0 on."""
    blame: frozenset[Blame] = frozenset()
    """Failures: places of which any is right. Not empty."""
    harm: Harm = Harm.LOSS
    """Failures: what admits it. `LOSS` and `IMAGE_GAP` are both measured in any case, and either is enough."""
    invariant: str = ""
    """With `Harm.INVARIANT`: what is broken for certain, whatever the loss says."""
    is_exact: bool = False
    """Failures that a plain look at one step's batch, weights or rates tells, with nothing to compare with."""
    legitimate: str = ""
    """Healthy cases: why nobody should be warned."""
    is_skewed: bool = False
    """Healthy cases that are legitimately lopsided (yes/no, 85 % "A", tables, memorised): none may be warned of."""
    announced: bool = True
    """False: the data change without `mark_stage`, which nobody can tell from a mistake; counted apart."""
    suites: tuple[str, ...] = ()
    """Names of the suites that it runs in; empty: all."""
    step_share: float = 1.0
    """Length of the run as a share of the usual one."""

    def __post_init__(self) -> None:
        """Refuse a case that cannot be judged.

        Raises:
            ValueError: a failure without blame, an invariant without words, a healthy case without its reason.
        """
        if not self.name.isidentifier():
            raise ValueError(f"{self.name!r} is no short name")
        if self.is_failure and not self.blame:
            raise ValueError(f"{self.name}: say where a person should look (blame)")
        if (self.harm is Harm.INVARIANT) != bool(self.invariant):
            raise ValueError(f"{self.name}: an invariant goes with Harm.INVARIANT, and with words")
        if not self.is_failure and not self.legitimate:
            raise ValueError(f"{self.name}: say why it is healthy (legitimate)")

    def onset(self, num_steps: int, seed: int) -> int:
        """Return the first step that the twist touches."""
        if self.onset_share is None:
            return 0
        low, high = (int(share * num_steps) for share in self.onset_share)
        return low + (seed * 7919 + sum(self.name.encode())) % max(1, high - low)


LATE: tuple[float, float] = (0.45, 0.65)
"""The usual onset: the model has learned something."""


def healthy_case(
    name: str,
    what: str,
    legitimate: str,
    *,
    family: Family = Family.OPTIMISATION,
    twist: Callable[[], Twist] = Twist,
    setup: Setup | None = None,
    onset_share: tuple[float, float] | None = None,
    is_skewed: bool = False,
) -> Case:
    """Return a healthy case, of the optimisation where nothing else is said."""
    return Case(
        name=name,
        family=family,
        what=what,
        is_failure=False,
        twist=twist,
        setup=setup or Setup(),
        onset_share=onset_share,
        legitimate=legitimate,
        is_skewed=is_skewed,
    )


def failure_case(
    family: Family,
    name: str,
    what: str,
    twist: Callable[[], Twist],
    blame: frozenset[Blame],
    *,
    onset_share: tuple[float, float] | None = LATE,
    setup: Setup | None = None,
    is_exact: bool = False,
) -> Case:
    """Return a failure that harm admits, begun late where nothing else is said."""
    return Case(
        name=name,
        family=family,
        what=what,
        is_failure=True,
        twist=twist,
        setup=setup or Setup(),
        onset_share=onset_share,
        blame=blame,
        is_exact=is_exact,
    )
