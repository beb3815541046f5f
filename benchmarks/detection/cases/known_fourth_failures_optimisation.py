"""Failures of the optimisation that were held out: penalties, weights in the loss, gradients on their way, rates."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from functools import partial

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
_NOISE_FACTOR = 150.0
_TEACHER_TEMPERATURE = 4.0
_NUM_STEPS_LATE = 16
_PENALTY = 3e-4


class PrivacyNoise(Twist):
    """Noise for privacy is scaled for another size of batch, and is many times as large as the gradients."""

    def __init__(self) -> None:
        self._generator = torch.Generator()

    def begin(self, lab: Lab) -> None:
        """Seed the noise."""
        self._generator.manual_seed(int(lab.rng.integers(2**31)))

    def gradients(self, lab: Lab) -> None:
        """Add it, alike on all ranks."""
        models = (replica.model.parameters() for replica in lab.replicas)
        for weights in zip(*models, strict=True):
            noise = torch.randn(weights[0].shape, generator=self._generator)
            for weight in weights:
                if weight.grad is not None:
                    weight.grad += _NOISE_FACTOR * weight.grad.square().mean().sqrt() * noise


class SoftTeacher(Twist):
    """A teacher's answers are softened by a temperature of four, the student's are not, and it learns to doubt."""

    def __init__(self) -> None:
        self._teacher: nn.Module = nn.Identity()

    def begin(self, lab: Lab) -> None:
        """Take the model as it stands for the teacher."""
        with torch.random.fork_rng():
            teacher = make_model(lab.suite)
        teacher.load_state_dict(lab.model.state_dict())
        self._teacher = teacher.eval()

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Ask for the teacher's softened distribution."""
        with torch.no_grad():
            taught, _ = self._teacher(
                batch["input_ids"], batch["images"], attention_mask=batch["attention_mask"], targets=batch["labels"]
            )
        labelled = batch["labels"] != IGNORE_INDEX
        soft = (taught[labelled].float() / _TEACHER_TEMPERATURE).softmax(dim=-1)
        return functional.cross_entropy(logits[labelled].float(), soft)


class GradientsLate(Twist):
    """A pipeline applies gradients 16 steps after the weights that they are of."""

    def __init__(self) -> None:
        self._waiting: deque[list[list[torch.Tensor | None]]] = deque()

    def gradients(self, lab: Lab) -> None:
        """Exchange gradients for old ones, once there are any."""
        self._waiting.append(
            [[None if w.grad is None else w.grad.clone() for w in each.model.parameters()] for each in lab.replicas]
        )
        if len(self._waiting) <= _NUM_STEPS_LATE:
            return
        for replica, old in zip(lab.replicas, self._waiting.popleft(), strict=True):
            for weight, gradient in zip(replica.model.parameters(), old, strict=True):
                weight.grad = gradient


class PenaltySummed(Twist):
    """A penalty on the weights' size is summed over all weights, where its strength was chosen for the mean."""

    def loss(self, lab: Lab, rank: int, batch: Batch, logits: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Add it."""
        sizes = [weight.abs().sum() for weight in lab.replicas[rank].model.parameters()]
        return loss + _PENALTY * torch.stack(sizes).sum()


class BatchDividedTwice(Twist):
    """The size of a batch is divided by the number of devices twice: a step has one sample, at the usual rate."""

    def begin(self, lab: Lab) -> None:
        """Shrink the batch."""
        lab.setup = replace(lab.setup, batch_samples=1)


_failure = partial(failure_case, Family.OPTIMISATION)

CASES: tuple[Case, ...] = (
    _failure("privacy_noise_too_large", "noise on the gradients drowns them", PrivacyNoise, _OPTIMISER),
    _failure("teacher_too_soft", "a softened teacher is imitated", SoftTeacher, _LOSS),
    _failure("gradients_late_by_16_steps", "gradients are applied 16 steps late", GradientsLate, _OPTIMISER),
    _failure(
        "penalty_summed_over_weights",
        "a penalty on all weights outweighs the task, from the start",
        PenaltySummed,
        _OPTIMISER | {Blame.WEIGHTS},
        onset_share=None,
    ),
    _failure(
        "batch_divided_twice",
        "a step has one sample at the usual rate",
        BatchDividedTwice,
        _RATE | {Blame.LOADER, Blame.DATA},
    ),
)
