"""Models that have been trained before the run begins: a language model that has read, or a whole one that has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from benchmarks.detection.lab import Suite
from benchmarks.detection.loader import batch_of, encoded
from benchmarks.detection.talks import Encoded, encode_talk
from torch import nn

from sidestep.examples.digits_vqa.model import VisionLanguageModel

_NUM_READING_STEPS = 150
_NUM_SEEING_STEPS = 300
_NUM_SAMPLES = 24
_WARMUP_STEPS = 20
_SEED_OFFSET = 100_000


def pretrain_decoder(model: VisionLanguageModel, suite: Suite, seed: int) -> None:
    """Train the language model on the suite's talks without their images; projector and encoder stay new."""
    rng = np.random.default_rng([seed, _SEED_OFFSET])
    kinds = [*suite.mix, "text"]

    def sample() -> Encoded:
        talk = suite.draw(kinds[int(rng.integers(len(kinds)))], int(rng.integers(suite.num_images)), rng)
        return encode_talk(talk, None, suite.tokenizer)

    _train(model, model.decoder.parameters(), suite, sample, _NUM_READING_STEPS)


def pretrain(model: VisionLanguageModel, suite: Suite, seed: int) -> None:
    """Train the whole model on the suite's usual mix."""
    rng = np.random.default_rng([seed, _SEED_OFFSET + 1])
    kinds, shares = list(suite.mix), np.array(list(suite.mix.values()))

    def sample() -> Encoded:
        image = int(rng.integers(suite.num_images))
        talk = suite.draw(kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))], image, rng)
        return encoded(suite, talk)

    _train(model, model.parameters(), suite, sample, _NUM_SEEING_STEPS)


def _train(
    model: VisionLanguageModel,
    parameters: Iterable[nn.Parameter],
    suite: Suite,
    sample: Callable[[], Encoded],
    num_steps: int,
) -> None:
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=suite.learning_rate)
    for step in range(num_steps):
        batch = batch_of([sample() for _ in range(_NUM_SAMPLES)], suite, 1, 0)
        _, loss = model(
            batch["input_ids"], batch["images"], attention_mask=batch["attention_mask"], targets=batch["labels"]
        )
        for group in optimizer.param_groups:
            group["lr"] = suite.learning_rate * min(1.0, (step + 1) / _WARMUP_STEPS)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for weight in model.parameters():
        weight.grad = None
