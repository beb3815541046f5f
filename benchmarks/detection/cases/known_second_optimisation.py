"""Failures of the optimisation that were held out next: which gradients count, which rate, which steps are taken."""

from __future__ import annotations

import math
from functools import partial

import torch
from benchmarks.detection.case import Blame, Case, Family, Setup, Twist, failure_case
from benchmarks.detection.cases.known_optimisation import peak_rate
from benchmarks.detection.lab import Lab

from sidestep.examples.digits_vqa.packing import Batch

_OPTIMISER = frozenset({Blame.OPTIMISER})
_RATE = frozenset({Blame.RATE, Blame.OPTIMISER})
_SWAPPED_BETAS = (0.999, 0.9)
_SMALL_SHARE, _LARGE_SHARE = 0.1, 12.0
_PATIENCE_STEPS = 20
_PLATEAU_FACTOR = 0.1
_LEAST_SHARE = 1e-8


class AlwaysSkipped(Twist):
    """One layer's backward gives NaN at every step, and the loss scaler skips them all.

    The derivative of a root at zero does so, and the loss itself stays what it was.
    """

    def gradients(self, lab: Lab) -> None:
        """Spoil the encoder's first gradients."""
        lab.skips_update = True
        for replica in lab.replicas:
            gradient = replica.model.vision_encoder.patch_embedding.weight.grad
            if gradient is not None:
                gradient.fill_(math.nan)


class GroupsSwapped(Twist):
    """The projector has the small rate that was meant for the pretrained language model, which has its large one."""

    def begin(self, lab: Lab) -> None:
        """Make the optimizer with the rates the wrong way round."""
        for replica in lab.replicas:
            model = replica.model
            replica.optimizer = torch.optim.AdamW(
                [
                    {"params": list(model.MP.parameters()), "rate_share": _SMALL_SHARE},
                    {"params": list(model.vision_encoder.parameters()), "rate_share": 1.0},
                    {"params": list(model.decoder.parameters()), "rate_share": _LARGE_SHARE},
                ],
                lr=peak_rate(lab),
                weight_decay=lab.setup.weight_decay,
            )


class BetasSwapped(Twist):
    """Adam's betas stand in the wrong order: a momentum of a thousand steps, and a scale of ten."""

    def begin(self, lab: Lab) -> None:
        """Swap them."""
        for replica in lab.replicas:
            for group in replica.optimizer.param_groups:
                group["betas"] = _SWAPPED_BETAS


class OnlyTheLastCounts(Twist):
    """Gradients are zeroed before every micro-batch, so that only a step's last one counts."""

    def __init__(self) -> None:
        self._step = -1
        self._number = 0

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Keep the value of all, and the gradient of the last."""
        if lab.step != self._step:
            self._step, self._number = lab.step, 0
        self._number += 1
        is_last = self._number % lab.setup.accumulation_steps == 0
        return loss if is_last else loss * 0.0 + loss.detach()


class PlateauReversed(Twist):
    """The scheduler takes a falling loss for a plateau (`mode="max"`), and divides the rate by ten every 20 steps."""

    def rate(self, lab: Lab, rate: float) -> float:
        """Divide."""
        return rate * max(_LEAST_SHARE, _PLATEAU_FACTOR ** (1 + (lab.step - lab.onset) // _PATIENCE_STEPS))


_failure = partial(failure_case, Family.OPTIMISATION)

CASES: tuple[Case, ...] = (
    _failure(
        "every_step_skipped",
        "gradients are NaN, and the scaler skips every step",
        AlwaysSkipped,
        _OPTIMISER | {Blame.MODULE},
        is_exact=True,
    ),
    _failure(
        "rates_of_groups_swapped",
        "a pretrained language model has the projector's rate, and the reverse, from the start",
        GroupsSwapped,
        _RATE,
        onset_share=None,
        setup=Setup(warm_start=True),
    ),
    _failure("betas_swapped", "Adam's betas are swapped, from the start", BetasSwapped, _RATE, onset_share=None),
    _failure(
        "only_the_last_microbatch_counts",
        "of eight micro-batches one counts",
        OnlyTheLastCounts,
        _OPTIMISER,
        setup=Setup(accumulation_steps=8),
    ),
    _failure("plateau_scheduler_reversed", "the rate is divided by ten every 20 steps", PlateauReversed, _RATE),
)
