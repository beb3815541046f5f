"""Failures of the model and of ranks that were held out next: what is loaded, what gradients reach, who sees whom."""

from __future__ import annotations

import torch
from benchmarks.detection.case import LATE, Blame, Case, Family, Harm, Setup, Twist
from benchmarks.detection.lab import Lab
from torch import nn

from sidestep.examples.digits_vqa.packing import Batch

_RESTORING_INTERVAL_STEPS = 40
_STUCK_RANK = 2
_DEFAULT_GAIN = 3**-0.5
"""Of torch's linear layers: uniform weights of this standard deviation over the root of the inputs."""


class BlocksNotInTheCheckpoint(Twist):
    """A resume finds no weights for the language model's blocks, and `strict=False` lets them begin anew.

    Names with a prefix that compiling or wrapping a model has put before them.
    """

    def begin(self, lab: Lab) -> None:
        """Initialise the blocks as a new model's."""
        with torch.no_grad():
            for weights in zip(*(each.model.decoder.blocks.parameters() for each in lab.replicas), strict=True):
                fresh = torch.ones_like(weights[0])
                if fresh.dim() > 1:
                    scale = _DEFAULT_GAIN * fresh.shape[1] ** -0.5
                    fresh = torch.from_numpy(lab.rng.normal(scale=scale, size=tuple(fresh.shape))).float()
                for weight in weights:
                    weight.copy_(fresh)


class ProjectorUnknownToTheOptimizer(Twist):
    """The projector was added behind the optimizer's back: it has gradients, and nobody steps it."""

    def begin(self, lab: Lab) -> None:
        """Take its weights out of the groups."""
        for replica in lab.replicas:
            unknown = {id(each) for each in replica.model.MP.parameters()}
            for group in replica.optimizer.param_groups:
                group["params"] = [each for each in group["params"] if id(each) not in unknown]


class VisionWithoutGradient(Twist):
    """Encoder and projector run under `no_grad`, which was meant for a frozen encoder alone."""

    def begin(self, lab: Lab) -> None:
        """Detach what the projector gives."""
        for replica in lab.replicas:
            replica.model.MP.register_forward_hook(self._detached)

    @staticmethod
    def _detached(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        del module, inputs
        return output.detach()


class BestWeightsPutBack(Twist):
    """After each evaluation the best weights are put back, and the first ones stay the best for ever.

    The metric is a loss, and the callback takes more for better.
    """

    def __init__(self) -> None:
        self._best: list[torch.Tensor] = []

    def begin(self, lab: Lab) -> None:
        """Keep the weights of the first evaluation."""
        self._best = [each.detach().clone() for each in lab.model.parameters()]

    def after_step(self, lab: Lab) -> None:
        """Put them back."""
        if (lab.step + 1 - lab.onset) % _RESTORING_INTERVAL_STEPS:
            return
        with torch.no_grad():
            for replica in lab.replicas:
                for parameter, weight in zip(replica.model.parameters(), self._best, strict=True):
                    parameter.copy_(weight)


class NothingMasked(Twist):
    """The attention mask is ones: samples of a packed row read each other's questions, answers and images."""

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Open all of it; order in time is kept."""
        return Batch(**{**batch, "attention_mask": torch.ones_like(batch["attention_mask"])})


class RanksBeginApart(Twist):
    """Each rank initialises its own weights, and nobody broadcasts the first one's; gradients are averaged as usual."""

    def begin(self, lab: Lab) -> None:
        """Draw the other ranks' weights anew, at their own scale."""
        with torch.no_grad():
            for replica in lab.replicas[1:]:
                for parameter in replica.model.parameters():
                    if parameter.dim() > 1:
                        drawn = torch.from_numpy(lab.rng.normal(size=tuple(parameter.shape))).float()
                        parameter.copy_(drawn * parameter.std())


class OneLoaderStuck(Twist):
    """One of four ranks gets the same batch again and again: its worker died, and the queue is never emptied."""

    def __init__(self) -> None:
        self._kept: Batch | None = None

    def batch(self, lab: Lab, rank: int, batch: Batch) -> Batch:  # noqa: ARG002
        """Return that rank's first one."""
        if rank != _STUCK_RANK:
            return batch
        self._kept = self._kept or batch
        return self._kept


CASES: tuple[Case, ...] = (
    Case(
        name="blocks_not_in_the_checkpoint",
        family=Family.MODEL,
        what="the language model's blocks begin anew at a resume",
        is_failure=True,
        twist=BlocksNotInTheCheckpoint,
        onset_share=LATE,
        blame=frozenset({Blame.WEIGHTS, Blame.MODULE}),
    ),
    Case(
        name="projector_unknown_to_the_optimizer",
        family=Family.MODEL,
        what="the optimizer does not hold the projector, from the start",
        is_failure=True,
        twist=ProjectorUnknownToTheOptimizer,
        blame=frozenset({Blame.MODULE, Blame.OPTIMISER}),
        harm=Harm.INVARIANT,
        invariant="every weight that is to be trained is in the optimizer",
        is_exact=True,
    ),
    Case(
        name="vision_without_gradient",
        family=Family.MODEL,
        what="encoder and projector run under no_grad, from the start",
        is_failure=True,
        twist=VisionWithoutGradient,
        blame=frozenset({Blame.MODULE, Blame.OPTIMISER}),
        harm=Harm.INVARIANT,
        invariant="every weight that is to be trained gets a gradient",
        is_exact=True,
    ),
    Case(
        name="best_weights_put_back",
        family=Family.MODEL,
        what="every 40 steps the weights go back to the same old ones",
        is_failure=True,
        twist=BestWeightsPutBack,
        onset_share=LATE,
        blame=frozenset({Blame.WEIGHTS, Blame.OPTIMISER}),
    ),
    Case(
        name="packed_samples_read_each_other",
        family=Family.MODEL,
        what="nothing separates the samples of a packed row, from the start",
        is_failure=True,
        twist=NothingMasked,
        setup=Setup(samples_per_row=4),
        blame=frozenset({Blame.DATA, Blame.LOADER, Blame.MODULE}),
        harm=Harm.INVARIANT,
        invariant="no sample reads another one of its row",
    ),
    Case(
        name="ranks_begin_apart",
        family=Family.RANKS,
        what="two ranks begin with different weights",
        is_failure=True,
        twist=RanksBeginApart,
        setup=Setup(num_ranks=2),
        blame=frozenset({Blame.RANKS, Blame.WEIGHTS}),
        harm=Harm.INVARIANT,
        invariant="all ranks hold the same weights",
        is_exact=True,
    ),
    Case(
        name="one_loader_stuck",
        family=Family.RANKS,
        what="one of four ranks gets one batch again and again",
        is_failure=True,
        twist=OneLoaderStuck,
        setup=Setup(num_ranks=4),
        onset_share=LATE,
        blame=frozenset({Blame.LOADER, Blame.RANKS}),
        harm=Harm.INVARIANT,
        invariant="no rank trains on one batch again and again",
        is_exact=True,
    ),
)
