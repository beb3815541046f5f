"""Models and optimizers of a run, one pair per rank, and the averaging of their gradients.

Replicas of one process stand for the ranks of a group: each has weights, an optimizer and hooks of its own, and the
gradients are averaged as DistributedDataParallel does. What a rank computes, and what its hooks send, is real; only the
transport of the reduction is not.
"""

from __future__ import annotations

import copy

import torch
from benchmarks.detection.case import Setup
from benchmarks.detection.lab import Lab, Replica, Suite
from benchmarks.detection.warm_start import pretrain, pretrain_decoder
from torch import nn

from sidestep.examples.digits_vqa.model import VisionLanguageModel

_BETAS = (0.9, 0.95)


def make_model(suite: Suite) -> VisionLanguageModel:
    """Return a fresh model, drawn from torch's generator."""
    return VisionLanguageModel(
        vocabulary_size=len(suite.tokenizer),
        image_token_id=suite.tokenizer.image_token_id,
        eos_token_id=suite.tokenizer.eos_token_id,
    )


def make_optimizer(model: VisionLanguageModel, setup: Setup, rate: float) -> torch.optim.Optimizer:
    """Return AdamW with nanoVLM's three groups: projector, vision encoder, language model."""
    groups = [
        {"params": list(part.parameters()), "lr": rate} for part in (model.MP, model.vision_encoder, model.decoder)
    ]
    return torch.optim.AdamW(groups, betas=_BETAS, weight_decay=setup.weight_decay)


def make_replicas(suite: Suite, setup: Setup, seed: int) -> list[Replica]:
    """Return the ranks of a run, all with the same weights."""
    first = make_model(suite)
    if setup.pretrained:
        pretrain(first, suite, seed)
    elif setup.warm_start:
        pretrain_decoder(first, suite, seed)
    models = [first, *(copy.deepcopy(first) for _ in range(setup.num_ranks - 1))]
    for model in models:
        model.train()
    rate = suite.learning_rate * setup.rate_factor
    return [
        Replica(rank=rank, model=model, optimizer=make_optimizer(model, setup, rate))
        for rank, model in enumerate(models)
    ]


def average_gradients(lab: Lab) -> None:
    """Give every rank the mean gradient, but for those that leave the averaging."""
    synced = [replica.model for replica in lab.replicas if replica.rank not in lab.unsynced_ranks]
    if len(synced) < 2:
        return
    for parameters in zip(*(model.parameters() for model in synced), strict=True):
        _average(parameters)


def _average(parameters: tuple[nn.Parameter, ...]) -> None:
    """A rank without a gradient counts as one with zeros, as in a reduction."""
    if all(each.grad is None for each in parameters):
        return
    total = torch.zeros_like(parameters[0])
    for each in parameters:
        if each.grad is not None:
            total += each.grad
    total /= len(parameters)
    for each in parameters:
        each.grad = total.clone()
