"""Failures of the optimisation, held out until the fifth evaluation: what is minimised, rates and weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from benchmarks.detection.case import Blame, Case, Family, Twist, failure_case
from benchmarks.detection.lab import Lab
from benchmarks.detection.replicas import make_model
from torch import nn
from torch.nn import functional

from sidestep.examples.digits_vqa.packing import IGNORE_INDEX, Batch

_OPTIMISER = frozenset({Blame.OPTIMISER})
_RATE = frozenset({Blame.RATE, Blame.OPTIMISER})
_LOSS = frozenset({Blame.LABELS, Blame.OPTIMISER})
_ENTROPY_BONUS = 1.0
_REFERENCE_WEIGHT = 50.0
_ALIGNMENT_WEIGHT = 30.0
_NEGATIVE_DECAY = -6.0
_SPIKE_INTERVAL_STEPS, _SPIKE = 25, 30.0


class SoftmaxTwice(Twist):
    """Probabilities are handed to a loss that takes logits, so that the softmax is applied twice."""

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Apply it once more."""
        labelled = batch["labels"] != IGNORE_INDEX
        return functional.cross_entropy(logits[labelled].float().softmax(dim=-1), batch["labels"][labelled])


class EntropyBonusTooLarge(Twist):
    """A bonus for uncertain answers, as for exploration, counts as much as the task."""

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Subtract the entropy."""
        logs = functional.log_softmax(logits[batch["labels"] != IGNORE_INDEX].float(), dim=-1)
        return loss + _ENTROPY_BONUS * (logs.exp() * logs).sum(dim=-1).mean()


class HeldToTheReference(Twist):
    """The distance from a reference model weighs 50 where 0.05 was meant: the model may not leave where it stands."""

    def __init__(self) -> None:
        self._reference: nn.Module = nn.Identity()

    def begin(self, lab: Lab) -> None:
        """Take the model as it stands for the reference."""
        with torch.random.fork_rng():
            reference = make_model(lab.suite)
        reference.load_state_dict(lab.model.state_dict())
        self._reference = reference.eval()

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Add the divergence."""
        with torch.no_grad():
            wanted, _ = self._reference(
                batch["input_ids"], batch["images"], attention_mask=batch["attention_mask"], targets=batch["labels"]
            )
        labelled = batch["labels"] != IGNORE_INDEX
        own, old = (each[labelled].float().log_softmax(dim=-1) for each in (logits, wanted))
        return loss + _REFERENCE_WEIGHT * functional.kl_div(own, old, log_target=True, reduction="batchmean")


class AlignedWithoutNegatives(Twist):
    """A second loss draws the embeddings of images together, and the term that keeps them apart is missing."""

    def __init__(self) -> None:
        self._seen: dict[int, torch.Tensor] = {}

    def begin(self, lab: Lab) -> None:
        """See what the projector gives."""
        for replica in lab.replicas:
            replica.model.MP.register_forward_hook(partial(self._see, replica.rank))

    def _see(self, rank: int, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        del inputs
        if module.training and output.requires_grad:
            self._seen[rank] = output

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Add how far they are apart."""
        seen = self._seen.pop(rank, None)
        if seen is None or len(seen) < 2:
            return loss
        return loss + _ALIGNMENT_WEIGHT * seen.var(dim=0).mean()


class DecayOfTheWrongSign(Twist):
    """Weight decay has the wrong sign: all weights grow a little at every step."""

    def begin(self, lab: Lab) -> None:
        """Turn it round."""
        for replica in lab.replicas:
            for group in replica.optimizer.param_groups:
                group["weight_decay"] = _NEGATIVE_DECAY


class RateSpikes(Twist):
    """Every 25 steps a callback resets the rate for a single step, in other units: it is 30 times too high."""

    def rate(self, lab: Lab, rate: float) -> float:
        """Spike."""
        return rate * (_SPIKE if (lab.step - lab.onset) % _SPIKE_INTERVAL_STEPS == 0 else 1.0)


_failure = partial(failure_case, Family.OPTIMISATION)

CASES: tuple[Case, ...] = (
    _failure(
        "softmax_twice",
        "the loss takes the softmax of a softmax, from the start",
        SoftmaxTwice,
        _LOSS,
        onset_share=None,
    ),
    _failure("entropy_bonus_too_large", "uncertain answers are rewarded", EntropyBonusTooLarge, _LOSS),
    _failure("held_to_the_reference", "the model may not leave where it stands", HeldToTheReference, _LOSS | _RATE),
    _failure(
        "aligned_without_negatives",
        "all images are drawn to one embedding",
        AlignedWithoutNegatives,
        _OPTIMISER | {Blame.MODULE, Blame.IMAGES},
    ),
    _failure(
        "decay_of_the_wrong_sign", "weights grow at every step", DecayOfTheWrongSign, _OPTIMISER | {Blame.WEIGHTS}
    ),
    _failure("rate_spikes", "the rate is 30 times too high in one step of 25", RateSpikes, _RATE),
)
