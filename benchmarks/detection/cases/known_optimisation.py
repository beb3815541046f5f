"""Failures of the optimisation that were held out once: loss, gradients, the optimizer's state, rate and numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from benchmarks.detection.case import LATE, Blame, Case, Family, Setup, Twist
from benchmarks.detection.lab import Lab
from torch import nn
from torch.nn import functional

from sidestep.examples.digits_vqa.packing import IGNORE_INDEX, Batch

_OPTIMISER = frozenset({Blame.OPTIMISER})
_RATE = frozenset({Blame.RATE, Blame.OPTIMISER})
_LOSS = frozenset({Blame.LABELS, Blame.OPTIMISER})
_WRONG_WEIGHT_DECAY = 5.0
_WRONG_CLIPPING = 1e-8
_WRONG_SMOOTHING = 0.9
_TEMPERATURE = 4.0
_DECAY_SHARE = 0.3


def peak_rate(lab: Lab) -> float:
    """Return the run's highest learning rate."""
    return lab.suite.learning_rate * lab.setup.rate_factor


def cross_entropy(logits: torch.Tensor, batch: Batch, smoothing: float = 0.0) -> torch.Tensor:
    """Return the mean loss over labelled tokens."""
    return functional.cross_entropy(
        logits.float().flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE_INDEX, label_smoothing=smoothing
    )


class AbsurdWeightDecay(Twist):
    """Weight decay of 5 where 0.05 was meant: every step takes 1.5 % of all weights."""

    def begin(self, lab: Lab) -> None:
        """Set it."""
        for replica in lab.replicas:
            for group in replica.optimizer.param_groups:
                group["weight_decay"] = _WRONG_WEIGHT_DECAY


class StateCleared(Twist):
    """The optimizer forgets its state after every step: it is made anew within the loop, or offloaded for good.

    Adam without a memory moves every weight by the whole rate, in the direction of the last batch.
    """

    def after_step(self, lab: Lab) -> None:
        """Forget."""
        for replica in lab.replicas:
            replica.optimizer.state.clear()


class SecondMomentLost(Twist):
    """A resumed optimizer has its first moments and its count of steps, but second moments of zero.

    One half of a sharded state that is missing is filled with zeros; no bias correction makes up for it any more.
    """

    def begin(self, lab: Lab) -> None:
        """Zero the second moments."""
        for replica in lab.replicas:
            for state in replica.optimizer.state.values():
                state["exp_avg_sq"].zero_()


class NeverZeroed(Twist):
    """Gradients are never zeroed again: `zero_grad` ended in a branch that is no longer taken."""

    def __init__(self) -> None:
        self._sums: dict[nn.Parameter, torch.Tensor] = {}

    def gradients(self, lab: Lab) -> None:
        """Add what all steps before have left."""
        for replica in lab.replicas:
            for parameter in replica.model.parameters():
                if parameter.grad is not None:
                    if parameter in self._sums:
                        parameter.grad += self._sums[parameter]
                    self._sums[parameter] = parameter.grad.clone()


class NoMasterWeights(Twist):
    """Weights are rounded to bfloat16 after every step, without a float32 copy: small updates vanish.

    Zamirai et al. 2020, "Revisiting BFloat16 Training" (arXiv:2010.06192).
    """

    def after_step(self, lab: Lab) -> None:
        """Round."""
        with torch.no_grad():
            for replica in lab.replicas:
                for parameter in replica.model.parameters():
                    parameter.copy_(parameter.bfloat16().float())


class ScheduleTooFast(Twist):
    """The schedule steps with every micro-batch: it ends in a quarter of the time left, and the rate stays zero."""

    def rate(self, lab: Lab, rate: float) -> float:  # noqa: ARG002
        """Return the rate of a step four times as far away."""
        done = lab.onset + lab.setup.accumulation_steps * (lab.step - lab.onset)
        left = (lab.num_steps - done) / (lab.num_steps * _DECAY_SHARE)
        return peak_rate(lab) * max(0.0, min(1.0, left))


class ClippedToNothing(Twist):
    """Gradients are clipped to a norm of 1e-8: Adam's epsilon took the place of the norm in a list of arguments.

    Adam does not mind small gradients until they are smaller than that very epsilon.
    """

    def begin(self, lab: Lab) -> None:
        """Set the norm that the loop clips to."""
        lab.setup = replace(lab.setup, max_gradient_norm=_WRONG_CLIPPING)


class EncoderReversed(Twist):
    """The vision encoder climbs: a layer that reverses gradients is left over from domain adaptation.

    Ganin and Lempitsky 2015, arXiv:1409.7495.
    """

    def gradients(self, lab: Lab) -> None:
        """Turn the encoder's gradients round."""
        for replica in lab.replicas:
            for parameter in replica.model.vision_encoder.parameters():
                if parameter.grad is not None:
                    parameter.grad.neg_()


class AbsurdSmoothing(Twist):
    """Label smoothing of 0.9: the share that should stay was given as the share that goes."""

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Smooth."""
        return cross_entropy(logits, batch, _WRONG_SMOOTHING)


class TemperatureLeft(Twist):
    """The loss divides the logits by four: distillation's temperature (Hinton et al. 2015) is left in the plain loss.

    The model learns logits that are four times too large, and is certain of everything.
    """

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Divide."""
        return cross_entropy(logits / _TEMPERATURE, batch)


def _failure(
    name: str, what: str, twist: Callable[[], Twist], blame: frozenset[Blame], setup: Setup | None = None
) -> Case:
    return Case(
        name=name,
        family=Family.OPTIMISATION,
        what=what,
        is_failure=True,
        twist=twist,
        setup=setup or Setup(),
        onset_share=LATE,
        blame=blame,
    )


CASES: tuple[Case, ...] = (
    _failure(
        "weight_decay_of_five", "weight decay is 5", AbsurdWeightDecay, frozenset({Blame.OPTIMISER, Blame.WEIGHTS})
    ),
    _failure("optimizer_state_cleared", "the optimizer forgets its state every step", StateCleared, _OPTIMISER),
    _failure(
        "second_moment_lost",
        "Adam's second moments are zero after a resume",
        SecondMomentLost,
        frozenset({Blame.OPTIMISER, Blame.WEIGHTS}),
    ),
    _failure("gradients_never_zeroed", "gradients add up over all steps", NeverZeroed, _OPTIMISER),
    _failure(
        "no_master_weights",
        "weights are rounded to bfloat16, at a low rate",
        NoMasterWeights,
        frozenset({Blame.OPTIMISER, Blame.WEIGHTS, Blame.RATE}),
        Setup(rate_factor=0.1),
    ),
    _failure(
        "schedule_four_times_too_fast",
        "the rate is zero long before the end",
        ScheduleTooFast,
        _RATE,
        Setup(accumulation_steps=4),
    ),
    _failure("clipped_to_nothing", "gradients are clipped to a norm of 1e-8", ClippedToNothing, _RATE),
    _failure(
        "encoder_gradient_reversed",
        "the vision encoder's gradients have the wrong sign",
        EncoderReversed,
        frozenset({Blame.MODULE, Blame.OPTIMISER, Blame.IMAGES}),
    ),
    Case(
        name="label_smoothing_of_nine_tenths",
        family=Family.OPTIMISATION,
        what="targets are smoothed by 0.9, from the start",
        is_failure=True,
        twist=AbsurdSmoothing,
        blame=_LOSS,
    ),
    _failure(
        "temperature_left_in_the_loss", "the loss divides logits by four", TemperatureLeft, _LOSS | {Blame.MODULE}
    ),
)
