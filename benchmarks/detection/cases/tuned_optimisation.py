"""Failures of optimisation and of weights, of the half that detectors are tuned on."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.detection.case import LATE, Blame, Case, Family, Harm, Setup, Twist
from benchmarks.detection.lab import Lab
from torch import nn

from sidestep.examples.digits_vqa.packing import Batch

_EARLY = (0.1, 0.15)
_DAMAGE = 2.0**16


class RateTimes30(Twist):
    """The learning rate is thirty times too high."""

    def rate(self, lab: Lab, rate: float) -> float:  # noqa: ARG002
        """Multiply it."""
        return 30 * rate


class RateRamp(Twist):
    """The learning rate grows by 3 % a step, as a schedule that counts in other units lets it."""

    def rate(self, lab: Lab, rate: float) -> float:
        """Let it grow; there is an end where it is ten thousand times too high."""
        return rate * min(1e4, 1.03 ** (lab.step - lab.onset))


class RateZero(Twist):
    """The learning rate is zero, as a schedule that ends too early leaves it."""

    def rate(self, lab: Lab, rate: float) -> float:  # noqa: ARG002
        """Return none."""
        return 0.0


class NotANumber(Twist):
    """One weight is NaN."""

    def begin(self, lab: Lab) -> None:
        """Put it in the last block."""
        for replica in lab.replicas:
            _element(replica.model.decoder.blocks[-1], "down_proj").fill_(float("nan"))


class DamagedWeight(Twist):
    """The exponent of one weight is damaged, as memory without error correction leaves it."""

    def begin(self, lab: Lab) -> None:
        """Make the weight 65,536 times too large."""
        for replica in lab.replicas:
            _element(replica.model.decoder.blocks[0], "out_proj").mul_(_DAMAGE)


class ExplodingStart(Twist):
    """Embedding rows, and so the head's, are thirty times too large from the start."""

    def begin(self, lab: Lab) -> None:
        """Scale them."""
        with torch.no_grad():
            for replica in lab.replicas:
                replica.model.decoder.token_embedding.weight *= 30.0


class DetachedBlocks(Twist):
    """What lies before the last block gets no gradient."""

    def begin(self, lab: Lab) -> None:
        """Detach the first block's output."""
        for replica in lab.replicas:
            replica.model.decoder.blocks[0].register_forward_hook(_detached)


class NoisyLoss(Twist):
    """The loss that is propagated is infinite for one step: one batch overflows."""

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Divide by zero once."""
        return loss / 0.0 if lab.step == lab.onset else loss


def _element(block: nn.Module, name: str) -> torch.Tensor:
    """Return one weight of a linear map, as a view of one element that may be written."""
    weight: Any = getattr(block, name).weight
    view: torch.Tensor = weight.data[1, 2:3]
    return view


def _detached(
    _module: nn.Module, _given: tuple[Any, ...], output: tuple[torch.Tensor, Any]
) -> tuple[torch.Tensor, Any]:
    hidden, cache = output
    return hidden.detach(), cache


def _failure(
    name: str,
    what: str,
    twist: type[Twist],
    *blame: Blame,
    family: Family = Family.OPTIMISATION,
    is_exact: bool = False,
) -> Case:
    return Case(
        name=name,
        family=family,
        what=what,
        is_failure=True,
        twist=twist,
        onset_share=LATE,
        blame=frozenset(blame),
        is_exact=is_exact,
    )


_RATE = (Blame.RATE, Blame.OPTIMISER)

CASES: tuple[Case, ...] = (
    _failure("rate_times_30", "the learning rate is 30 times too high", RateTimes30, *_RATE),
    _failure("rate_ramp", "the learning rate grows by 3 % a step", RateRamp, *_RATE),
    _failure("rate_zero", "the learning rate is 0", RateZero, *_RATE, is_exact=True),
    Case(
        name="rate_times_30_warm",
        family=Family.OPTIMISATION,
        what="a pretrained language model is tuned with 30 times the rate from the start",
        is_failure=True,
        twist=RateTimes30,
        setup=Setup(warm_start=True),
        blame=frozenset(_RATE),
    ),
    _failure(
        "weight_is_nan",
        "a weight becomes NaN",
        NotANumber,
        Blame.WEIGHTS,
        Blame.OPTIMISER,
        family=Family.MODEL,
        is_exact=True,
    ),
    _failure(
        "loss_overflows", "one batch's loss is infinite", NoisyLoss, Blame.WEIGHTS, Blame.OPTIMISER, is_exact=True
    ),
    _failure("bit_flip", "bits of a weight's exponent flip", DamagedWeight, Blame.WEIGHTS, family=Family.MODEL),
    Case(
        name="exploding_start",
        family=Family.MODEL,
        what="embeddings begin 30 times too large",
        is_failure=True,
        twist=ExplodingStart,
        blame=frozenset({Blame.WEIGHTS}),
    ),
    Case(
        name="blocks_detached",
        family=Family.MODEL,
        what="the first block's output is detached",
        is_failure=True,
        twist=DetachedBlocks,
        is_exact=True,
        onset_share=_EARLY,
        blame=frozenset({Blame.MODULE}),
        harm=Harm.INVARIANT,
        invariant="every weight that is to be trained gets a gradient",
    ),
)
