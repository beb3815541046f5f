"""A language model that has read before it sees: what a run starts from where a pretrained one is adapted."""

from __future__ import annotations

import numpy as np
import torch
from benchmarks.detection.lab import Suite
from benchmarks.detection.loader import batch_of
from benchmarks.detection.talks import Encoded, encode_talk

from sidestep.examples.digits_vqa.model import VisionLanguageModel

_NUM_STEPS = 150
_NUM_SAMPLES = 24
_SEED_OFFSET = 100_000


def pretrained_decoder(model: VisionLanguageModel, suite: Suite, seed: int) -> None:
    """Train the model on the suite's talks without their images; its projector and encoder stay new."""
    rng = np.random.default_rng([seed, _SEED_OFFSET])
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=suite.learning_rate)
    kinds = [*suite.mix, "text"]
    for step in range(_NUM_STEPS):
        samples = [_without_image(suite, kinds, rng) for _ in range(_NUM_SAMPLES)]
        batch = batch_of(samples, suite, 1, 0)
        _, loss = model(
            batch["input_ids"], batch["images"], attention_mask=batch["attention_mask"], targets=batch["labels"]
        )
        for group in optimizer.param_groups:
            group["lr"] = suite.learning_rate * min(1.0, (step + 1) / 20)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _without_image(suite: Suite, kinds: list[str], rng: np.random.Generator) -> Encoded:
    talk = suite.draw(kinds[int(rng.integers(len(kinds)))], int(rng.integers(suite.num_images)), rng)
    return encode_talk(talk, None, suite.tokenizer)
