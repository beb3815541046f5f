"""What the product generates from in the lab: held-out questions of the run's own mix, in the run's own form."""

from __future__ import annotations

import numpy as np
import torch
from benchmarks.detection.case import Twist
from benchmarks.detection.lab import Lab
from benchmarks.detection.loader import encoded, fixed_talks
from benchmarks.detection.talks import Encoded, Talk
from numpy.typing import NDArray

import sidestep
from sidestep.examples.digits_vqa.packing import IGNORE_INDEX

_NUM_SAMPLES = 16
_SEED = 78
_SCREEN_SCALE = 8


def generation_samples(lab: Lab, mix: dict[str, float], twist: Twist | None) -> list[sidestep.Sample]:
    """Return 16 prompts, the same for every run with that mix.

    Args:
        lab: the run.
        mix: share of each kind of talk.
        twist: one that is healthy from the first step on, whose form of talks and samples the prompts have as well:
            people generate from what they train on. None: the suite's own form.
    """
    form, rng = twist or Twist(), np.random.default_rng([_SEED, _NUM_SAMPLES, 1])
    talks = fixed_talks(lab.suite, mix, _NUM_SAMPLES, _SEED)
    return [_as_sample(*_formed(lab, talk, form, rng)) for talk in talks]


def _formed(lab: Lab, talk: Talk, twist: Twist, rng: np.random.Generator) -> tuple[Talk, Encoded]:
    """Return a talk and its sample as the twist forms them; as they are, where it leaves no prompt to go on from."""
    plain = encoded(lab.suite, talk)
    formed = twist.talk(lab, talk, rng)
    sample = twist.sample(lab, encoded(lab.suite, formed), rng)
    return (formed, sample) if _first_label(sample) > 0 else (talk, plain)


def _first_label(sample: Encoded) -> int:
    """Return the first position with a target; 0 where there is none."""
    return next((place for place, label in enumerate(sample.labels) if label != IGNORE_INDEX), 0)


def _as_sample(talk: Talk, sample: Encoded) -> sidestep.Sample:
    """Cut a sample where its first answer begins."""
    first = _first_label(sample)
    behind = sample.labels[first:]
    length = behind.index(IGNORE_INDEX) if IGNORE_INDEX in behind else len(behind)
    return sidestep.Sample(
        question=talk.question,
        target=talk.answer,
        image=_shown(sample.images[0]) if sample.images else None,
        prompt_ids=sample.input_ids[: first + 1],
        target_ids=behind[:length],
        inputs={"images": list(sample.images)},
    )


def _shown(tile: torch.Tensor) -> NDArray[np.uint8]:
    pixels = tile.numpy()[0, 0]
    spread = float(pixels.max() - pixels.min()) or 1.0
    shades: NDArray[np.uint8] = np.round((pixels - pixels.min()) / spread * 255).astype(np.uint8)
    return shades.repeat(_SCREEN_SCALE, axis=0).repeat(_SCREEN_SCALE, axis=1)
