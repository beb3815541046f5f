"""What a model is worth on clean held-out samples: loss, accuracy, and what its images are worth to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from benchmarks.detection.lab import Suite
from benchmarks.detection.loader import batch_of, fixed_samples
from torch.nn import functional

from sidestep.examples.digits_vqa.model import VisionLanguageModel
from sidestep.examples.digits_vqa.packing import IGNORE_INDEX, Batch

_NUM_SAMPLES = 192
_SEED = 77


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Over 192 held-out samples of the run's own mix, teacher-forced."""

    loss: float
    """Mean over labelled tokens, in nats; inf or NaN where the model is broken."""
    accuracy: float
    """Share of samples of which every token is right."""
    image_gap: float
    """Loss with the images of other samples minus `loss`, over samples with images; 0 without any."""


@torch.no_grad()
def evaluate(model: VisionLanguageModel, suite: Suite, mix: dict[str, float]) -> Evaluation:
    """Look at the model in evaluation mode; it is left as it was."""
    was_training = model.training
    model.eval()
    samples = fixed_samples(suite, mix, _NUM_SAMPLES, _SEED)
    loss, accuracy = _judged(model, batch_of(samples, suite, 1, 0))
    with_images = [sample for sample in samples if sample.images]
    gap = 0.0
    if with_images:
        batch = batch_of(with_images, suite, 1, 0)
        plain, _ = _judged(model, batch)
        rolled, _ = _judged(model, Batch(**{**batch, "images": [*batch["images"][1:], batch["images"][0]]}))
        gap = rolled - plain
    model.train(was_training)
    return Evaluation(loss=loss, accuracy=accuracy, image_gap=gap)


def _judged(model: VisionLanguageModel, batch: Batch) -> tuple[float, float]:
    labels = batch["labels"]
    logits, _ = model(batch["input_ids"], batch["images"], attention_mask=batch["attention_mask"], targets=labels)
    loss = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
    labelled = labels != IGNORE_INDEX
    right = ((logits.argmax(-1) == labels) | ~labelled).all(dim=1)
    return float(loss), float(right.float().mean())
